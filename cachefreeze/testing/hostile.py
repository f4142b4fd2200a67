"""Cache files that were damaged, cut, or made to do harm."""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cachefreeze.errors import CacheFreezeError, CorruptStoreError
from cachefreeze.stores.file import open_regular, read_header, read_layout
from cachefreeze.stores.hdf5 import HDF5Store
from cachefreeze.stores.layout import HEADER_BYTES, Layout, data_regions
from cachefreeze.testing.judge import Truth, judge_file, torture_spec

_SECTOR_BYTES = 512
_OPEN_SECONDS = 0.1
_OPEN_BYTES = 64 << 20

_ODD: list[Any] = [
    None, True, -1, 0, 1, 1.5, 2**31, 2**32, 2**63, 2**70, 4096, 65536, "", "a", "commit", "float32", [], {},
    [0], [1], [2**62] * 31, [1] * 32, {"a": 1}, {"a": "\ud800"}, "0" * 64, "\ud800",
]  # fmt: skip
_TEXTS = ["", "[" * 60_000, "{}", "null", "1" * 5000, '{"rows":NaN}', '{"rows":1,"rows":2}', '"\\ud800"', "\xff"]


def full_file(path: Path, truth: Truth) -> Layout:
    """Make a cache with every row written; where everything lies in it."""
    store = HDF5Store.create(path, truth.spec, fingerprint={"weights": "abc"})
    everything = torch.arange(truth.spec.rows)
    store.write(everything, truth.batch(everything))
    store.close()
    fd, _ = open_regular(path, os.O_RDONLY)
    try:
        return read_layout(fd, path)[0]
    finally:
        os.close(fd)


def bit_flips(folder: Path, flips: int, rng: random.Random) -> Counter[str]:
    """Flip one bit at a time, ``flips`` times in each of header, HDF5 metadata, commit table and data.

    Raises:
        AssertionError: A flip went unnoticed.
    """
    truth = Truth(torture_spec(24))
    path = folder / "flipped.h5"
    layout = full_file(path, truth)
    table, *data = data_regions(layout.spec, layout.offsets, layout.commit_offset)
    regions = {"header": [(0, HEADER_BYTES)], "metadata": layout.gaps, "table": [table], "data": data}
    counts: Counter[str] = Counter()
    with path.open("r+b", buffering=0) as file:
        for name, spans in regions.items():
            for _ in range(flips):
                start, size = rng.choices(spans, [size for _, size in spans])[0]
                offset, bit = start + rng.randrange(size), rng.randrange(8)
                _flip(file.fileno(), offset, bit)
                try:
                    found = judge_file(path, truth, [{0, None}] * truth.spec.rows)
                    assert name in ("table", "data"), f"bit {bit} of byte {offset} ({name}) went unnoticed"
                    assert found["right"] == truth.spec.rows - 1, f"bit {bit} of byte {offset} cost {found}"
                except CorruptStoreError:
                    assert name in ("header", "metadata"), f"bit {bit} of byte {offset} ({name}) cost the whole file"
                _flip(file.fileno(), offset, bit)
                counts[name] += 1
    judge_file(path, truth, [{0}] * truth.spec.rows)
    return counts


def _flip(fd: int, offset: int, bit: int) -> None:
    os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ (1 << bit)]), offset)


def sizes(folder: Path) -> Counter[str]:
    """Cut a file at every sector, and let it grow by as many.

    Raises:
        AssertionError: Another size went unnoticed.
    """
    truth = Truth(torture_spec(24))
    path = folder / "cut.h5"
    whole = full_file(path, truth).file_bytes
    content = path.read_bytes()
    counts: Counter[str] = Counter()
    for size in [*range(0, 2 * whole, _SECTOR_BYTES), whole - 1, whole + 1]:
        if size == whole:
            continue
        path.write_bytes(content[:size].ljust(size, b"\0"))
        for call in (HDF5Store.open, read_header):
            try:
                call(path)
            except CorruptStoreError:
                counts["cut" if size < whole else "grown"] += 1
            else:
                raise AssertionError(f"{size} bytes instead of {whole} went unnoticed")
    return counts


def malformed_headers(folder: Path, count: int, rng: random.Random) -> Counter[str]:
    """Open files whose header says anything at all, with a valid CRC, and use what opens.

    Raises:
        AssertionError: Another exception than the package's own, more than 0.1 s, or more than 64 MiB.
    """
    truth = Truth(torture_spec(24))
    path = folder / "malformed.h5"
    full_file(path, truth)
    good = path.read_bytes()
    tree = json.loads(good[16 : 16 + struct.unpack_from("<I", good, 12)[0]])
    counts: Counter[str] = Counter()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with path.open("r+b", buffering=0) as file:
        for text in _texts(tree, count, rng):
            raw = text.encode("latin-1", "replace")[: 65532 - 16]
            length = rng.choice([len(raw)] * 6 + [0, len(raw) + 1, 65516, 65517, 2**32 - 1])
            block = (good[:12] + struct.pack("<I", length) + raw).ljust(65532, b"\0")
            os.pwrite(file.fileno(), block + struct.pack("<I", zlib.crc32(block)), 0)
            for use in (read_header, _use_all):
                counts[_used(use, path)] += 1
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib * 1024 <= _OPEN_BYTES, f"opening took {grown_kib:,} KiB more"
    return counts


def _used(use: Callable[[Path], object], path: Path) -> str:
    started = time.process_time()
    result = "refused"
    with suppress(CacheFreezeError):
        use(path)
        result = "as good"  # another attribute, or another dtype of the same size
    seconds = time.process_time() - started
    assert seconds < _OPEN_SECONDS, f"{use} took {seconds:.2f} s"
    return result


def _texts(tree: dict[str, Any], count: int, rng: random.Random) -> Iterator[str]:
    yield from _TEXTS[:count]
    for _ in range(count - len(_TEXTS)):
        copy = json.loads(json.dumps(tree))
        where, key = copy, rng.choice(list(copy))
        if key == "fields" and rng.random() < 0.8:
            where = rng.choice(copy["fields"])
            key = rng.choice(list(where))
        kind = rng.random()
        if kind < 0.7:
            where[key] = rng.choice(_ODD)
        elif kind < 0.8:
            del where[key]
        elif kind < 0.9:
            where["more"] = 1
        else:
            copy["fields"] = copy["fields"] * rng.choice([0, 2, 100])
        yield json.dumps(copy)


def _use_all(path: Path) -> None:
    store = HDF5Store.open(path, writable=False)
    try:
        store.verify()
        store.read(store.present(torch.arange(store.spec.rows)).nonzero()[:, 0])
    finally:
        store.close()
