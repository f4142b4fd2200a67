"""FreezeOut on CIFAR-10: nothing frozen, frozen without a cache, frozen with one, and the ceiling.

All variants of a seed train in turns, an epoch each, from equal weights and in the same order of samples. Images are
decoded once, before the clock starts, so that a slow decoder flatters nobody. The last line printed is one JSON object.

    python benchmarks/freezeout.py --out benchmarks/results/freezeout-cpu.json                 # minutes on a CPU
    python benchmarks/freezeout.py --device cuda --blocks 3 --width 16 --samples 50000 --test 10000 --epochs 30 \\
        --batch-size 128 --seeds 3 --store device --augment --out benchmarks/results/freezeout-gpu.json
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from common import clocks, config_parser, configured, finish
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models.resnet import BasicBlock

import cachefreeze as cf
from cachefreeze.cli.data import load_data
from cachefreeze.machine import load_average, made_on
from cachefreeze.timings import evenly
from cachefreeze.timings.rounds import in_turn

SCHEMA = 1
VARIANTS = ("baseline", "frozen", "cached", "ceiling")


@dataclass(frozen=True, kw_only=True)
class Config:
    """``blocks`` residual blocks in each of three stages: 3 makes a ResNet-20, 1 a ResNet-8."""

    blocks: int = 1
    width: int = 8
    samples: int = 1000
    test: int = 1000
    batch_size: int = 50
    epochs: int = 12
    t0: tuple[float, ...] = (0.8, 0.5)
    how: tuple[str, ...] = ("cubic",)
    seeds: int = 2
    lr: float = 0.1
    store: str = "host"
    augment: bool = False
    device: str = "cpu"


@dataclass
class Run:
    """One variant of one seed. ``cpu_seconds`` is processor time, which other processes do not lengthen."""

    variant: str
    schedule: str
    seed: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    move_seconds: list[float] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    boundaries: list[str | None] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_error: list[float] = field(default_factory=list)


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2015), section 4.2, of 6 * blocks + 2 layers."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        layers, before = [], width
        for stage in range(3):
            for block in range(blocks):
                after, stride = width << stage, 2 if stage and not block else 1
                down = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
                layers.append(BasicBlock(before, after, stride, down if before != after else None))
                before = after
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.bn1(self.conv1(x)).relu()).mean((2, 3)))


class Augmented(Dataset):
    """A random flip and a random crop of 4 pixels' padding: what live epochs see."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.data[index]
        top, left, flip = torch.randint(0, 9, (2,)).tolist() + torch.randint(0, 2, (1,)).tolist()
        image = functional.pad(image, (4, 4, 4, 4))[:, top : top + 32, left : left + 32]
        return (image.flip(-1) if flip else image), label


def decoded(dataset: Any, count: int) -> TensorDataset:
    images, labels = zip(*(sample for sample in evenly(dataset, count)), strict=True)
    return TensorDataset(torch.stack(images), torch.tensor(labels))


