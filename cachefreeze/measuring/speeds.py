"""How fast a tier reads and writes rows, by its own store and the loader: seconds a batch and seconds a byte."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cachefreeze.errors import StoreError
from cachefreeze.loader import CachedLoader, move
from cachefreeze.measuring.forwards import wait
from cachefreeze.row_source import Computed, PassCounts, Rows, RowSource
from cachefreeze.rows import index_of
from cachefreeze.running import NumericMode
from cachefreeze.stores import DeviceStore, FieldSpec, HDF5Store, HostStore, Store, StoreSpec
from cachefreeze.stores.opening import fitting_tier

_BATCHES = 4
_PASSES = 3
# Of a batch of large rows: more than a cache of the processor holds of all batches, and milliseconds to write.
_LARGE_BYTES = 1 << 22
_SMALL_BYTES = 1 << 8
# What a prefix puts through the caches of a processor before its rows are written: more than a core has of its own.
_BETWEEN_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of reading and writing: so many a batch, and so many a byte of its rows; both with the way to the device.

    Attributes:
        read_batch: Of a batch, however small its rows.
        read_byte: Of a byte of rows that are read in any order.
        write_batch: Likewise of writing, with all else that the loader does for a batch that is not there yet.
        write_byte: With its share of making the store and of the commit.
    """

    read_batch: float
    read_byte: float
    write_batch: float
    write_byte: float


def measured_tier(store: str, nbytes: int, device: torch.device) -> str:
    """The tier whose speed is that of a store: ``device``, ``host`` or ``hdf5:DIR``."""
    tier, _, place = store.partition(":")
    if tier == "auto":
        return fitting_tier(nbytes, device, place) or "host"  # where nothing has room, opening the store says so
    path = Path(place).expanduser()
    return f"hdf5:{path.parent}" if tier == "hdf5" and path.suffix == ".h5" else store


@cache  # of the machine, not of a model: once a process is enough
def speed_of(tier: str, device: torch.device, batch: int) -> Speed:
    """Fill a small store of a tier through the loader, a few batches, and read them.

    Args:
        tier: ``device``, ``host`` or ``hdf5:DIR``; the folder is written to.
        device: Where rows come from and go to.
        batch: Rows in a batch.

    Raises:
        StoreError: The tier's store cannot be made.
    """
    kind, _, place = tier.partition(":")
    if kind != "hdf5":
        return _speed(lambda spec: DeviceStore(spec, device) if kind == "device" else HostStore(spec), device, batch)
    folder = Path(place).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".measuring-") as scratch:
            names = iter(range(2))
            return _speed(
                lambda spec: HDF5Store.create(Path(scratch) / f"{next(names)}.h5", spec, fingerprint={}), device, batch
            )
    except OSError as error:
        raise StoreError(f"cannot write to the cache folder {folder}: {error.strerror}; give another one") from error


def _speed(make: Callable[[StoreSpec], Store], device: torch.device, batch: int) -> Speed:
    small = _SMALL_BYTES // 4
    large = max(_LARGE_BYTES // (4 * batch), small + 1)
    little, much = _timed(make, device, batch, small), _timed(make, device, batch, large)
    apart = 4 * batch * (large - small)
    slopes = [max(0.0, b - a) / apart for a, b in zip(little, much, strict=True)]
    batches = [max(0.0, a - slope * 4 * batch * small) for a, slope in zip(little, slopes, strict=True)]
    return Speed(read_batch=batches[0], read_byte=slopes[0], write_batch=batches[1], write_byte=slopes[1])


class _Stored:
    """A store as the loader fills and reads it, with the same rows for every batch.

    Attributes:
        between: Seconds since the last batch that stand for the prefix, and are not the store's.
    """

    dataset: Any = None
    on_disk = False

    def __init__(self, store: Store, values: Mapping[str, Tensor], device: torch.device) -> None:
        self._store, self._values, self._device = store, values, device
        self._mode = NumericMode(None)
        written = sum(value.nbytes for value in values.values())
        self._prefix = torch.zeros(max(0, _BETWEEN_BYTES - written) // 4)
        self.between = 0.0

    @property
    def settled(self) -> bool:
        """After a fill the loader asks no more which rows are absent."""
        return self._store.full

    def check(self) -> None:
        """Nothing changes here."""

    def in_turn(self, batches: Iterator[Sequence[int]], epoch: int) -> Iterator[Sequence[int]]:
        """Rows stand for samples of the same index."""
        return batches

    def absent(self, rows: Sequence[int]) -> list[int]:
        """All or none of a batch."""
        return [] if bool(self._store.present(index_of(rows)).all()) else list(rows)

    def fetch(self, rows: Sequence[int]) -> Any:
        """What is fetched is measured elsewhere."""

    def compute(self, rows: Sequence[int], raw: Any) -> Computed:
        """Write a batch after what a prefix leaves: nothing that writing needs is at hand."""
        began = time.perf_counter()
        self._prefix.add_(1)
        self.between = time.perf_counter() - began
        index = index_of(rows)
        self._store.claim(index)
        self._store.write(index, self._values)
        return Computed(tuple(rows), dict(self._values))

    def expect(self, samples: Sequence[int], epoch: int) -> None:
        """Of the order here nobody knows more than the next batch."""

    def lane(self) -> None:
        """What a read costs is asked for, so none is hidden behind a step."""

    def read_ahead(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return self._store.read(index_of(rows))

    def batch(
        self,
        rows: Sequence[int],
        counts: PassCounts,
        computed: Sequence[Computed],
        stored: Mapping[str, Tensor] | None = None,
    ) -> Any:
        values = move(self.read_ahead(rows) if stored is None else stored, self._device)
        return Rows([values["row"]], self._mode, self), values["label"]


def _timed(make: Callable[[StoreSpec], Store], device: torch.device, batch: int, width: int) -> tuple[float, float]:
    """Seconds to read and to write one batch of rows of ``width`` float32 numbers."""
    rows = _BATCHES * batch
    values = {"row": torch.zeros(batch, width, device=device), "label": torch.zeros(batch, dtype=torch.int64)}
    fields = (
        FieldSpec(name="row", shape=(width,), dtype=torch.float32),
        FieldSpec(name="label", shape=(), dtype=torch.int64),
    )
    began = time.perf_counter()
    store = make(StoreSpec(rows=rows, fields=fields))
    made = time.perf_counter() - began
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    fills, reads = [], []
    try:
        source = _Stored(store, values, device)
        # a generator of its own: a pass draws from it as from the user's
        batches: DataLoader[Any] = DataLoader(range(rows), batch, sampler=order, generator=torch.Generator())  # type: ignore[arg-type]
        loader = CachedLoader(batches, cast("RowSource", source))
        began = time.perf_counter()
        for _ in loader:
            wait(device)
            fills.append(time.perf_counter() - began - source.between)
            began = time.perf_counter()
        store.commit()
        made += time.perf_counter() - began
        for _ in range(_PASSES):
            began = time.perf_counter()
            for _ in loader:
                pass
            wait(device)
            reads.append((time.perf_counter() - began) / _BATCHES)
    finally:
        store.close()
    # a large store's making and commit grow with its bytes; a small one's are no part of any batch
    shared = made / _BATCHES if 4 * width * batch > _LARGE_BYTES // 2 else 0.0
    read = min(reads)
    return read, max(0.0, statistics.median_low(fills) - read) + shared
