"""What do safe rows cost? Random batches and fills of the HDF5 store beside memory, and beside other ways to keep rows.

Every way holds the same float32 rows and returns a batch as one torch tensor of its own; its pages are in memory.
Rounds are interleaved, ratios are medians of the ratio within a round; see README.md. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from common import finish
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cachefreeze.machine import load_average, made_on
from cachefreeze.stores import FieldSpec, HDF5Store, HostStore, Store, StoreSpec
from cachefreeze.stores.hdf5 import SYNC_BYTES

NAME = "activation.0"
Read = Callable[[Tensor], Tensor]
# The slowest ways leave after some rounds: they are orders of magnitude away, and nobody waits for a third digit.
_LEAST_ROUNDS, _SECONDS = 5, 2.0


@dataclass(frozen=True)
class Size:
    """Rows of one size: how many of them, and how many a batch takes."""

    row_bytes: int
    rows: int
    batch: int

    @property
    def width(self) -> int:
        return self.row_bytes // 4

    @property
    def spec(self) -> StoreSpec:
        field = FieldSpec(name=NAME, shape=(self.width,), dtype=torch.float32)
        return StoreSpec(rows=self.rows, fields=(field,))

    def data(self) -> Tensor:
        return torch.randn(self.rows, self.width, generator=torch.Generator().manual_seed(0))


SIZES = [Size(512, 100_000, 256), Size(5 << 10, 20_000, 256), Size(75 << 10, 1500, 256), Size(400 << 10, 300, 64)]
SMOKE = [Size(512, 600, 32), Size(5 << 10, 300, 32)]


def of_store(store: Store) -> Read:
    return lambda index: store.read(index)[NAME]


def filled(store: Store, data: Tensor) -> Store:
    for rows in torch.arange(len(data)).split(256):
        store.write(rows, {NAME: data[rows]})
    return store


def readers(size: Size, folder: Path) -> Iterator[tuple[str, Read]]:
    """Each way, with its data in place. Other packages where they are installed."""
    data = size.data()
    array = data.numpy()
    yield "host store", of_store(filled(HostStore(size.spec), data))
    filled(HDF5Store.create(folder / "rows.h5", size.spec, fingerprint={}), data).close()
    for name, options in (
        ("hdf5, verify=first", {}),
        ("hdf5, verify=always", {"verify": "always"}),
        ("hdf5, verify=never", {"verify": "never"}),
        ("hdf5, io=pread", {"io": "pread"}),
    ):
        yield name, of_store(HDF5Store.open(folder / "rows.h5", writable=False, **options))
    yield from _array_readers(folder, array)
    yield from _sample_readers(folder, data)


def _array_readers(folder: Path, array: np.ndarray) -> Iterator[tuple[str, Read]]:
    np.save(folder / "rows.npy", array)
    mapped = np.load(folder / "rows.npy", mmap_mode="r")
    yield "numpy.memmap", lambda index: torch.from_numpy(mapped[index.numpy()])

    with h5py.File(folder / "contiguous.h5", "w") as file:
        file["x"] = array
    with h5py.File(folder / "chunked.h5", "w") as file:
        file.create_dataset("x", data=array, chunks=(1, array.shape[1]))
    for kind in ("contiguous", "chunked"):
        rows = h5py.File(folder / f"{kind}.h5", "r")["x"]
        yield f"h5py {kind}", lambda index, rows=rows: _sorted_selection(rows, index)

    if (zarr := _optional("zarr")) is not None:
        chunk = max(1, (1 << 20) // array[0].nbytes)
        rows = zarr.create_array(
            str(folder / "rows.zarr"), shape=array.shape, chunks=(chunk, array.shape[1]), dtype="f4"
        )
        rows[:] = array
        yield "zarr", lambda index, rows=rows: torch.from_numpy(rows.oindex[index.numpy()])


def _sample_readers(folder: Path, data: Tensor) -> Iterator[tuple[str, Read]]:
    save_file({"x": data}, folder / "rows.safetensors")
    rows = safe_open(folder / "rows.safetensors", "pt").get_slice("x")
    yield "safetensors", lambda index: torch.cat([rows[row : row + 1] for row in index.tolist()])

    if (lmdb := _optional("lmdb")) is not None:
        environment = lmdb.open(str(folder / "lmdb"), map_size=4 * data.nbytes + (1 << 26))
        with environment.begin(write=True) as transaction:
            for row, value in enumerate(data):
                transaction.put(row.to_bytes(4, "big"), value.numpy().tobytes())

        def from_lmdb(index: Tensor) -> Tensor:
            with environment.begin(buffers=True) as transaction:
                found = [np.frombuffer(transaction.get(row.to_bytes(4, "big")), "<f4") for row in index.tolist()]
                return torch.from_numpy(np.stack(found))

        yield "LMDB", from_lmdb

    (folder / "samples").mkdir()
    some = min(len(data), 4000)  # a file each: more of them say nothing more
    for row in range(some):
        torch.save(data[row].clone(), folder / "samples" / f"{row}.pt")
    yield (
        "one .pt a sample",
        lambda index: torch.stack(
            [torch.load(folder / "samples" / f"{row % some}.pt", weights_only=True) for row in index.tolist()]
        ),
    )


def _sorted_selection(rows: h5py.Dataset, index: Tensor) -> Tensor:
    """h5py wants ascending indices, none twice."""
    distinct, place = np.unique(index.numpy(), return_inverse=True)
    return torch.from_numpy(rows[distinct][place])


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def reading(size: Size, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds a batch of each way, and its speed beside the host store's."""
    ways = dict(readers(size, folder))
    generator = torch.Generator().manual_seed(1)
    for name, way in ways.items():  # what was just written is in memory; here every row is verified once
        parts = torch.arange(size.rows).split(256)
        for rows in parts if "hdf5" in name else parts[:2]:
            way(rows)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for at in range(rounds):
        for place in torch.randperm(len(ways), generator=generator).tolist():
            name = list(ways)[place]
            if at >= _LEAST_ROUNDS and sum(seconds[name]) > _SECONDS:
                continue
            # rows of its own: those that another way has just read from the same file are in the processor's cache
            index = torch.randint(0, size.rows, (size.batch,), generator=generator)
            started = time.perf_counter()
            batch = ways[name](index)
            seconds[name].append(time.perf_counter() - started)
            assert batch.shape == (size.batch, size.width)
    host, gather = seconds["host store"], seconds["hdf5, verify=never"]
    return {
        name: {
            "median_us": 1e6 * statistics.median(taken),
            "rounds": len(taken),
            "speed_to_host": statistics.median(h / t for h, t in zip(host, taken, strict=False)),
            "us_a_row_over_gather": 1e6
            * statistics.median(t - g for t, g in zip(taken, gather, strict=False))
            / size.batch,
        }
        for name, taken in seconds.items()
    }


