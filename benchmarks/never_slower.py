"""Whether ``store="auto"`` is ever slower than no cache: paired runs over schedules and models, in turns.

A run is all that a user waits for: engine, loaders, measuring, splitting, every epoch. Method: benchmarks/README.md.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import finish
from plan_accuracy import Encoder, catalogue, digits, tensors, vision, wide
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import cachefreeze as cf
from cachefreeze.machine import load_average, made_on

MARGIN = 0.02
_DRAWS = 2000


@dataclass(frozen=True)
class Case:
    """One kind of run. ``train_from`` freezes before it; ``schedule`` freezes on the way."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[int], Dataset[Any]]
    samples: int
    batch_size: int
    epochs: int
    train_from: str | None = None
    schedule: Callable[[], Any] | None = None


class Widening(nn.Module):
    """A cheap layer whose output is sixty times as large as its input: its rows cost more than they save."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 192, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(4), nn.Linear(192 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.stem(x)).flatten(1))


CASES = (
    Case("head, 2 epochs", digits, catalogue("digits"), 640, 64, 2, train_from="classifier"),
    Case("head, 20 epochs", digits, catalogue("digits"), 640, 64, 20, train_from="classifier"),
    Case("huge boundary", Widening, tensors(3, 32, 32), 256, 32, 8, train_from="pool"),
    Case("first layer alone frozen", digits, catalogue("digits"), 640, 64, 10, train_from="features.1"),
    Case("tiny suffix of a wide MLP", wide, tensors(1024), 1024, 128, 6, train_from="4"),
    Case("encoder, half frozen", Encoder, tensors(16, 64), 256, 32, 5, train_from="blocks.2"),
    Case("encoder, 2 epochs left", Encoder, tensors(16, 64), 256, 32, 2, train_from="head"),
    Case("resnet18 head, 2 epochs", vision("resnet18"), catalogue("cifar10"), 128, 32, 2, train_from="fc"),
    Case("resnet18 middle, 4 epochs", vision("resnet18"), catalogue("cifar10"), 128, 32, 4, train_from="layer3.0"),
    Case("FreezeOut, encoder", Encoder, tensors(16, 64), 256, 32, 8, schedule=lambda: cf.FreezeOut(t0=0.5)),
    Case("FreezeOut, digits", digits, catalogue("digits"), 640, 64, 12, schedule=lambda: cf.FreezeOut(t0=0.5)),
    Case("all but last from 40 %", wide, tensors(1024), 1024, 128, 8, schedule=lambda: cf.AllButLast(1, start=0.4)),
    Case("frozen for the last 2 epochs", wide, tensors(1024), 1024, 128, 8,
         schedule=lambda: cf.AllButLast(1, start=0.75)),
)  # fmt: skip


def run(case: Case, base: nn.Module, data: Dataset[Any], store: str) -> tuple[float, list[str]]:
    """One whole run: seconds, and the source of every epoch."""
    model = copy.deepcopy(base)
    torch.manual_seed(1)
    loader = DataLoader(data, case.batch_size, shuffle=True)
    began = time.perf_counter()
    if case.train_from is not None:
        cf.freeze(model, case.train_from, example_inputs=torch.stack([data[i][0] for i in range(2)]))
    known = None if case.schedule is not None else case.epochs
    engine = cf.Engine(model, store, schedule=None if case.schedule is None else case.schedule(), epochs=known)
    batches = engine.loader(loader)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    if engine.schedule is not None:
        engine.attach(optimizer)
    sources = []
    for _ in engine.epochs(case.epochs):
        model.train()
        for x, y in batches:
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(engine(x), y).backward()
            optimizer.step()
        sources.append(batches.source)
    engine.close()
    return time.perf_counter() - began, sources


def compare(case: Case, pairs: int) -> dict[str, Any]:
    """Paired runs of one case, which of the two comes first in turns."""
    torch.manual_seed(0)
    base, data = case.model(), case.data(case.samples)
    seconds: dict[str, list[float]] = {"auto": [], "off": []}
    sources: dict[str, list[list[str]]] = {"auto": [], "off": []}
    for store in seconds:
        run(case, base, data, store)  # the first of a kind is slower: not counted
    for pair in range(pairs):
        for store in (("auto", "off"), ("off", "auto"))[pair % 2]:
            spent, came_from = run(case, base, data, store)
            seconds[store].append(spent)
            sources[store].append(came_from)
    ratios = [a / b for a, b in zip(seconds["auto"], seconds["off"], strict=True)]
    low, high = interval(ratios)
    return {
        "case": case.name,
        "epochs": case.epochs,
        "samples": case.samples,
        "off_seconds": statistics.median(seconds["off"]),
        "auto_seconds": statistics.median(seconds["auto"]),
        "ratio": statistics.median(ratios),
        "interval": [low, high],
        "within_margin": statistics.median(ratios) <= 1 + MARGIN,
        "surely_slower": low > 1 + MARGIN,
        "cached_in": sum("cached" in found for found in sources["auto"]),
        "pairs": pairs,
        "sources": sources["auto"][-1],
        "seconds": seconds,
    }


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the median, by resampling the pairs."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_DRAWS))
    return medians[int(0.025 * _DRAWS)], medians[math.ceil(0.975 * _DRAWS) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: time of this process, decisions included, which other processes do not lengthen",
    )
    parser.add_argument("--only", help="cases whose name begins so")
    parser.add_argument("--smoke", action="store_true", help="three cases, two pairs; its numbers say nothing")
    parser.add_argument("--out", type=Path, help="results file")
    args = parser.parse_args()
    logging.getLogger("cachefreeze").setLevel(logging.ERROR)  # it says each time that it declines
    if args.clock == "processor":
        time.perf_counter = time.process_time
    torch.set_num_threads(1)
    cases = [case for case in CASES if case.name.startswith(args.only or "")]
    before = load_average()
    rows = []
    for case in cases[:3] if args.smoke else cases:
        row = compare(case, 2 if args.smoke else args.pairs)
        rows.append(row)
        print(
            f"{row['case']:30} off {row['off_seconds']:.3f} s, auto {row['auto_seconds']:.3f} s, ratio "
            f"{row['ratio']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}], cached in "
            f"{row['cached_in']} of {row['pairs']}",
            flush=True,
        )
    found = {
        "schema": 1,
        "benchmark": "never_slower",
        "margin": MARGIN,
        "clock": args.clock,
        "within_margin": sum(row["within_margin"] for row in rows),
        "surely_slower": [row["case"] for row in rows if row["surely_slower"]],
        "cases": rows,
        **made_on(before),
    }
    surely = ", ".join(found["surely_slower"]) or "none"
    print(f"{found['within_margin']} of {len(rows)} within {MARGIN:.0%}; surely slower: {surely}")
    finish(found, args.out)


if __name__ == "__main__":
    sys.exit(main())