def train(config: Config, run: Run, schedule: cf.FreezeOut, data: TensorDataset, test: TensorDataset) -> Iterator[None]:
    """Train one variant; yields after every epoch. The clock is on while an epoch trains and the boundary moves."""
    device = torch.device(config.device)
    torch.manual_seed(run.seed)
    model = ResNet(config.blocks, config.width).to(device)
    store = config.store if run.variant in ("cached", "ceiling") else "off"
    engine = cf.Engine(model, store, schedule=schedule, moves="always" if run.variant == "ceiling" else "measured")
    order = torch.Generator().manual_seed(run.seed)
    samples: Dataset = Augmented(data) if config.augment else data
    view = {"view": data} if config.augment and run.variant in ("cached", "ceiling") else {}
    batches = engine.loader(DataLoader(samples, config.batch_size, shuffle=True, generator=order), **view)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum=0.9, weight_decay=1e-4)
    engine.attach(optimizer)
    epochs = engine.epochs(config.epochs)
    images, labels = (tensor.to(device) for tensor in test.tensors)
    for _ in range(config.epochs):
        began, cpu = clocks(device)
        next(epochs)
        moved, _ = clocks(device)
        source = batches
        if run.variant == "ceiling" and engine.parts is not None:
            source = Resident(engine, data, config, device)
            began, cpu = clocks(device)  # making its rows is free, and so is the move
            moved = began
        model.train()
        losses = []
        for x, y in source:
            optimizer.zero_grad()
            loss = functional.cross_entropy(engine.parts.suffix(*x) if isinstance(x, tuple) else engine(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        ended, cpu_ended = clocks(device)
        run.seconds.append(ended - began)
        run.cpu_seconds.append(cpu_ended - cpu)
        run.move_seconds.append(moved - began)
        run.sources.append("ceiling" if source is not batches else batches.source)
        run.boundaries.append(engine.boundary)
        run.train_loss.append(float(torch.stack(losses).mean()))
        with torch.no_grad():
            hits = model.eval()(images).argmax(1) == labels
        run.test_error.append(1 - float(hits.float().mean()))
        yield
    engine.close()


class Resident:
    """The suffix's inputs as slices of resident tensors: no loader, no gather, no order."""

    def __init__(self, engine: cf.Engine, data: TensorDataset, config: Config, device: torch.device) -> None:
        self.size = config.batch_size
        with torch.no_grad():
            parts = [engine.parts.prefix(images.to(device)) for images in data.tensors[0].split(500)]
        parts = [part if isinstance(part, tuple) else (part,) for part in parts]
        self.tensors = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        self.labels = data.tensors[1].to(device)

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for at in range(0, len(self.labels), self.size):
            yield tuple(t[at : at + self.size].clone() for t in self.tensors), self.labels[at : at + self.size]


def measure(config: Config) -> list[Run]:
    found = load_data("cifar10")
    data, test = decoded(found.train, config.samples), decoded(found.val, config.test)
    runs = []
    for seed in range(config.seeds):
        schedules = {"none": cf.FreezeOut(1.0)}  # the same annealing, of which nothing freezes
        schedules |= {f"{how} {t0:g}": cf.FreezeOut(t0, how) for how in config.how for t0 in config.t0}
        made = [Run("baseline", "none", seed)]
        made += [Run(variant, name, seed) for name in schedules if name != "none" for variant in VARIANTS[1:]]
        turns = [train(config, run, schedules[run.schedule], data, test) for run in made]
        for epoch in range(config.epochs):
            for turn in in_turn(turns, epoch):
                next(turn)
            print(f"seed {seed}, epoch {epoch}", file=sys.stderr, flush=True)
        runs += made
    return runs


def summarise(runs: list[Run]) -> list[dict[str, Any]]:
    """Means over seeds for every variant and schedule; savings against the baseline of the same seed."""
    baselines = {run.seed: run for run in runs if run.variant == "baseline"}
    target = max(run.test_error[-1] for run in baselines.values())
    rows = []
    for key in dict.fromkeys((run.schedule, run.variant) for run in runs):
        own = [run for run in runs if (run.schedule, run.variant) == key]
        saved = [1 - sum(run.cpu_seconds) / sum(baselines[run.seed].cpu_seconds) for run in own]
        errors = [run.test_error[-1] for run in own]
        relative = [run.test_error[-1] / baselines[run.seed].test_error[-1] - 1 for run in own]
        rows.append({
            "schedule": key[0],
            "variant": key[1],
            "seconds": statistics.mean(sum(run.seconds) for run in own),
            "cpu_seconds": statistics.mean(sum(run.cpu_seconds) for run in own),
            "saved": statistics.mean(saved),
            "saved_spread": [min(saved), max(saved)],
            "moves_share": statistics.mean(sum(run.move_seconds) / sum(run.seconds) for run in own),
            "test_error": statistics.mean(errors),
            "test_error_spread": [min(errors), max(errors)],
            "relative_error_increase": statistics.mean(relative),
            "cpu_seconds_to_baseline_error": [reached(run, target) for run in own],
            "losses_equal_frozen": all(
                run.train_loss == other.train_loss
                for run in own
                for other in runs
                if other.variant == "frozen" and other.seed == run.seed and run.schedule in ("none", other.schedule)
            ),
        })  # fmt: skip
    return rows


def reached(run: Run, error: float) -> float | None:
    """Processor time until the test error was first at or under ``error``; None: never."""
    spent = 0.0
    for seconds, found in zip(run.cpu_seconds, run.test_error, strict=True):
        spent += seconds
        if found <= error:
            return spent
    return None


def table(rows: list[dict[str, Any]]) -> str:
    head = ("wall s", "cpu s", "saved", "moves", "test error", "relative")
    lines = [
        f"{'schedule':12} {'variant':9} "
        + " ".join(f"{h:>{w}}" for h, w in zip(head, (8, 8, 7, 6, 10, 9), strict=True))
    ]
    lines += [
        f"{row['schedule']:12} {row['variant']:9} {row['seconds']:8.2f} {row['cpu_seconds']:8.2f} {row['saved']:7.1%} "
        f"{row['moves_share']:6.1%} {row['test_error']:10.1%} {row['relative_error_increase']:+9.1%}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    args = config_parser(__doc__, Config).parse_args()
    smoke = {"samples": 100, "test": 50, "epochs": 4, "seeds": 1, "width": 2, "t0": (0.5,), "how": ("linear",)}
    config = configured(Config, args, smoke)
    before = load_average()
    runs = measure(config)
    rows = summarise(runs)
    print(table(rows))
    found = {
        "schema": SCHEMA,
        "benchmark": "freezeout",
        "config": asdict(config),
        **made_on(before, config.device),
        "summary": rows,
        "runs": [asdict(run) for run in runs],
    }
    finish(found, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