def filling(size: Size, folder: Path, rounds: int) -> dict[str, Any]:
    """Rows a second of a fill, in order and shuffled, beside a bare ``pwrite`` loop of the same rows."""
    data = size.data()
    found: dict[str, Any] = {}
    for order in ("in order", "shuffled"):
        pairs = []
        for at in range(rounds):
            rows = torch.arange(size.rows) if order == "in order" else torch.randperm(size.rows)
            ways = [_fill_store, _fill_bare]
            taken = {way: way(size, folder, data, rows) for way in (ways if at % 2 else reversed(ways))}
            pairs.append((taken[_fill_store], taken[_fill_bare]))
        found[order] = {
            "rows_a_second": size.rows / statistics.median(store for store, _ in pairs),
            "bare_rows_a_second": size.rows / statistics.median(bare for _, bare in pairs),
            "speed_to_bare": statistics.median(bare / store for store, bare in pairs),
        }
    return found


def _fill_store(size: Size, folder: Path, data: Tensor, rows: Tensor) -> float:
    path = folder / "filled.h5"
    store = HDF5Store.create(path, size.spec, fingerprint={})
    started = time.perf_counter()
    for batch in rows.split(size.batch):
        store.write(batch, {NAME: data[batch]})
    store.commit()
    seconds = time.perf_counter() - started
    store.close()
    path.unlink()
    return seconds


def _fill_bare(size: Size, folder: Path, data: Tensor, rows: Tensor) -> float:
    path = folder / "bare"
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    os.posix_fallocate(fd, 0, data.nbytes)
    os.fsync(fd)
    started, unsynced_bytes = time.perf_counter(), 0
    for batch in rows.split(size.batch):
        values = data[batch].numpy()
        for row, value in zip(batch.tolist(), values, strict=True):
            os.pwrite(fd, value.data, row * size.row_bytes)
        unsynced_bytes += values.nbytes
        if unsynced_bytes >= SYNC_BYTES:
            os.fdatasync(fd)
            unsynced_bytes = 0
    os.fdatasync(fd)
    seconds = time.perf_counter() - started
    os.close(fd)
    path.unlink()
    return seconds


def measure(sizes: list[Size], rounds: int, fills: int, place: Path | None) -> dict[str, Any]:
    """All sizes, one after another, each in a folder of its own."""
    before, found = load_average(), []
    for size in sizes:
        folder = Path(tempfile.mkdtemp(prefix="cachefreeze-speed-", dir=place))
        try:
            found.append(
                {
                    "row_bytes": size.row_bytes, "rows": size.rows, "batch": size.batch,
                    "reading": reading(size, folder, rounds), "filling": filling(size, folder, fills),
                }
            )  # fmt: skip
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(table(found[-1:]), flush=True)
    return {
        "schema": 1,
        "benchmark": "store_speed",
        "config": {"rounds": rounds, "fills": fills},
        **made_on(before, packages=("zarr", "lmdb")),
        "sizes": found,
    }


def table(sizes: list[dict[str, Any]]) -> str:
    """One paragraph a row size."""
    lines = []
    for size in sizes:
        lines.append(f"rows of {size['row_bytes']:,} B, batches of {size['batch']}")
        lines.append(f"  {'reading':22} {'µs a batch':>11} {'/host':>7} {'µs a row over gather':>21}")
        for name, row in size["reading"].items():
            over = row["us_a_row_over_gather"]
            lines.append(f"  {name:22} {row['median_us']:>11.0f} {row['speed_to_host']:>7.2f} {over:>21.2f}")
        for order, row in size["filling"].items():
            lines.append(
                f"  filling {order}: {row['rows_a_second']:,.0f} rows a second, {row['speed_to_bare']:.2f} of bare"
            )
    return "\n".join(lines)


def main() -> int:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="batches of each way")
    parser.add_argument("--fills", type=int, default=5, help="fills of each way and order")
    parser.add_argument("--dir", type=Path, help="where the files are made")
    parser.add_argument("--smoke", action="store_true", help="small and short: does it run?")
    parser.add_argument("--out", type=Path, help="keep the JSON object in this file")
    args = parser.parse_args()
    found = measure(SMOKE, 3, 1, args.dir) if args.smoke else measure(SIZES, args.rounds, args.fills, args.dir)
    finish(found, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
