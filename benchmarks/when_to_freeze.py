"""When to freeze: everything but the last stage of a small ResNet freezes after 0 … 80 % of training.

Five classes of CIFAR-10, from scratch and from weights that know the other five. And where the time goes: what each
further frozen block saves of an epoch, beside what it costs when it runs alone. The method is in benchmarks/README.md.
The last line printed is one JSON object.

    python benchmarks/when_to_freeze.py --inits scratch --out FILE.json          # minutes a piece
    python benchmarks/when_to_freeze.py --inits pretrained --add FILE.json --out FILE.json --plot FILE.png
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import clocks, config_parser, configured, finish, interval, shown
from freezeout import ResNet
from half_cifar import TRANSFERRED_TO, accuracy, classes_of, pretrained
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze.machine import load_average, made_on

NEVER = 1.0


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 16
    samples: int = 800
    test: int = 2000
    pretraining_samples: int = 2500
    pretraining_epochs: int = 8
    batch_size: int = 50
    epochs: int = 20
    starts: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, NEVER)
    inits: tuple[str, ...] = ("scratch", "pretrained")
    seeds: int = 3
    lr: float = 0.05
    # of the second part
    blocks: int = 2
    rounds: int = 5


@dataclass
class Run:
    """``uncached_cpu_seconds``: of the same freezing without a cache, for the first seed alone."""

    init: str
    start: float
    seed: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    uncached_cpu_seconds: float | None = None
    accuracy: float = 0.0
    sources: list[str] = field(default_factory=list)


def fit(
    config: Config, run: Run, store: str, weights: dict[str, Tensor], data: TensorDataset
) -> tuple[nn.Module, tuple[float, float], list[str]]:
    """One run; returns the model, wall and processor time, and where each epoch came from."""
    torch.manual_seed(run.seed)
    model = ResNet(1, config.width)
    model.fc = nn.Linear(model.fc.in_features, len(TRANSFERRED_TO))
    if run.init == "pretrained":
        model.load_state_dict(weights, strict=False)
    began = clocks()
    engine = cf.Engine(model, store, schedule=cf.AllButLast(2, start=run.start), moves="always")
    order = torch.Generator().manual_seed(run.seed)
    batches = engine.loader(DataLoader(data, config.batch_size, shuffle=True, generator=order))
    optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum=0.9, weight_decay=5e-4)
    engine.attach(optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * len(batches))
    sources = []
    for _ in engine.epochs(config.epochs):
        model.train()
        for x, y in batches:
            optimizer.zero_grad()
            functional.cross_entropy(engine(x), y).backward()
            optimizer.step()
            scheduler.step()
        sources.append(batches.source)
    ended = clocks()
    engine.close()
    return model, (ended[0] - began[0], ended[1] - began[1]), sources


def sweep(config: Config) -> list[Run]:
    weights = pretrained(1, config.width, config.pretraining_samples, config.pretraining_epochs)
    data, test = classes_of(TRANSFERRED_TO, config.samples, config.test)
    runs = []
    for seed in range(config.seeds):
        for init in config.inits:
            for start in config.starts:
                run = Run(init, start, seed)
                model, (run.seconds, run.cpu_seconds), run.sources = fit(config, run, "host", weights, data)
                run.accuracy = accuracy(model, test)
                if seed == 0:
                    run.uncached_cpu_seconds = fit(config, run, "off", weights, data)[1][1]
                runs.append(run)
                print(f"{init} {start} seed {seed}: {run.accuracy:.3f}", file=sys.stderr, flush=True)
    return runs


def block_costs(model: ResNet, names: list[str], x: Tensor, y: Tensor, rounds: int) -> list[float]:
    """Processor seconds of each block's forward and backward, run alone on what it is given within the model."""
    given: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, n=name: given.update({n: args[0]}))
        for name in names
    ]
    model.train()(x)
    for hook in hooks:
        hook.remove()
    costs = []
    for index, name in enumerate(names):
        block, times = model.get_submodule(name), []
        parts = [block] if index else [block, model.bn1, nn.ReLU()]
        for _ in range(rounds + 1):
            inputs = given[name].detach().requires_grad_(index > 0)
            began = clocks()[1]
            out = inputs
            for part in parts:
                out = part(out)
            out.sum().backward()
            times.append(clocks()[1] - began)
        costs.append(statistics.median(times[1:]))
    return costs


