"""How long does the HDF5 store keep its promises? Kills, power cuts, faults, damage; stops at the first wrong row.

Each round runs every trial once, so that whatever time there is goes to all of them, until each has reached the long
column of the table or the minutes are over. The last line is one JSON object; ``--out`` keeps it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch
from common import finish

from cachefreeze.machine import load_average, made_on
from cachefreeze.testing import faults, hostile, powercuts, torture

ALL = 1  # trials that are exhaustive in one round


@dataclass
class Trial:
    """One row of the table.

    Attributes:
        run: Folder and random numbers -> what it counted.
        unit: The count that is held against ``target``.
        target: The long column.
        in_memory: Whether the folder may lie in memory: where a power cut or a fault is simulated.
    """

    name: str
    run: Callable[[Path, random.Random], Counter[str]]
    unit: str
    target: int
    in_memory: bool = True
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        return self.counts[self.unit] >= self.target


def trials(smoke: bool) -> list[Trial]:
    """The rows of the table that can be repeated at will, each in portions of about ten seconds."""
    few = 20 if smoke else 1

    def flips(folder: Path, rng: random.Random) -> Counter[str]:
        return hostile.bit_flips(folder, 1000 // few, rng)

    return [
        Trial("kill -9 during a fill", lambda f, r: torture.kill_fills(f, 100 // few, r), "kills", 5000, False),
        Trial("kill -9 in a correction", lambda f, r: torture.kill_corrections(f, 100 // few, r), "kills", 5000, False),
        Trial("kill -9 during creation", lambda f, r: torture.kill_creations(f, 100 // few, r), "kills", 2000, False),
        Trial("power cuts", lambda f, r: powercuts.power_cuts(f, 2000 // few, r), "states", 1_000_000),
        Trial("every call fails, every way", lambda f, r: faults.failing_calls(f), "pwrite", ALL),
        Trial("bit flips per region", flips, "data", 25_000),
        Trial("cut and grown at every sector", lambda f, r: hostile.sizes(f), "cut", ALL),
        Trial(
            "malformed headers", lambda f, r: hostile.malformed_headers(f, 10_000 // few, r), "headers", 1_000_000
        ),
        Trial(
            "4 fillers, 16 readers, kills (s)",
            lambda f, r: torture.fillers_and_readers(f, 0 if smoke else 20, r),
            "elapsed", 3600, False,
        ),
    ]  # fmt: skip


def run_all(minutes: float, seed: int, smoke: bool) -> dict[str, Any]:
    """Run the trials, round after round.

    Raises:
        AssertionError: A promise was broken; the message says which row.
    """
    rows, load_before = trials(smoke), load_average()
    started, rounds = time.monotonic(), 0
    while rounds == 0 or (time.monotonic() - started < 60 * minutes and not all(trial.done for trial in rows)):
        for trial in rows:
            late = rounds > 0 and time.monotonic() - started > 60 * minutes
            if not late and not (rounds and trial.done):
                _once(trial, random.Random(f"{seed} {rounds} {trial.name}"))
        rounds += 1
        print(f"round {rounds}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return {
        "schema": 1,
        "benchmark": "store_torture",
        "config": {"minutes": minutes, "seed": seed, "smoke": smoke},
        **made_on(load_before),
        "rounds": rounds,
        "seconds": round(time.monotonic() - started, 1),
        "broken": 0,
        "trials": {
            trial.name: {
                **trial.counts, "unit": trial.unit, "target": trial.target, "seconds": round(trial.seconds, 1)
            }
            for trial in rows
        },
    }  # fmt: skip


def _once(trial: Trial, rng: random.Random) -> None:
    shm = Path("/dev/shm")
    place = shm if trial.in_memory and os.access(shm, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="cachefreeze-torture-", dir=place))
    started = time.monotonic()
    try:
        found = trial.run(folder, rng)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - started
    found["elapsed"] = ceil(seconds)
    found["headers"] = (found["refused"] + found["as good"]) // 2  # each is opened in two ways
    trial.counts.update(found)  # a sum would drop what was zero
    trial.seconds += seconds


def table(found: dict[str, Any]) -> str:
    """One line a trial: what was done, and what was wanted in the long run."""
    lines = [f"{'trial':34} {'done':>10} {'long column':>12} {'s':>7}   counted"]
    for name, row in found["trials"].items():
        rest = {
            key: value for key, value in row.items() if key not in ("unit", "target", "seconds", "elapsed") and value
        }
        target = "all" if row["target"] == ALL else f"{row['target']:,}"
        counted = ", ".join(f"{value:,} {key}" for key, value in rest.items())
        lines.append(f"{name:34} {row.get(row['unit'], 0):>10,} {target:>12} {row['seconds']:>7.0f}   {counted}")
    return "\n".join([*lines, f"{found['rounds']} rounds, {found['seconds']:.0f} s, nothing broken"])


def main() -> int:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="stop after the trial that is running then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="one short round: does it run?")
    parser.add_argument("--out", type=Path, help="keep the JSON object in this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)  # see testing/torture.py
    found = run_all(0 if args.smoke else args.minutes, args.seed, args.smoke)
    print(table(found))
    finish(found, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
