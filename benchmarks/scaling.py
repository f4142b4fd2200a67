"""Does the cost of a cached epoch grow as the work does: with rows, bytes in a row, batch size and number of epochs?

The method is in benchmarks/README.md. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import finish
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze.machine import load_average, made_on

BASE = {"rows": 2000, "floats": 256, "batch": 64}
SWEEPS: dict[str, Sequence[int]] = {
    "rows": (2000, 20_000, 200_000),
    "floats": (64, 256, 1024, 4096),
    "batch": (8, 64, 512, 4096),
}
SMOKE: dict[str, Sequence[int]] = {"rows": (100, 200), "floats": (64, 128), "batch": (8, 64)}
TIERS = ("host", "hdf5")


def epochs(tier: str, shape: dict[str, int], count: int) -> list[float]:
    """Seconds of epochs of a linear head over rows of a tier; the first of them fills it."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(shape["rows"], shape["floats"]), torch.randint(10, (shape["rows"],)))
    model = nn.Sequential(nn.LayerNorm(shape["floats"]), nn.Linear(shape["floats"], 10))
    cf.freeze(model, train_from="1")
    with tempfile.TemporaryDirectory(prefix="cachefreeze-scaling-") as folder:
        engine = cf.Engine(model, store=f"hdf5:{folder}" if tier == "hdf5" else tier)
        train = engine.loader(DataLoader(data, shape["batch"], shuffle=True))
        optimizer = torch.optim.SGD(model[1].parameters(), lr=0.01)
        took = []
        for _ in engine.epochs(count):
            began = time.perf_counter()
            for x, y in train:
                optimizer.zero_grad()
                functional.cross_entropy(engine(x), y).backward()
                optimizer.step()
            took.append(time.perf_counter() - began)
        engine.close()
    return took


def sweep(what: str, sizes: Sequence[int], count: int) -> list[dict[str, Any]]:
    """Cached epochs with one size changed; there are at least four batches of rows."""
    found = []
    for size in sizes:
        shape = {**BASE, what: size}
        shape["rows"] = max(shape["rows"], 4 * shape["batch"])
        for tier in TIERS:
            took = epochs(tier, shape, count + 1)
            found.append({"sweep": what, "tier": tier, **shape, "fill_seconds": took[0], "epoch_seconds": took[1:]})
            print(line(found[-1]), flush=True)
    return found


def line(case: dict[str, Any]) -> str:
    """One line of the table."""
    median = statistics.median(case["epoch_seconds"])
    steps = -(-case["rows"] // case["batch"])
    return (
        f"{case['sweep']:7} {case['tier']:5} {case['rows']:7,} rows of {4 * case['floats']:6,} B, "
        f"batch {case['batch']:5}: {median * 1e3:8.1f} ms an epoch, {median / case['rows'] * 1e6:7.2f} us a row, "
        f"{median / steps * 1e6:8.0f} us a batch"
    )


def plot(found: dict[str, Any], path: Path) -> None:
    """Per sweep the median epoch; and the time after so many epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4), layout="constrained")
    axes = figure.subplots(1, 4)
    labels = {"rows": "rows", "floats": "bytes in a row", "batch": "batch"}
    for axis, (what, label) in zip(axes, labels.items(), strict=False):
        for tier in TIERS:
            cases = [case for case in found["cases"] if (case["sweep"], case["tier"]) == (what, tier)]
            per_row = [[1e6 * seconds / case["rows"] for seconds in case["epoch_seconds"]] for case in cases]
            middle = [statistics.median(one) for one in per_row]
            spread = [
                [m - min(o) for m, o in zip(middle, per_row, strict=True)],
                [max(o) - m for m, o in zip(middle, per_row, strict=True)],
            ]
            x = [case[what] * (4 if what == "floats" else 1) for case in cases]
            axis.errorbar(x, middle, yerr=spread, marker="o", capsize=3, label=tier)
        axis.set(xscale="log", yscale="log", ylim=(0.5, 100), xlabel=label, ylabel="us a row in a cached epoch")
        axis.legend()
    for tier, took in found["epochs"].items():
        axes[3].plot(range(1, len(took) + 1), torch.tensor(took).cumsum(0), marker=".", label=tier)
    axes[3].set(xlabel="epochs", ylabel="seconds in all, fill included", ylim=(0, None))
    axes[3].legend()
    figure.savefig(path, dpi=100)


def main() -> int:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5, help="cached ones of each case")
    parser.add_argument("--long", type=int, default=30, help="epochs of the run that shows their number")
    parser.add_argument("--smoke", action="store_true", help="seconds: does it run?")
    parser.add_argument("--out", type=Path, help="results file")
    parser.add_argument("--plot", type=Path, help="PNG")
    args = parser.parse_args()
    torch.set_num_threads(1)
    before = load_average()
    sizes, count, long = (SMOKE, 1, 2) if args.smoke else (SWEEPS, args.epochs, args.long)
    cases = [case for what, of in sizes.items() for case in sweep(what, of, count)]
    found = {
        "schema": 1,
        "benchmark": "scaling",
        "config": {"base": BASE, "cached_epochs": count},
        **made_on(before),
        "cases": cases,
        "epochs": {tier: epochs(tier, BASE, long) for tier in TIERS},
    }
    finish(found, args.out)
    if args.plot is not None:
        plot(found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
