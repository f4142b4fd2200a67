"""Random flip and crop over a frozen prefix: what one view, several cached draws and live augmentation cost and give.

A small ResNet, pretrained on five classes of CIFAR-10, learns the other five with its first two stages frozen. All arms
of a seed train in turns, an epoch each, from equal weights and in one order of samples. The method is in
benchmarks/README.md. The last line printed is one JSON object.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from common import clocks, config_parser, configured, finish, interval, shown
from freezeout import Augmented, ResNet
from half_cifar import TRANSFERRED_TO, accuracy, classes_of, pretrained
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze.errors import RandomSampleError
from cachefreeze.machine import load_average, made_on
from cachefreeze.timings.rounds import in_turn

# live: the prefix runs over a new draw of every sample in every epoch, and nothing is cached
ARMS = ("live", "view", "variants=4", "variants=8")


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 16
    samples: int = 800
    test: int = 2000
    pretraining_samples: int = 2500
    pretraining_epochs: int = 8
    batch_size: int = 50
    epochs: int = 16
    seeds: int = 5
    lr: float = 0.05


@dataclass
class Run:
    """One arm of one seed; the first epoch's time holds what comes before it (probing, splitting)."""

    arm: str
    seed: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    store_bytes: int = 0
    accuracy: float = 0.0


def train(
    config: Config, run: Run, weights: dict[str, Tensor], data: TensorDataset, test: TensorDataset
) -> Iterator[None]:
    """Train one arm; yields after every epoch."""
    began = clocks()
    torch.manual_seed(run.seed)
    model = ResNet(1, config.width)
    model.fc = torch.nn.Linear(model.fc.in_features, len(TRANSFERRED_TO))
    model.load_state_dict(weights, strict=False)
    cf.freeze(model, "layers.2")
    engine = cf.Engine(model, "off" if run.arm == "live" else "host")
    order = torch.Generator().manual_seed(run.seed)
    loader = DataLoader(Augmented(data), config.batch_size, shuffle=True, generator=order)
    options: dict[str, Any] = {"view": data} if run.arm == "view" else {}
    if run.arm.startswith("variants="):
        options = {"variants": int(run.arm.partition("=")[2]), "seed": run.seed}
    batches = engine.loader(loader, **options)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], config.lr, momentum=0.9, weight_decay=5e-4
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * len(loader))
    state = torch.get_rng_state()
    for _ in engine.epochs(config.epochs):
        torch.set_rng_state(state)  # arms take turns; each draws on where it stopped
        model.train()
        losses = []
        for x, y in batches:
            optimizer.zero_grad()
            loss = functional.cross_entropy(engine(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
        state = torch.get_rng_state()
        ended = clocks()
        run.seconds.append(ended[0] - began[0])
        run.cpu_seconds.append(ended[1] - began[1])
        run.sources.append(batches.source)
        run.train_loss.append(float(torch.stack(losses).mean()))
        if len(run.seconds) == config.epochs:
            run.store_bytes = 0 if engine.cache is None else engine.cache.nbytes
            run.accuracy = accuracy(model, test)
        yield
        began = clocks()
    engine.close()


def refusal(config: Config, data: TensorDataset) -> str:
    """What the default says to an augmented loader."""
    model = ResNet(1, config.width)
    cf.freeze(model, "layers.2")
    try:
        cf.Engine(model, "host").loader(DataLoader(Augmented(data), config.batch_size))
    except RandomSampleError as error:
        return str(error)
    raise SystemExit("an augmented loader was cached without a word")


def measure(config: Config) -> tuple[list[Run], str]:
    weights = pretrained(1, config.width, config.pretraining_samples, config.pretraining_epochs)
    data, test = classes_of(TRANSFERRED_TO, config.samples, config.test)
    runs: list[Run] = []
    for seed in range(config.seeds):
        made = [Run(arm, seed) for arm in ARMS]
        turns = [train(config, run, weights, data, test) for run in made]
        for epoch in range(config.epochs):
            for turn in in_turn(turns, epoch):
                next(turn)
        for turn in turns:
            turn.close()
        runs += made
        print(f"seed {seed}: {[round(run.accuracy, 3) for run in made]}", file=sys.stderr, flush=True)
    return runs, refusal(config, data)


def summarise(runs: list[Run]) -> list[dict[str, Any]]:
    """Means over seeds; differences and ratios against the live arm of the same seed."""
    live = {run.seed: run for run in runs if run.arm == "live"}
    rows = []
    for arm in ARMS:
        own = [run for run in runs if run.arm == arm]
        cached = [
            s for run in own for s, source in zip(run.cpu_seconds, run.sources, strict=True) if source == "cached"
        ]
        rows.append({
            "arm": arm,
            "accuracy": interval([run.accuracy for run in own]),
            "accuracy_minus_live": interval([run.accuracy - live[run.seed].accuracy for run in own]),
            "final_train_loss": statistics.mean(run.train_loss[-1] for run in own),
            "store_bytes": own[0].store_bytes,
            "seconds": statistics.mean(sum(run.seconds) for run in own),
            "cpu_seconds": interval([sum(run.cpu_seconds) for run in own]),
            "cpu_to_live": interval([sum(run.cpu_seconds) / sum(live[run.seed].cpu_seconds) for run in own]),
            "cached_epoch_cpu_seconds": statistics.median(cached) if cached else None,
            "fill_epochs": own[0].sources.count("fill"),
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    head = (
        f"{'arm':12} {'accuracy':>15} {'minus live':>17} {'train loss':>10} {'store MB':>8} {'cpu s':>7} {'/live':>6}"
    )
    lines = [
        f"{row['arm']:12} {shown(row['accuracy'], '.1%'):>15} {shown(row['accuracy_minus_live'], '+.1%'):>17} "
        f"{row['final_train_loss']:10.4f} {row['store_bytes'] / 1e6:8.1f} {row['cpu_seconds']['mean']:7.2f} "
        f"{row['cpu_to_live']['mean']:6.2f} {row['fill_epochs']:5}"
        for row in rows
    ]
    return "\n".join([f"{head} {'fills':>5}", *lines])


def main() -> int:
    args = config_parser(__doc__, Config).parse_args()
    smoke = {"samples": 60, "test": 60, "pretraining_samples": 60, "pretraining_epochs": 1, "width": 2}
    smoke |= {"epochs": 9, "seeds": 1}
    config = configured(Config, args, smoke)
    before = load_average()
    runs, refused = measure(config)
    rows = summarise(runs)
    print(f"default: {refused}\n")
    print(table(rows))
    found = {
        "schema": 1,
        "benchmark": "augmentation",
        "config": asdict(config),
        **made_on(before),
        "refusal": refused,
        "summary": rows,
        "runs": [asdict(run) for run in runs],
    }
    finish(found, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
