"""How near cf.plan's predictions are to what is then measured, and how good its choices are.

Cases: models x boundaries x tiers, with their own sizes of images and batches. Of every case the plan is made first;
then epochs through the engine are timed. Method: benchmarks/README.md. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from common import finish
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import cachefreeze as cf
from cachefreeze.cli.data import load_data
from cachefreeze.cli.digits import DigitsCNN
from cachefreeze.machine import load_average, made_on
from cachefreeze.timings import evenly
from cachefreeze.timings.rounds import in_turn

EPOCHS = (2, 3, 10, 30)
WITHIN = 0.05
# Engines that are made for each figure of a setup and of a fill, in turns: the first that a process makes is slower.
_STARTS = 3


@dataclass(frozen=True)
class Job:
    """A model, its samples and the boundaries that are looked at."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[int], Dataset[Any]]
    samples: int
    batch_size: int
    boundaries: tuple[str, ...]


class Encoder(nn.Module):
    """A small transformer over vectors, as a stack of blocks and a head."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True) for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


def digits() -> nn.Module:
    return DigitsCNN(5)


def wide(width: int = 1024, depth: int = 4) -> nn.Module:
    layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def tensors(*shape: int) -> Callable[[int], Dataset[Any]]:
    def make(samples: int) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(0)
        return TensorDataset(torch.randn(samples, *shape, generator=generator), torch.arange(samples) % 10)

    return make


def catalogue(name: str, size: int | None = None) -> Callable[[int], Dataset[Any]]:
    return lambda samples: evenly(load_data(name, image_size=size).train, samples)


def vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(num_classes=10, **options)


JOBS = (
    Job("digits_cnn, digits 8 px", digits, catalogue("digits"), 640, 64, ("features.1", "features.3", "classifier")),
    Job("digits_cnn, batches of 8", digits, catalogue("digits"), 640, 8, ("features.1", "features.3", "classifier")),
    Job("wide MLP", wide, tensors(1024), 2048, 128, ("1.0", "3.0", "4")),
    Job("encoder, 16 steps", Encoder, tensors(16, 64), 512, 32, ("blocks.1", "blocks.3", "head")),
    Job("resnet18, CIFAR-10 32 px", vision("resnet18"), catalogue("cifar10"), 192, 32, ("layer2.0", "layer4.0", "fc")),
    Job("mobilenet_v2, 64 px", vision("mobilenet_v2"), catalogue("cifar10", 64), 96, 16,
        ("features.7", "features.17", "classifier")),
    Job("squeezenet1_1, 64 px", vision("squeezenet1_1"), catalogue("cifar10", 64), 128, 32,
        ("features.6", "features.12", "classifier")),
)  # fmt: skip


@contextmanager
def running(engine: cf.Engine, loader: DataLoader[Any]) -> Iterator[Callable[[], float]]:
    """Epochs through an engine, each call one of them; seconds."""
    batches = engine.loader(loader)
    model = engine.model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    clock = engine.epochs(sys.maxsize)
    next(clock)

    def epoch() -> float:
        model.train()
        began = time.perf_counter()
        for x, y in batches:
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(engine(x), y).backward()
            optimizer.step()
        next(clock)
        return time.perf_counter() - began

    try:
        yield epoch
    finally:
        engine.close()


def measure(job: Job, boundary: str, rounds: int, folder: str, samples: int) -> dict[str, Any]:
    """Predictions and measurements of one boundary in both tiers, interleaved."""
    torch.manual_seed(0)
    base, data = job.model(), job.data(samples)
    loader = DataLoader(data, job.batch_size, shuffle=True)
    example = torch.stack([data[i][0] for i in range(2)])
    models = {}
    for name in ("off", "host", "hdf5"):
        models[name] = copy.deepcopy(base)
        cf.freeze(models[name], boundary, example_inputs=example)
    tiers = {"host": "host", "hdf5": f"hdf5:{folder}"}
    plans = {name: cf.plan(models["off"], loader, store=store, epochs=10) for name, store in tiers.items()}
    setup: dict[str, list[float]] = {name: [] for name in ("off", *tiers)}
    first: dict[str, list[float]] = {name: [] for name in tiers}
    later: dict[str, list[float]] = {name: [] for name in ("off", *tiers)}
    for start in range(_STARTS):
        stores = {"off": "off", "host": "host", "hdf5": f"hdf5:{folder}/{start}"}
        with contexts(
            {name: stores[name] for name in ("off", *in_turn(list(tiers), start))}, models, loader, setup
        ) as epochs:
            epochs["off"]()  # the first epoch of a process is slower: not counted
            for name in in_turn(list(tiers), start):
                first[name].append(epochs[name]())
            for at in range(rounds if start == _STARTS - 1 else 0):
                for name in in_turn(list(stores), at):
                    later[name].append(epochs[name]())
    rows = {name: plan.at(boundary) for name, plan in plans.items()}
    frozen = statistics.median(later["off"])
    return {
        "job": job.name,
        "boundary": boundary,
        "batch_size": job.batch_size,
        "samples": samples,
        "plan_seconds": {name: plan.seconds for name, plan in plans.items()},
        "frozen": {"predicted": rows["host"].frozen_seconds, "measured": frozen, "seconds": later["off"]},
        "tiers": {
            name: {
                "setup": {"predicted": row.setup_seconds, "measured": statistics.median(setup[name])},
                "fill": {"predicted": row.fill_seconds, "measured": statistics.median(first[name])},
                "cached": {
                    "predicted": row.cached_seconds,
                    "measured": statistics.median(later[name]),
                    "seconds": later[name],
                },
            }
            for name, row in rows.items()
        },
    }


@contextmanager
def contexts(
    stores: dict[str, str], models: dict[str, nn.Module], loader: DataLoader[Any], setup: dict[str, list[float]]
) -> Iterator[dict[str, Callable[[], float]]]:
    """An engine for each store, and what it took to make its loader beyond what it takes without a cache."""
    epochs = {}
    with ExitStack() as opened:
        for name, store in stores.items():
            began = time.perf_counter()
            epochs[name] = opened.enter_context(running(cf.Engine(models[name], store), loader))
            spent = time.perf_counter() - began
            setup[name].append(spent if name == "off" else spent - setup["off"][-1])
        yield epochs


def total(case: dict[str, Any], option: str, epochs: int, what: str) -> float:
    """Seconds of a run: ``what`` is predicted or measured."""
    if option == "off":
        return epochs * case["frozen"][what]
    tier = case["tiers"][option]
    return tier["setup"][what] + tier["fill"][what] + (epochs - 1) * tier["cached"][what]


def choices(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``auto`` would choose by the plan, beside the best of all: for each boundary, then over a job's boundaries.

    There is room for all rows in memory here, so the tier that fits is the host; the best may be any.
    """
    found = []
    jobs = sorted({case["job"] for case in cases})
    groups = [[case] for case in cases] + [[c for c in cases if c["job"] == job] for job in jobs]
    for group in groups:
        for epochs in EPOCHS:
            options = [(case, option) for case in group for option in ("off", "host", "hdf5")]
            fitting = [(case, option) for case, option in options if option != "hdf5"]
            chosen = min(fitting, key=lambda o: total(o[0], o[1], epochs, "predicted"))
            best = min(options, key=lambda o: total(o[0], o[1], epochs, "measured"))
            seconds = [total(case, option, epochs, "measured") for case, option in (chosen, best)]
            found.append(
                {
                    "job": group[0]["job"],
                    "boundaries": [case["boundary"] for case in group],
                    "epochs": epochs,
                    "chosen": [chosen[0]["boundary"], chosen[1]],
                    "best": [best[0]["boundary"], best[1]],
                    "behind": seconds[0] / seconds[1] - 1,
                }
            )
    return found


