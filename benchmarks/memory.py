"""Does the peak of resident memory grow with the rows of an HDF5 store? A run over 1 GB and one over 10 GB.

Each size is filled and trained on, and then trained on from the file that is there, in processes of their own, in a
block-shuffled order. What the kernel reports at their ends is printed; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import finish
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import cachefreeze as cf
from cachefreeze.machine import load_average, made_on

ROW_BYTES = 64 << 10
BATCH = 64
BLOCK = 256  # rows: 16 MiB
PEAKS = ("peak_resident_bytes", "peak_anonymous_bytes")


class Numbers(Dataset):
    """Samples that take no memory: what is in a row follows from its index."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        values = torch.tensor(indices, dtype=torch.float32)[:, None] * torch.arange(1.0, 17)
        return [(row, index % 10) for row, index in zip(values.sin(), indices, strict=True)]


class Sampled:
    """The largest anonymous resident memory, looked at fifty times a second."""

    def __enter__(self) -> Sampled:
        self.largest = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            self.largest = max(self.largest, status("RssAnon"))

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()


def status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def child(folder: str, rows: int, epochs: int) -> dict[str, Any]:
    """Train over the store in ``folder``, which is filled on the way where it is empty."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    width = ROW_BYTES // 4
    model = nn.Sequential(nn.Linear(16, width), nn.Linear(width, 10))
    cf.freeze(model, train_from="1")
    engine = cf.Engine(model, store=f"hdf5:{folder}")
    numbers = Numbers(rows)
    train = engine.loader(DataLoader(numbers, BATCH, sampler=cf.BlockShuffleSampler(numbers, BLOCK)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds, sources = [], []
    with Sampled() as sampled:
        for _ in engine.epochs(epochs):
            began = time.perf_counter()
            for x, y in train:
                optimizer.zero_grad()
                functional.cross_entropy(engine(x), y).backward()
                optimizer.step()
            seconds.append(time.perf_counter() - began)
            sources.append(train.source)
    engine.close()
    return {
        "peak_resident_bytes": status("VmHWM"),
        "peak_anonymous_bytes": sampled.largest,
        "seconds": seconds,
        "sources": sources,
    }


def measure(sizes: Sequence[int], place: Path | None, earlier: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All sizes, each filled in one process and read in a second; ``earlier`` are runs of other sizes."""
    before, runs = load_average(), [run for run in earlier if run["store_bytes"] not in sizes]
    for size_bytes in sizes:
        rows = size_bytes // ROW_BYTES
        with tempfile.TemporaryDirectory(prefix="cachefreeze-memory-", dir=place) as folder:
            found: dict[str, Any] = {"store_bytes": size_bytes, "rows": rows}
            for phase in ("filled", "reopened"):
                command = [sys.executable, __file__, "--child", folder, str(rows), "2" if phase == "filled" else "1"]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[phase] = json.loads(done.stdout.splitlines()[-1])
        runs.append(found)
        print(table(runs[-1:]), flush=True)
    runs.sort(key=lambda run: run["store_bytes"])
    first, last = runs[0], runs[-1]
    return {
        "schema": 1,
        "benchmark": "memory",
        "config": {"row_bytes": ROW_BYTES, "batch": BATCH, "block": BLOCK},
        **made_on(before),
        "runs": runs,
        "largest_to_smallest": {
            phase: {what: last[phase][what] / first[phase][what] for what in PEAKS} for phase in ("filled", "reopened")
        },
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """One line a phase."""
    return "\n".join(
        f"{run['store_bytes'] / 1e9:6.2f} GB {phase:9} peak {of['peak_resident_bytes'] / 1e6:7.0f} MB resident, "
        f"{of['peak_anonymous_bytes'] / 1e6:6.0f} MB of it anonymous; "
        + ", ".join(f"{took:.1f} s {source}" for took, source in zip(of["seconds"], of["sources"], strict=True))
        for run in runs
        for phase, of in (("filled", run["filled"]), ("reopened", run["reopened"]))
    )


def main() -> int:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 10], help="of rows; smallest first")
    parser.add_argument("--dir", type=Path, help="where the files are made; they are removed")
    parser.add_argument("--smoke", action="store_true", help="megabytes: does it run?")
    parser.add_argument("--out", type=Path, help="results file; runs of other sizes that it holds are kept")
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "ROWS", "EPOCHS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, rows, epochs = args.child
        print(json.dumps(child(folder, int(rows), int(epochs))))
        return 0
    sizes = [int(1e9 * size) for size in ([0.02, 0.04] if args.smoke else args.gigabytes)]
    held = json.loads(args.out.read_text())["runs"] if args.out is not None and args.out.exists() else []
    found = measure(sizes, args.dir, held)
    print(found["largest_to_smallest"])
    finish(found, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
