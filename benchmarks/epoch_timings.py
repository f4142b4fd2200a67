"""Epoch timings of one job on one machine: live, frozen without a cache, each tier, and the ceiling.

The method, and how to read the table, is in benchmarks/README.md. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

import cachefreeze as cf
from cachefreeze.cli.data import load_data
from cachefreeze.cli.digits import DigitsCNN, pretrain
from cachefreeze.cli.models import build_model

SCHEMA = 1
_WARM_UP_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    """One job. ``epochs`` is what the totals are of; ``fills`` is how often each tier is filled afresh."""

    model: str = "digits_cnn"
    weights: str | None = None
    data: str = "digits"
    train_from: str | None = None
    image_size: int | None = None
    batch_size: int = 64
    rounds: int = 5
    fills: int = 1
    epochs: int = 10
    samples: int | None = None
    workers: int = 0
    seed: int = 0
    device: str = "cpu"


@dataclass
class Variant:
    """One way of running an epoch, on a model, an optimizer and a data order of its own.

    Attributes:
        batches: Iterated once per epoch.
        forward: What a batch's inputs go through.
        end_epoch: What a user's loop does after an epoch, on the clock.
        setup_seconds: What was spent before the first epoch: tracing, verifying, probing, allocating.
    """

    name: str
    model: nn.Module
    batches: Any
    forward: Callable[[Any], Tensor]
    end_epoch: Callable[[], Any] = lambda: None
    close: Callable[[], None] = lambda: None
    setup_seconds: float = 0.0
    fill_seconds: list[float] = field(default_factory=list)
    store_bytes: int = 0
    sources: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = self._new_optimizer()

    def restart(self, state: dict[str, Tensor]) -> None:
        """Back to the first epoch, with weights ``state``."""
        self.model.load_state_dict(state)
        self.optimizer = self._new_optimizer()
        self.losses.clear()
        self.sources.clear()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)


class Bench:
    """The job that all variants share: samples, and the weights that each of them starts from."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = torch.device(config.device)
        data = load_data(config.data, image_size=config.image_size)
        self.data_name = data.name
        self.samples = evenly(data.train, config.samples)
        torch.manual_seed(config.seed)
        self.base = build_model(config.model, weights=config.weights, classes=len(data.classes))
        if isinstance(self.base, DigitsCNN) and config.weights is None:
            pretrain(self.base, seed=config.seed)
        self.base.to(self.device)
        self.example = torch.stack([self.samples[i % len(self.samples)][0] for i in range(3)]).to(self.device)
        self.train_from = config.train_from or cf.blocks(self.base, self.example)[-1].name

    def loader(self, *, shuffle: bool = True) -> DataLoader[Any]:
        return DataLoader(
            self.samples,
            self.config.batch_size,
            shuffle=shuffle,
            num_workers=self.config.workers,
            persistent_workers=self.config.workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.config.seed),
        )

    def model(self, *, frozen: bool) -> nn.Module:
        model = copy.deepcopy(self.base)
        if frozen:
            cf.freeze(model, self.train_from, example_inputs=self.example)
        return model

    def through_engine(self, name: str, store: str) -> Variant:
        """``live``, ``frozen`` or a tier: the loop that a user writes."""
        model, loader = self.model(frozen=name != "live"), self.loader()
        began = time.perf_counter()
        engine = cf.Engine(model, store)
        batches = engine.loader(loader)
        seconds = time.perf_counter() - began
        clock = engine.epochs(sys.maxsize)
        next(clock)
        store_bytes = engine.cache.nbytes if engine.cache is not None else 0
        end: Callable[[], Any] = lambda: next(clock)  # noqa: E731 - a name for what the dataclass takes
        return Variant(name, model, batches, engine, end, engine.close, seconds, store_bytes=store_bytes)

    def ceiling(self) -> Variant:
        """The suffix's training steps alone: slices of one resident tensor, no loader, no gather, no order."""
        model = self.model(frozen=True)
        began = time.perf_counter()
        parts = cf.split(model, self.example)
        seconds = time.perf_counter() - began
        made, labels = [], []
        model.eval()
        with torch.no_grad():
            for x, y in self.loader(shuffle=False):
                rows = parts.prefix(x.to(self.device))
                made.append(rows if isinstance(rows, tuple) else (rows,))
                labels.append(y.to(self.device))
        dims = [tensor.batch_dim for tensor in parts.boundary.tensors]
        resident = [torch.cat(column, dim) for column, dim in zip(zip(*made, strict=True), dims, strict=True)]
        model.train()
        # a suffix that writes into its rows would spoil the resident tensor: it then trains on copies
        versions = [tensor._version for tensor in resident]
        probed = copy.deepcopy(model.state_dict())
        parts.suffix(*(t.narrow(d, 0, 2) for t, d in zip(resident, dims, strict=True)))
        model.load_state_dict(probed)
        writes = versions != [tensor._version for tensor in resident]
        if writes:
            resident = [torch.cat(column, dim) for column, dim in zip(zip(*made, strict=True), dims, strict=True)]
        batches = Slices(resident, dims, torch.cat(labels), self.config.batch_size, copies=writes)
        return Variant("ceiling", model, batches, lambda rows: parts.suffix(*rows), setup_seconds=seconds)