def errors(cases: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Relative errors, signed: predicted over measured, less one."""
    found: dict[str, list[float]] = {"frozen": [], "fill": [], "cached": []}
    for case in cases:
        figures = [("frozen", case["frozen"])]
        figures += [(name, tier[name]) for tier in case["tiers"].values() for name in ("fill", "cached")]
        for name, figure in figures:
            found[name].append(figure["predicted"] / figure["measured"] - 1)
    return found


def summarise(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """How far off the figures are, how many choices are as good as the best, and all of both."""
    signed, chosen = errors(cases), choices(cases)
    all_errors = [abs(error) for found in signed.values() for error in found]
    return {
        "figures": len(all_errors),
        "median_error": statistics.median(all_errors),
        "median_errors": {name: statistics.median(map(abs, those)) for name, those in signed.items()},
        "median_signed_errors": {name: statistics.median(those) for name, those in signed.items()},
        "choices": len(chosen),
        "choices_within": sum(choice["behind"] <= WITHIN for choice in chosen) / len(chosen),
        "cases": cases,
        "chosen": chosen,
    }


def table(found: dict[str, Any]) -> str:
    """Predicted and measured milliseconds of every figure."""
    lines = []
    for case in found["cases"]:
        line = f"{case['job']:26} {case['boundary']:12} frozen {_pair(case['frozen'])}"
        for name, tier in case["tiers"].items():
            line += f"  {name}: setup {_pair(tier['setup'])} fill {_pair(tier['fill'])} cached {_pair(tier['cached'])}"
        lines.append(line)
    lines.append(
        f"median relative error {found['median_error']:.1%} of {found['figures']} figures; "
        f"{found['choices_within']:.0%} of {found['choices']} choices within {WITHIN:.0%} of the best"
    )
    return "\n".join(lines)


def _pair(figure: dict[str, float]) -> str:
    return f"{1e3 * figure['predicted']:.4g}/{1e3 * figure['measured']:.4g}"


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Predicted against measured, all figures of all cases."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    points: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        points.setdefault("frozen", []).append((case["frozen"]["measured"], case["frozen"]["predicted"]))
        for name, tier in case["tiers"].items():
            for kind in ("fill", "cached"):
                points.setdefault(f"{kind}, {name}", []).append((tier[kind]["measured"], tier[kind]["predicted"]))
    for (name, pairs), marker in zip(sorted(points.items()), "osD^v", strict=True):
        axes.plot(*zip(*pairs, strict=True), marker, label=name, alpha=0.7, markersize=5)
    ends = [min(x for pairs in points.values() for x, _ in pairs), max(x for p in points.values() for x, _ in p)]
    axes.plot(ends, ends, "k-", linewidth=1)
    for factor in (0.85, 1.15):
        axes.plot(ends, [factor * end for end in ends], "k:", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="measured, s an epoch", ylabel="predicted, s an epoch")
    axes.set_title("cf.plan before the run, and the run; dotted: 15 %")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: time of this process for plan and epochs alike, which other processes do not lengthen",
    )
    parser.add_argument("--only", help="jobs whose name begins so")
    parser.add_argument("--smoke", action="store_true", help="one job, few samples; its numbers say nothing")
    parser.add_argument("--out", type=Path, help="results file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    if args.clock == "processor":
        time.perf_counter = time.process_time  # what the plan is measured with as well
    torch.set_num_threads(1)
    jobs = [job for job in JOBS if job.name.startswith(args.only or "")]
    jobs = jobs[2:3] if args.smoke else jobs
    before = load_average()
    cases = []
    with tempfile.TemporaryDirectory(prefix="cachefreeze-plan-") as folder:
        for job in jobs:
            for number, boundary in enumerate(job.boundaries):
                samples = 4 * job.batch_size if args.smoke else job.samples
                place = f"{folder}/{len(cases)}-{number}"
                cases.append(measure(job, boundary, 2 if args.smoke else args.rounds, place, samples))
                print(f"{job.name} at {boundary}", file=sys.stderr, flush=True)
    found = {
        "schema": 1,
        "benchmark": "plan_accuracy",
        "rounds": args.rounds,
        "clock": args.clock,
        **summarise(cases),
        **made_on(before),
    }
    print(table(found))
    finish(found, args.out)
    if args.plot is not None:
        draw(cases, args.plot)


if __name__ == "__main__":
    main()
