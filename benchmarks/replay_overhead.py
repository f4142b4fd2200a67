"""What the suffix of a small head costs beside calling the head directly, by either executor.

Forward and backward on the same rows, interleaved; medians. The difference is what a step pays for the model's own
forward around the head: stubs, glue, attributes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from common import finish

import cachefreeze as cf
from cachefreeze import splitting
from cachefreeze.machine import hardware, load_average, versions
from cachefreeze.splitting import ReplayExecutor
from cachefreeze.splitting.fx_executor import FxExecutor

CASES = (("resnet18", "fc"), ("mobilenet_v2", "classifier"), ("densenet121", "classifier"), ("vit_b_16", "heads"))


def timed(steps: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each step, in turns."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for at in range(rounds + 20):
        for name, step in steps.items():
            began = time.perf_counter()
            step().sum().backward()
            if at >= 20:
                found[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(times) for name, times in found.items()}


def case(name: str, head: str, rounds: int) -> dict[str, float | str]:
    options = {"image_size": 64} if name.startswith("vit") else {}
    model = getattr(torchvision.models, name)(num_classes=10, **options)
    images = torch.randn(4, 3, 64, 64)
    cf.freeze(model, head)
    suffixes, rows = {}, None
    for executor in (FxExecutor(), ReplayExecutor()):
        splitting._EXECUTORS = (executor,)
        parts = cf.split(model, images)
        rows = parts.prefix(images)
        suffixes[executor.name] = parts.suffix
    model.train()
    module = model.get_submodule(head)
    steps = {"direct": lambda: module(rows)} | {n: (lambda s=s: s(rows)) for n, s in suffixes.items()}
    return {"model": name, **{f"{key}_ms": round(value, 4) for key, value in timed(steps, rounds).items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--smoke", action="store_true", help="seconds; does it run?")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = [case(*which, 20 if args.smoke else args.rounds) for which in CASES[: 1 if args.smoke else None]]
    for row in found:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    result = {
        "schema": 1,
        "benchmark": "replay_overhead",
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
        "load_average": load_average(),
        "cases": found,
    }
    finish(result, args.out)


if __name__ == "__main__":
    main()