class Slices:
    """Consecutive slices of resident tensors, as many per pass as the loader has batches."""

    def __init__(self, tensors: list[Tensor], dims: list[int], labels: Tensor, size: int, *, copies: bool) -> None:
        self.tensors, self.dims, self.labels, self.size, self.copies = tensors, dims, labels, size, copies

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        for start in range(0, len(self.labels), self.size):
            labels = self.labels[start : start + self.size]
            rows = [t.narrow(d, start, len(labels)) for t, d in zip(self.tensors, self.dims, strict=True)]
            yield [row.clone() for row in rows] if self.copies else rows, labels


def evenly(dataset: Any, samples: int | None) -> Any:
    """``samples`` of a dataset, evenly spread over it, so that every class of a sorted folder is among them."""
    if samples is None or samples >= len(dataset):
        return dataset
    return Subset(dataset, [i * len(dataset) // samples for i in range(samples)])


def run_epoch(variant: Variant, device: torch.device, seed: int, *, batches: int | None = None) -> float:
    """One epoch of training; the device is waited for before and after, not in between."""
    torch.manual_seed(seed)
    variant.model.train()
    total = torch.zeros((), device=device)
    synchronize(device)
    began = time.perf_counter()
    for step, (x, y) in enumerate(variant.batches):
        if step == batches:
            break
        variant.optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(variant.forward(x), y)
        loss.backward()
        variant.optimizer.step()
        total += loss.detach()
    variant.end_epoch()
    synchronize(device)
    seconds = time.perf_counter() - began
    variant.losses.append(float(total))
    variant.sources.append(getattr(variant.batches, "source", variant.name))
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(config: Config, *, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Run one job's variants, interleaved, and return the results."""
    load_before = load_average()
    bench = Bench(config)
    device = bench.device
    tiers = ["host", *(["device"] if device.type == "cuda" else []), "hdf5"]
    with tempfile.TemporaryDirectory(prefix="cachefreeze-bench-") as folder:

        def make(name: str, attempt: int = 0) -> Variant:
            stores = {"live": "off", "frozen": "off", "hdf5": f"hdf5:{folder}/{attempt}"}
            return bench.through_engine(name, stores.get(name, name))

        say("rows of the ceiling, warm-up")
        ceiling = bench.ceiling()
        for name in ("live", "frozen"):
            run_epoch(make(name), device, config.seed, batches=_WARM_UP_BATCHES)
        first = copy.deepcopy(ceiling.model.state_dict())
        run_epoch(ceiling, device, config.seed, batches=_WARM_UP_BATCHES)
        ceiling.restart(first)

        filled: dict[str, Variant] = {}
        for attempt in range(config.fills):
            for name in tiers:
                say(f"fill {attempt + 1}/{config.fills}: {name}")
                variant = make(name, attempt)
                seconds = run_epoch(variant, device, config.seed)
                if name in filled:
                    filled[name].close()
                    variant.fill_seconds = filled[name].fill_seconds
                variant.fill_seconds.append(seconds)
                filled[name] = variant

        variants = [make("live"), make("frozen"), *filled.values(), ceiling]
        for round_ in range(config.rounds):
            say(f"round {round_ + 1}/{config.rounds}")
            turn = round_ % len(variants)
            for variant in [*variants[turn:], *variants[:turn]]:
                # the k-th epoch of every variant has the same seed; a tier's first was its fill
                variant.seconds.append(run_epoch(variant, device, config.seed + len(variant.losses)))
        for variant in variants:
            variant.close()
    return results(bench, {variant.name: variant for variant in variants}, load_before)


def results(bench: Bench, variants: dict[str, Variant], load_before: list[float] | None) -> dict[str, Any]:
    """Everything that a results file holds."""
    config, batches = bench.config, math.ceil(len(bench.samples) / bench.config.batch_size)
    return {
        "schema": SCHEMA,
        "benchmark": "epoch_timings",
        "config": {
            **asdict(config),
            "data": bench.data_name,  # and not the folder, which says something about this machine alone
            "weights": Path(config.weights).name if config.weights else None,
            "train_from": bench.train_from,
            "samples": len(bench.samples),
        },
        "batches_per_epoch": batches,
        "hardware": hardware(bench.device),
        "versions": versions(),
        "load_average": {"before": load_before, "after": load_average()},
        "variants": {name: _row(variant, variants, config, batches) for name, variant in variants.items()},
    }


def _row(variant: Variant, variants: dict[str, Variant], config: Config, batches: int) -> dict[str, Any]:
    median = statistics.median(variant.seconds)
    frozen = variants["frozen"]
    common = min(len(variant.losses), len(frozen.losses))
    fill = statistics.median(variant.fill_seconds) if variant.fill_seconds else None
    return {
        "sources": sorted(set(variant.sources)),
        "seconds": variant.seconds,
        "median_seconds": median,
        "min_seconds": min(variant.seconds),
        "max_seconds": max(variant.seconds),
        "batch_ms": 1e3 * median / batches,
        "to_frozen": _ratio(variant, frozen),
        "to_ceiling": _ratio(variant, variants["ceiling"]),
        "setup_seconds": variant.setup_seconds,
        "fill_seconds": fill,
        "fills_seconds": variant.fill_seconds,
        "fill_to_frozen": None if fill is None else fill / statistics.median(frozen.seconds),
        "store_bytes": variant.store_bytes,
        "total_seconds": _total(variant, config.epochs),
        "break_even_epoch": _break_even(variant, frozen) if fill is not None else None,
        "losses_equal_frozen": variant.losses[:common] == frozen.losses[:common],
    }


def _ratio(variant: Variant, other: Variant) -> float:
    """Median over the rounds of the ratio within a round: what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(variant.seconds, other.seconds, strict=True))


def _total(variant: Variant, epochs: int) -> float:
    """Setup and ``epochs`` epochs, the first of which is the fill where there is one."""
    median = statistics.median(variant.seconds)
    first = statistics.median(variant.fill_seconds) if variant.fill_seconds else median
    return variant.setup_seconds + first + (epochs - 1) * median


def _break_even(variant: Variant, frozen: Variant) -> int | None:
    """The number of epochs from which on the tier is ahead of frozen, setup and fill counted; None: never."""
    saved = statistics.median(frozen.seconds) - statistics.median(variant.seconds)
    owed = _total(variant, 1) - _total(frozen, 1)
    if owed <= 0:
        return 1
    return 1 + math.ceil(owed / saved) if saved > 0 else None


def hardware(device: torch.device) -> dict[str, Any]:
    """What the machine is, as far as it says."""
    found: dict[str, Any] = {
        "cpu": _line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": None,
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": None,
    }
    memory = _line("/proc/meminfo", "MemTotal")
    if memory is not None:
        found["memory_bytes"] = int(memory.split()[0]) * 1024
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {"name": properties.name, "memory_bytes": properties.total_memory}
    return found


def versions() -> dict[str, str | None]:
    """Versions that change timings."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cachefreeze": cf.__version__}
    for name in ("torch", "torchvision", "numpy", "h5py"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "cuda": torch.version.cuda if torch.cuda.is_available() else None}


def load_average() -> list[float] | None:
    """How busy the machine was: a run on a busy one says little."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def _line(path: str, key: str) -> str | None:
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return None


def table(found: dict[str, Any]) -> str:
    """The results, readable."""
    config, machine = found["config"], found["hardware"]
    gpu = f", {machine['gpu']['name']}" if machine["gpu"] else ""
    job = (
        f"{config['model']} on {config['data']}, trained from {config['train_from']!r}: {config['samples']} samples, "
        f"{found['batches_per_epoch']} batches of {config['batch_size']}, {config['workers']} workers, "
        f"{config['rounds']} rounds"
    )
    where = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads{gpu}; torch "
        f"{found['versions']['torch']}; load {found['load_average']['before']} -> {found['load_average']['after']}"
    )
    columns = (
        f"{'':8} {'setup s':>8} {'fill s':>9} {'epoch s':>9} {'min':>9} {'max':>9} {'ms/batch':>9} {'/frozen':>8} "
        f"{'/ceiling':>8} {str(config['epochs']) + ' epochs':>10} {'break-even':>10}"
    )
    lines = [job, where, "", columns]
    for name, row in found["variants"].items():
        fill = "-" if row["fill_seconds"] is None else f"{row['fill_seconds']:.4f}"
        even = "-" if row["fill_seconds"] is None else row["break_even_epoch"] or "never"
        lines.append(
            f"{name:8} {row['setup_seconds']:8.3f} {fill:>9} {row['median_seconds']:9.4f} {row['min_seconds']:9.4f} "
            f"{row['max_seconds']:9.4f} {row['batch_ms']:9.3f} {row['to_frozen']:8.4f} {row['to_ceiling']:8.2f} "
            f"{row['total_seconds']:9.2f}s {even:>10}"
        )
    return "\n".join(lines)


def write(found: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def parse(arguments: list[str] | None = None) -> tuple[Config, Path | None]:
    default = Config()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=default.model, help="digits_cnn or a torchvision classifier")
    parser.add_argument("--weights", help="FILE.safetensors or DEFAULT; default random")
    parser.add_argument("--data", default=default.data, help="digits, cifar10 or an image folder")
    parser.add_argument("--train-from", help="first module to train; default the last block")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--rounds", type=int, default=default.rounds, help="at least 5 for a result; default 5")
    parser.add_argument("--fills", type=int, default=default.fills, help="fills per tier; default 1")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="what the totals are of; default 10")
    parser.add_argument("--samples", type=int, help="this many training samples, evenly spread; default all")
    parser.add_argument("--workers", type=int, default=default.workers, help="of the DataLoader; default 0")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="seconds: 96 samples, 2 rounds; its numbers say nothing")
    parser.add_argument("--out", type=Path, help="results file")
    found = vars(parser.parse_args(arguments))
    out, smoke = found.pop("out"), found.pop("smoke")
    for name in ("batch_size", "rounds", "fills", "epochs", "samples", "image_size"):
        if found[name] is not None and found[name] < 1:
            parser.error(f"--{name.replace('_', '-')} {found[name]}: expected 1 or more")
    if smoke:
        found |= {"samples": min(found["samples"] or 96, 96), "rounds": 2, "fills": 1}
    return Config(**found), out


def main() -> int:
    config, out = parse()
    found = measure(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(table(found))
    if out is not None:
        write(found, out)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