def proportion(config: Config) -> dict[str, Any]:
    """Processor time that an epoch saves with 1, 2, … frozen and cached blocks, beside what these cost alone."""
    data, _ = classes_of(TRANSFERRED_TO, min(config.samples, 400), 1)
    torch.manual_seed(0)
    base = ResNet(config.blocks, config.width)
    state = base.state_dict()
    names = ["conv1", *(f"layers.{i}" for i in range(3 * config.blocks))]
    turns = []
    for frozen in range(len(names)):  # at least the last block and the classifier train
        model = ResNet(config.blocks, config.width)
        model.load_state_dict(state)
        if frozen:
            cf.freeze(model, names[frozen])
        engine = cf.Engine(model, "host")
        batches = engine.loader(DataLoader(data, config.batch_size))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
        turns.append((model, engine, batches, optimizer, []))
    for _ in range(config.rounds + 1):
        for model, engine, batches, optimizer, times in turns:
            model.train()
            began = clocks()[1]
            for x, y in batches:
                optimizer.zero_grad()
                functional.cross_entropy(engine(x), y).backward()
                optimizer.step()
            times.append(clocks()[1] - began)
    epochs = [statistics.median(times[1:]) for *_, times in turns]  # the first one fills
    x, y = data.tensors[0][: config.batch_size], data.tensors[1][: config.batch_size]
    batches_count = -(-len(data) // config.batch_size)
    costs = [batches_count * seconds for seconds in block_costs(base, names[:-1], x, y, config.rounds)]
    saved = [epochs[0] - seconds for seconds in epochs[1:]]
    summed = [sum(costs[: count + 1]) for count in range(len(costs))]
    slope = sum(a * b for a, b in zip(summed, saved, strict=True)) / sum(a * a for a in summed)
    return {
        "blocks": names[:-1],
        "live_epoch_cpu_seconds": epochs[0],
        "cost_cpu_seconds": costs,
        "cost_of_frozen_cpu_seconds": summed,
        "saved_cpu_seconds": saved,
        "slope": slope,
        "correlation": statistics.correlation(summed, saved),
    }


def summarise(runs: list[Run]) -> list[dict[str, Any]]:
    rows = []
    for init, start in dict.fromkeys((run.init, run.start) for run in runs):
        own = [run for run in runs if (run.init, run.start) == (init, start)]
        never = {run.seed: run for run in runs if run.init == init and run.start == NEVER}
        rows.append({
            "init": init,
            "start": start,
            "accuracy": interval([run.accuracy for run in own]),
            "accuracy_minus_never": interval([run.accuracy - never[run.seed].accuracy for run in own]),
            "saved": interval([1 - run.cpu_seconds / never[run.seed].cpu_seconds for run in own]),
            "saved_uncached": statistics.mean(
                1 - run.uncached_cpu_seconds / never[run.seed].uncached_cpu_seconds for run in own if run.seed == 0
            ),
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]], found: dict[str, Any]) -> str:
    lines = [f"{'init':11} {'freezes at':>10} {'accuracy':>15} {'minus never':>17} {'saved':>17} {'no cache':>9}"]
    lines += [
        f"{row['init']:11} {'never' if row['start'] == NEVER else format(row['start'], '.0%'):>10} "
        f"{shown(row['accuracy'], '.1%'):>15} {shown(row['accuracy_minus_never'], '+.1%'):>17} "
        f"{shown(row['saved'], '.1%'):>17} {row['saved_uncached']:9.1%}"
        for row in rows
    ]
    lines.append("")
    lines += [
        f"frozen up to {name:9} costs {1000 * cost:7.1f} ms alone, saves {1000 * saved:7.1f} ms an epoch"
        for name, cost, saved in zip(
            found["blocks"], found["cost_of_frozen_cpu_seconds"], found["saved_cpu_seconds"], strict=True
        )
    ]
    lines.append(f"saved = {found['slope']:.2f} x cost, correlation {found['correlation']:.3f}")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    right, speed, blocks = figure.subplots(1, 3)
    for init in dict.fromkeys(row["init"] for row in rows):
        own = sorted((row for row in rows if row["init"] == init), key=lambda row: row["start"])
        at = [100 * row["start"] for row in own]
        for axis, key in ((right, "accuracy"), (speed, "saved")):
            half = [100 * (row[key]["half_width"] or 0) for row in own]
            axis.errorbar(at, [100 * row[key]["mean"] for row in own], half, marker="o", capsize=3, label=init)
        speed.plot(at, [100 * row["saved_uncached"] for row in own], ":", label=f"{init}, no cache")
    right.set(title="test accuracy", xlabel="freezes after, % of training (100: never)", ylabel="%")
    speed.set(title="processor time saved", xlabel="freezes after, % of training (100: never)", ylabel="%")
    cost, saved = found["cost_of_frozen_cpu_seconds"], found["saved_cpu_seconds"]
    blocks.plot(cost, saved, "o")
    blocks.plot([0, max(cost)], [0, found["slope"] * max(cost)], "-", label=f"slope {found['slope']:.2f}")
    blocks.set(title="saved by frozen blocks", xlabel="what they cost alone, s an epoch", ylabel="s an epoch")
    for axis in (right, speed, blocks):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = config_parser(__doc__, Config)
    parser.add_argument("--add", type=Path, help="results file of an earlier piece, whose runs are kept")
    parser.add_argument("--plot", type=Path, help="PNG")
    args = parser.parse_args()
    smoke = {"samples": 60, "test": 60, "pretraining_samples": 60, "pretraining_epochs": 1, "width": 2}
    smoke |= {"epochs": 3, "seeds": 1, "starts": (0.0, NEVER), "blocks": 1, "rounds": 1}
    config = configured(Config, args, smoke)
    before = load_average()
    earlier = {"runs": [], "pieces": []} if args.add is None else json.loads(args.add.read_text())
    kept = [Run(**run) for run in earlier["runs"]]
    runs = kept + sweep(config)
    rows, found = summarise(runs), proportion(config)
    print(table(rows, found))
    result = {
        "schema": 1,
        "benchmark": "when_to_freeze",
        "config": asdict(config),
        "pieces": [*earlier["pieces"], asdict(config)],
        **made_on(before),
        "summary": rows,
        "blocks": found,
        "runs": [asdict(run) for run in runs],
    }
    finish(result, args.out)
    if args.plot is not None:
        draw(rows, found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
