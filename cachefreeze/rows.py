"""The rows of one loader's samples: how to make them, and the store that keeps them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cachefreeze.errors import CorruptRowError, LoaderError, StaleCacheError, UsageError
from cachefreeze.fingerprint import difference
from cachefreeze.formats import format_of, send
from cachefreeze.frozen_prefix import FrozenPrefix
from cachefreeze.isolation import preserved_random_state
from cachefreeze.loader import worker_loader
from cachefreeze.prefetch import Lane, side_stream
from cachefreeze.reporting import caching_line
from cachefreeze.revision import MADE_FROM, Revision, input_digests
from cachefreeze.row_source import Computed, PassCounts, Rows
from cachefreeze.samples import OF_ROWS, View
from cachefreeze.stores import HDF5Store, Store, StoreSpec
from cachefreeze.stores.base import beyond
from cachefreeze.stores.opening import Wanted, open_store
from cachefreeze.waiting import Waiting
from cachefreeze.watching import SampleWatch

# Stored rows that are recomputed and compared whenever an existing store is opened.
_RECOMPUTED_ROWS = 4
# Relative to the largest magnitude: rows of another batch, perhaps another kernel; a wrong row is off by far more.
_RECOMPUTED_TOLERANCE = 1e-2


@dataclass(frozen=True, kw_only=True)
class FillReport:
    """What a fill did: rows and bytes of the whole store, and how many rows were computed for it."""

    rows: int
    computed_rows: int
    nbytes: int


class StoredRows:
    """The rows of one loader's samples: how to make them, and the store that keeps them.

    Args:
        prefix: Makes rows.
        name: Of the loader.
        view: Its samples.
        where: The store, as for an Engine, or the rows of another engine over an equal prefix, whose store serves both.
        version: Rows made under another version are not reused.

    Raises:
        StoreError: The rows cannot be kept where they should be.
        StaleCacheError: What is there, or lent, is not what this prefix makes of these samples.
    """

    def __init__(
        self, prefix: FrozenPrefix, name: str, view: View, where: str | Store | StoredRows, version: str
    ) -> None:
        self.prefix = prefix
        self.name = name
        self.view = view
        self.dataset = view.dataset
        parts = prefix.parts
        self.format = format_of(parts, view, prefix.dtype)
        self.spec = StoreSpec(rows=len(view), fields=self.format.fields)
        beside = [field.name for field in self.spec.fields if field.name.startswith("field.")]
        self._revision = None if view.made_of is None else Revision(view, beside)
        stored = [str(f.dtype).removeprefix("torch.") for f in self.spec.fields if f.name.startswith("activation.")]
        attributes = {
            "model": type(parts.model).__name__,
            "boundary": parts.boundary.name,
            "name": name,
            **self.format.attributes,
        }
        wanted = Wanted(
            spec=self.spec,
            name=name,
            boundary=parts.boundary.name,
            fingerprint={**prefix.identity(), "stored": ", ".join(stored), **view.identity(), "version": version},
            attributes=attributes,
            device=prefix.device,
            beside=() if self._revision is None else (MADE_FROM,),
            of_rows=OF_ROWS,
            revision=self._revision,
        )
        self._watch = SampleWatch(view)
        self._fingerprint = wanted.fingerprint
        self.borrowed = isinstance(where, StoredRows)
        self.store = where._lent(wanted) if isinstance(where, StoredRows) else open_store(where, wanted)
        self._says = self._revision if MADE_FROM in self.store.spec.fields else None
        self._rewritten, self._stale = 0, set[int]()
        if self._says is not None and isinstance(self.store, HDF5Store):
            self._rewritten, self._stale = self._says.rewritten, set(self._says.stale)
            self.store.forget(self._says.mismatched(self.store))  # of a file that this process cannot bring up to date
        # whether it is new, or was left empty by somebody who is not writing it
        self.made = self.store.writable and self.store.count == 0 and not self.borrowed
        # also when nothing is written here: a killed process may have left rows that have not reached the disk
        self._uncommitted = True
        prefix.rows_ahead += self.spec.rows - self.store.count
        self.recompute_some()

    # --- the loader's row source ---

    def check(self) -> None:
        """Raise if stored rows would be stale: a prefix weight or buffer changed or was thawed, or the data changed."""
        self.prefix.check()
        self._watch.check(self.name)

    def in_turn(self, batches: Iterator[Sequence[int]], epoch: int) -> Iterator[Sequence[int]]:
        """The rows that stand for batches of samples in an epoch.

        Raises:
            LoaderError: They are not indices of samples.
        """
        turns = self.view.turns
        if turns is None:
            yield from batches
            return
        variant = turns.at(epoch)
        for batch in batches:
            samples = _index_within(batch, turns.samples)
            yield (samples + turns.samples * variant[samples]).tolist()

    def absent(self, rows: Sequence[int]) -> list[int]:
        """Which of ``rows`` are not stored, each once, in order.

        Raises:
            LoaderError: They are not indices of samples.
        """
        present = self.store.present(self._asked(rows)).tolist()
        if all(present):
            return []
        return list(dict.fromkeys(int(row) for row, there in zip(rows, present, strict=True) if not there))

    @property
    def settled(self) -> bool:
        """Whether no row is absent."""
        return self.store.full

    def fetch(self, rows: Sequence[int]) -> Any:
        """The raw batch of ``rows``."""
        return self.format.fetch(rows)

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """Makes the raw batch of a dataset's items; an empty list gives None."""
        return partial(_collate_some, self.format.collate)

    def compute(self, rows: Sequence[int], raw: Any) -> Computed:
        """Run the prefix over the raw batch of ``rows``; write those that no other process has or is about to write."""
        return self.make(rows, lambda: self._run_prefix(rows, raw))

    def make(self, rows: Sequence[int], how: Callable[[], Computed]) -> Computed:
        """Make ``rows`` and write those that no other process has or is about to write."""
        mine = self._claim(rows)
        with self._given_up_on_error(index_of(rows)[mine]):
            computed = how()
            self._write(mine, computed)
        return computed

    @property
    def on_disk(self) -> bool:
        """Whether it takes a while until rows come that are asked for."""
        return self.store.path is not None

    def expect(self, samples: Sequence[int], epoch: int) -> None:
        """Samples whose rows will soon be asked for."""
        for rows in self.in_turn(iter([samples]), epoch):
            self.store.expect(self._asked(rows))

    def lane(self) -> Lane | None:
        """How rows that are read ahead get to the device; None where nothing is to be sent there."""
        if self.prefix.device.type != "cuda" or self.store.tier == "device":
            return None
        return side_stream(self.prefix.device)  # needs CUDA

    def read_ahead(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Stored rows, on their way to the device. Nothing of the user's is called, collate functions least of all."""
        values = self._read(self._asked(rows))
        return {**values, **{name: send(values[name], self.prefix.device) for name in self.format.travelling}}

    def batch(
        self,
        rows: Sequence[int],
        counts: PassCounts,
        computed: Sequence[Computed],
        stored: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The user's batch for ``rows``: some were just computed, or all of them were read ahead as ``stored``."""
        index = self._asked(rows)
        repaired: list[Computed] = []
        while True:
            try:
                values = self._gather(index, [*computed, *repaired]) if stored is None else dict(stored)
                break
            except CorruptRowError as error:
                bad = list(dict.fromkeys(error.rows))
                repaired.append(self.compute(bad, self.fetch(bad)))
        made = [row for part in (*computed, *repaired) for row in part.rows]
        counts.computed += len(made)
        counts.cached += len(index) - len(made)
        counts.repaired += sum(len(part.rows) for part in repaired) + len(self._stale.intersection(made))
        counts.rewritten += self._rewritten
        self._rewritten = 0
        self._stale.difference_update(made)
        counts.kept = self.store.writable
        tensors, rest = self.format.decode(index, values, self.prefix.device)
        parts = self.prefix.parts
        made_rows = Rows(tensors, self.prefix.mode, parts, parts.boundary.tensors[0].batch_dim)
        return self.format.assemble(rest, made_rows)

    def progress(self) -> str:
        """``caching layer4: 12.3k/50k rows, 2.1/8.4 GB``; empty once the store is full."""
        if self.settled:
            return ""
        return caching_line(self.prefix.parts.boundary.name, self.store.count, self.spec.rows, self.spec.nbytes)

    # --- filling ---

    def commit(self) -> None:
        """Make what was written since the last commit durable; a cached epoch has nothing to wait for."""
        if self._uncommitted and self.store.writable:
            self.store.commit()
            self._uncommitted = False

    def fill(self, dataloader: DataLoader[Any], progress: Callable[[int], None] | None) -> FillReport:
        """Compute every absent row, in order, sharing the work with other processes that do the same.

        Raises:
            StoreError: Others have rows left that they claimed, and have written none for minutes; names them.
        """
        self.check()
        if not self.store.writable:
            raise UsageError(f"the store of {self.name!r} cannot be written by this process; let another one fill it")
        computed_rows, waiting = 0, Waiting(self.store)
        with preserved_random_state():
            while missing := self.absent(range(self.spec.rows)):
                made = self._fill_once(dataloader, missing, progress)
                computed_rows += made
                if not made:
                    self.commit()
                    waiting.wait(missing)  # the rest is being computed by others; what a dead one leaves is ours
        self.commit()
        return FillReport(rows=self.spec.rows, computed_rows=computed_rows, nbytes=self.store.nbytes)

    def _fill_once(
        self, dataloader: DataLoader[Any], missing: Sequence[int], progress: Callable[[int], None] | None
    ) -> int:
        """Compute those of ``missing`` that nobody else is computing; returns how many.

        A batch is written once the next one is decoded: a GPU computes it meanwhile, and writing is what waits for it.
        """
        size = dataloader.batch_size or 64
        lists = [missing[i : i + size] for i in range(0, len(missing), size)]
        computed_rows = 0
        made: tuple[Tensor, Computed] | None = None
        try:
            for rows, raw in zip(lists, worker_loader(dataloader, self, lists), strict=True):
                self._write_made(made, progress)
                made = None
                mine = self._claim(rows)
                computed_rows += int(mine.sum())
                if bool(mine.any()):
                    with self._given_up_on_error(index_of(rows)[mine]):
                        made = mine, self._run_prefix(rows, raw)
            self._write_made(made, progress)
            made = None
        finally:
            if made is not None:  # writing it failed, or decoding the next one
                self.store.release(index_of(made[1].rows)[made[0]])
        return computed_rows

    def _write_made(self, made: tuple[Tensor, Computed] | None, progress: Callable[[int], None] | None) -> None:
        """Write the rows of a batch that are for this process to write."""
        if made is None:
            return
        mine, computed = made
        self._write(mine, computed)
        if progress is not None:
            progress(int(mine.sum()))

    def _lent(self, wanted: Wanted) -> Store:
        """The store of these rows, for others that are the same."""
        lines = difference(self._fingerprint, wanted.fingerprint)
        if lines or self.spec != wanted.spec:
            raise StaleCacheError(
                f"the rows of {self.name!r} cannot be shared with this engine, these differ: "
                f"{'; '.join(lines) or 'the fields of a row'}. Engines share rows of equal frozen weights, samples and "
                "settings; give this one a store of its own"
            )
        return self.store

    # --- inside ---

    def _asked(self, rows: Sequence[int]) -> Tensor:
        """(n,) int64 indices of rows; LoaderError where they are none."""
        return _index_within(rows, self.spec.rows)

    def _claim(self, rows: Sequence[int]) -> Tensor:
        """(n,) bool: which of ``rows`` are for this process to write."""
        if not self.store.writable:
            return torch.zeros(len(rows), dtype=torch.bool)
        return self.store.claim(index_of(rows))

    @contextmanager
    def _given_up_on_error(self, index: Tensor) -> Iterator[None]:
        """Another process may take rows that this one claimed and could not make."""
        try:
            yield
        except BaseException:
            self.store.release(index)
            raise

    def _write(self, mine: Tensor, computed: Computed) -> None:
        index = index_of(computed.rows)[mine]
        if len(index):
            self._uncommitted = True
            whole = len(index) == len(computed.rows)
            values = {n: v if whole else v[mine.to(v.device)] for n, v in computed.values.items()}
            self.store.write(index, {**values, **self._made_from(index, values)})

    def _run_prefix(self, rows: Sequence[int], raw: Any, *, exact: bool = False) -> Computed:
        example = self.format.example(rows, raw)
        run = self.prefix.exact if exact else self.prefix.run
        tensors = run(example, len(rows))
        values = self.format.encode(rows, raw, tensors)
        if self._says is not None:
            values[MADE_FROM.name] = torch.stack([self._says.keys[list(rows)], input_digests(example, len(rows))], 1)
        return Computed(tuple(rows), values)

    def _made_from(self, index: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What rows were made from, where that is stored and not among their values: not from their samples."""
        if self._says is None or MADE_FROM.name in values:
            return {}
        keys = self._says.keys[index]
        return {MADE_FROM.name: torch.stack([keys, torch.zeros_like(keys)], 1)}

    def _read(self, index: Tensor) -> dict[str, Tensor]:
        """Stored rows; one that somebody has brought up to date with other samples meanwhile counts as damaged."""
        values = self.store.read(index)
        if self._says is not None:
            others = index[values[MADE_FROM.name][:, 0] != self._says.keys[index]]
            if len(others):
                self.store.forget(others)
                raise CorruptRowError(f"row {int(others[0])} is of another sample by now", rows=others.tolist())
        return values

    def _gather(self, index: Tensor, computed: Sequence[Computed]) -> dict[str, Tensor]:
        """Rows from the store; those that it does not keep from where they were computed."""
        if self.settled or bool(self.store.present(index).all()):
            return self._read(index)
        place = {row: (part, i) for part in computed for i, row in enumerate(part.rows)}
        wanted = index.tolist()
        stored = [i for i, row in enumerate(wanted) if row not in place]
        read = self._read(index[stored])
        result = {}
        for field in self.spec.fields:
            fresh = torch.zeros(field.batch_shape(index), dtype=field.dtype, device=self.store.device)
            ragged = field.lengths is not None
            some = fresh[:, : read[field.name].shape[1]] if ragged else fresh
            some[torch.tensor(stored, dtype=torch.int64)] = read[field.name]
            for i, row in enumerate(wanted):
                if row in place:
                    part, position = place[row]
                    value = part.values[field.name][position]
                    if ragged:  # as wide as the batch it was computed in, zero after its own content
                        fresh[i, : len(value)] = value[: fresh.shape[1]]
                    else:
                        fresh[i] = value
            result[field.name] = fresh
        return result

    def recompute_some(self) -> None:
        """Recompute a few stored rows and compare: the last check that a reused store is what it claims to be."""
        present = torch.nonzero(self.store.present(torch.arange(self.spec.rows))).flatten()
        if not len(present):
            return
        chosen = torch.unique(present[torch.linspace(0, len(present) - 1, _RECOMPUTED_ROWS).round().long()])
        try:
            stored = self._read(chosen)
        except CorruptRowError:
            return  # now absent: the loader computes them again and counts them as repaired
        computed = self._run_prefix(chosen.tolist(), self.fetch(chosen.tolist()), exact=True)
        self._check_inputs(chosen, stored, computed)
        for field in self.spec.fields:
            a, b = stored[field.name], computed.values[field.name].to(stored[field.name].device)
            b = b if field.lengths is None else b[:, : a.shape[1]]  # computed ones are as wide as their batch
            if torch.equal(a, b):
                continue
            off = float((a.double() - b.double()).abs().max())
            largest = float(b.double().abs().max())
            allowed = (_RECOMPUTED_TOLERANCE + self.prefix.tolerance) * max(largest, 1e-6)
            if not field.dtype.is_floating_point or not off <= allowed:
                raise self._unseen(f"{field.name} of samples {chosen.tolist()}", f" (by up to {off:.2g})")

    def _check_inputs(self, chosen: Tensor, stored: Mapping[str, Tensor], computed: Computed) -> None:
        if self._says is not None:
            was, now = stored[MADE_FROM.name][:, 1], computed.values[MADE_FROM.name][:, 1]
            other = chosen[(was != now) & (was != 0)]
            if len(other):
                raise self._unseen(f"what the model consumes of samples {other.tolist()}", "")

    def _unseen(self, what: str, how: str) -> StaleCacheError:
        return StaleCacheError(
            f"the cache of {self.name!r} matches by fingerprint, but {what} differs from what is computed now{how}: "
            "the data changed in a way that no fingerprint sees. Remove the file, or pass version= to the loader"
        )


def _collate_some(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    return collate(samples) if samples else None


def index_of(rows: Sequence[int]) -> Tensor:
    """Row indices as the store takes them; a third of what ``torch.as_tensor`` costs on a list.

    Raises:
        LoaderError: They are keys, or more than an index: what a sampler yields is of one kind, so the first shows it.
    """
    try:
        if len(rows):
            operator.index(rows[0])  # numpy would make an integer of '7' and of 1.5
        return torch.from_numpy(np.fromiter(rows, np.int64, len(rows)))
    except (TypeError, ValueError) as error:
        key = next((row for row in rows if not hasattr(row, "__index__")), rows[0])
        raise LoaderError(
            f"the sampler asked for sample {key!r}: expected an index, 0 to len(dataset) - 1, since a row belongs to "
            "one index and to nothing beside it; map keys to indices in the dataset, and change samples (their size, "
            "say) behind the boundary or not at all"
        ) from error


def _index_within(asked: Sequence[int], samples: int) -> Tensor:
    """(n,) int64: what a sampler asks for of a dataset.

    Raises:
        LoaderError: They are no indices, or beyond the dataset.
    """
    index = index_of(asked)
    if len(index) and beyond(index, samples):
        wrong = next(one for one in index.tolist() if not 0 <= one < samples)
        raise LoaderError(
            f"the sampler asked for sample {wrong} of a dataset of {samples}: expected 0 to {samples - 1}, since a "
            "row belongs to one index; correct the sampler, or make the loader after the dataset has grown"
        )
    return index
