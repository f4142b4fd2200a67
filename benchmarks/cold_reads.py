"""At what rate does a cached pass read an HDF5 file that is not in memory? Beside reading the file from end to end.

Each round throws the file out of the page cache before every pass, and opens it anew, so that every row's checksum is
compared. Passes are of `engine.loader` without a training step. The method is in benchmarks/README.md; the last line is
one JSON object.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import config_parser, configured, finish
from memory import Numbers
from torch import nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler

import cachefreeze as cf
from cachefreeze.machine import load_average, made_on
from cachefreeze.timings.rounds import in_turn

_SCAN_BYTES = 8 << 20


@dataclass(frozen=True)
class Config:
    row_bytes: int = 75 << 10
    megabytes: int = 2048
    batch_size: int = 64
    block_megabytes: int = 16
    mixed: int = 4
    rounds: int = 5
    folder: str = ""


class Made(nn.Module):
    """A frozen part that makes rows of any width of sixteen numbers, and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.head = nn.Linear(16, width), nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.wide(x))


class Throwing:
    """A file, out of memory before each pass over it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        self._size_bytes = os.fstat(self._fd).st_size

    def rate(self, whole_pass: Callable[[], int]) -> dict[str, float]:
        """Bytes a second of what a pass says it took, and the share of them that came from the disk."""
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_inblock, time.perf_counter()
        taken_bytes = whole_pass()
        seconds = time.perf_counter() - began
        blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before
        return {"bytes_a_second": taken_bytes / seconds, "from_disk": 512 * blocks / taken_bytes}

    def scan(self) -> int:
        """Read from end to end in large pieces."""
        place, done = bytearray(_SCAN_BYTES), 0
        while done < self._size_bytes:
            done += os.preadv(self._fd, [place], done)
        return done


def measure(config: Config, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Made(config.row_bytes // 4)
    cf.freeze(model, train_from="head")
    numbers = Numbers(config.megabytes * 2**20 // config.row_bytes)
    block = max(1, config.block_megabytes * 2**20 // config.row_bytes)

    def loader(sampler: Iterable[int]) -> tuple[cf.Engine, Any]:
        engine = cf.Engine(model, store=f"hdf5:{folder}")
        return engine, engine.loader(DataLoader(numbers, config.batch_size, sampler=sampler))

    engine, batches = loader(SequentialSampler(numbers))
    assert engine.cache is not None
    engine.cache.fill(batches)
    engine.close()
    (path,) = folder.glob("*.h5")
    file = Throwing(path)

    def of_rows(sampler: Sampler[int]) -> dict[str, float]:
        engine, batches = loader(sampler)
        iter(batches)  # what a first pass does once is no reading

        def whole_pass() -> int:
            return sum(rows.tensors[0].nbytes for rows, _ in batches)

        found = file.rate(whole_pass)
        assert batches.source == "cached"
        engine.close()
        return found

    ways: dict[str, Callable[[], dict[str, float]]] = {
        "end to end": lambda: file.rate(file.scan),
        "in order": lambda: of_rows(SequentialSampler(numbers)),
        "blocks": lambda: of_rows(cf.BlockShuffleSampler(numbers, block, config.mixed)),
        "random": lambda: of_rows(torch.utils.data.RandomSampler(numbers)),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(config.rounds):
        for name in in_turn(list(ways), number):
            found[name].append(ways[name]())
    scans = [one["bytes_a_second"] for one in found["end to end"]]
    return {
        name: {
            "rounds": runs,
            "bytes_a_second": statistics.median(one["bytes_a_second"] for one in runs),
            "to_end_to_end": statistics.median(
                one["bytes_a_second"] / scan for one, scan in zip(runs, scans, strict=True)
            ),
            "from_disk": statistics.median(one["from_disk"] for one in runs),
        }
        for name, runs in found.items()
    }


def main() -> int:
    args = config_parser(__doc__, Config).parse_args()
    config = configured(Config, args, {"row_bytes": 4096, "megabytes": 4, "block_megabytes": 1, "rounds": 2})
    before = load_average()
    with tempfile.TemporaryDirectory(prefix="cachefreeze-cold-", dir=config.folder or None) as folder:
        ways = measure(config, Path(folder))
    for name, of in ways.items():
        print(
            f"{name:10} {of['bytes_a_second'] / 1e6:6.0f} MB/s, {of['to_end_to_end']:.2f} of end to end; "
            f"{of['from_disk']:.0%} of the bytes came from the disk"
        )
    finish(
        {"schema": 1, "benchmark": "cold_reads", "config": asdict(config), **made_on(before), "ways": ways}, args.out
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
