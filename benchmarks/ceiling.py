"""How near is a cached epoch to its ceiling, from the head to the middle of four models?

Rows have the shapes that the models make at 224 px or 128 tokens, and random values: what is timed is reading and
training, not filling. See README.md. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from common import finish
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import cachefreeze as cf
from cachefreeze.machine import load_average, made_on
from cachefreeze.timings.rounds import in_turn
from cachefreeze.timings.variants import Slices

CLASSES = 10
# Least steps of an epoch, and about how long an epoch of the ceiling is to take at most.
_STEPS, _SECONDS = 2, 0.5


class Pictures(Dataset):
    """``count`` samples, of which eight differ: rows are written without looking at them."""

    def __init__(self, count: int, tokens: bool) -> None:
        made = torch.Generator().manual_seed(0)
        self.count = count
        if tokens:
            self.some = torch.randint(5, 30_000, (8, 128), generator=made)
        else:
            self.some = torch.randn(8, 3, 224, 224, generator=made)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.some[index % 8], index % CLASSES


class Bert(nn.Module):
    """An encoder of the size of BERT base, with a classifier, called with token ids alone."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        self.net = BertForSequenceClassification(BertConfig(num_labels=CLASSES, attn_implementation="eager"))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens).logits


def of_torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(weights=None, num_classes=CLASSES)


MODELS: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, ...]]] = {
    # how it is made, the batch, and cuts from the head to the middle
    "mobilenet_v2": (of_torchvision("mobilenet_v2"), 32, ("classifier", "features.18", "features.16", "features.11")),
    "resnet50": (of_torchvision("resnet50"), 16, ("fc", "layer4.2", "layer4", "layer3.3")),
    "vit_b_16": (of_torchvision("vit_b_16"), 8, ("heads", *(f"encoder.layers.encoder_layer_{i}" for i in (11, 9, 6)))),
    "bert_base": (Bert, 8, ("net.classifier", *(f"net.bert.encoder.layer.{i}" for i in (11, 9, 6)))),
}
HEAD_BATCH = 64


@dataclass
class Way:
    """One way to run the epoch: its batches, and how a batch goes through the suffix."""

    batches: Any
    forward: Callable[[Any], Tensor]
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def epoch(self) -> float:
        self.model.train()
        started = time.perf_counter()
        for x, y in self.batches:
            self.optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(self.forward(x), y).backward()
            self.optimizer.step()
        return time.perf_counter() - started


def built(make: Callable[[], nn.Module], cut: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = make()
    cf.freeze(model, train_from=cut)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def through_engine(make: Callable[[], nn.Module], cut: str, store: str, data: Pictures, batch: int) -> tuple[Way, Any]:
    """A loader whose store is full of random rows, and the rows' values."""
    model, optimizer = built(make, cut)
    engine = cf.Engine(model, store=store)
    loader = engine.loader(DataLoader(data, batch_size=batch, shuffle=True), assume_deterministic=True)
    held = loader.rows.store
    made = torch.Generator().manual_seed(1)
    for rows in torch.arange(len(data)).split(256):
        values = {
            field.name: rows % CLASSES
            if field.name.startswith("field")
            else torch.randn((len(rows), *field.shape), generator=made).relu_().to(field.dtype)
            for field in held.spec.fields
        }
        held.write(rows, values)
    engine.cache.commit()
    return Way(loader, engine, model, optimizer), engine


def through_slices(make: Callable[[], nn.Module], cut: str, source: Any, data: Pictures, batch: int) -> Way:
    """The ceiling: slices of the rows of ``source``, resident."""
    every = torch.arange(len(data))
    tensors, fields = source.format.decode(every, source.store.read(every), torch.device("cpu"))
    model, optimizer = built(make, cut)
    parts = cf.split(model, torch.stack([data[0][0], data[1][0]]))
    slices = Slices.of_rows(parts, model, tensors, fields[0], batch)
    return Way(slices, lambda x: parts.suffix(*x), model, optimizer)


def case(name: str, cut: str, folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """One cut of one model: the ceiling and the tiers, an epoch of each in turn."""
    make, batch, cuts = MODELS[name]
    batch = HEAD_BATCH if cut == cuts[0] else batch
    step = _step_seconds(make, cut, name, batch)
    count = batch * max(_STEPS, min(64, int(seconds / step)))
    data = Pictures(count, tokens=name == "bert_base")
    ways, engines = {}, {}
    for tier, store in (("host", "host"), ("hdf5", f"hdf5:{folder}")):
        ways[tier], engines[tier] = through_engine(make, cut, store, data, batch)
    source = engines["host"].cache._rows["train"]
    ways["ceiling"] = through_slices(make, cut, source, data, batch)
    for way in ways.values():
        way.epoch()
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for at in range(rounds):
        for way in in_turn(list(ways), at):
            taken[way].append(ways[way].epoch())
    found = {
        "model": name, "cut": cut, "batch": batch, "batches": count // batch, "copies": ways["ceiling"].batches.copies,
        "row_bytes": sum(field.item_bytes for field in source.spec.fields),
        "ceiling_ms_a_batch": 1e3 * statistics.median(taken["ceiling"]) * batch / count,
        "pass_check_ms": 1e3 * _median(source.check, 5),
        "seconds": taken,
    }  # fmt: skip
    for tier, engine in engines.items():
        pairs = list(zip(taken[tier], taken["ceiling"], strict=True))
        found[tier] = _beside_ceiling(pairs, engine.cache._rows["train"].store, count, batch)
        engine.close()
    return found


def _beside_ceiling(pairs: list[tuple[float, float]], store: Any, count: int, batch: int) -> dict[str, float]:
    """A tier's epochs and the ceiling's of the same rounds."""
    return {
        "to_ceiling": statistics.median(a / b for a, b in pairs),
        "least": min(a / b for a, b in pairs),
        "most": max(a / b for a, b in pairs),
        "over_us_a_batch": 1e6 * statistics.median(a - b for a, b in pairs) * batch / count,
        "gather_us_a_batch": 1e6 * _median(lambda: store.read(torch.randperm(count)[:batch]), 20),
    }


def _median(what: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        what()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _step_seconds(make: Callable[[], nn.Module], cut: str, name: str, batch: int) -> float:
    """About how long a step of the suffix takes; decides how many there are in an epoch."""
    model, optimizer = built(make, cut)
    data = Pictures(8, tokens=name == "bert_base")
    parts = cf.split(model, torch.stack([data[0][0], data[1][0]]))
    specs = parts.boundary.tensors
    rows = [torch.randn((batch, *spec.shape)).to(spec.dtype) for spec in specs]
    way = Way(
        [(rows, torch.arange(batch) % CLASSES)], lambda x: parts.suffix(*(t.clone() for t in x)), model, optimizer
    )
    way.epoch()
    return min(way.epoch() for _ in range(2))


def table(cases: list[dict[str, Any]]) -> str:
    tier = f"{'':>6} {'over':>9} {'gather':>9}"
    lines = [f"{'':36} {'row':>9} {'batch':>6} {'ceiling':>12} {'check':>9} host{tier[4:]} hdf5{tier[4:]}"]
    for one in cases:
        tiers = " ".join(
            f"{of['to_ceiling']:6.3f} {of['over_us_a_batch']:6.0f} µs {of['gather_us_a_batch']:6.0f} µs"
            for of in (one["host"], one["hdf5"])
        )
        lines.append(
            f"{one['model'] + ' ' + one['cut'].removeprefix('net.bert.').removeprefix('encoder.layers.'):36} "
            f"{one['row_bytes']:>7} B {one['batch']:>6} {one['ceiling_ms_a_batch']:>9.2f} ms "
            f"{one['pass_check_ms']:>6.1f} ms {tiers}"
        )
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """Each cut's epoch over its ceiling, against how long a step of the ceiling takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(MODELS):
        ours = [one for one in found["cases"] if one["model"] == name]
        if not ours:
            continue
        x = [one["ceiling_ms_a_batch"] for one in ours]
        for tier, marker, line in (("host", "o", "-"), ("hdf5", "x", ":")):
            y = [one[tier]["to_ceiling"] for one in ours]
            axes.plot(x, y, marker=marker, linestyle=line, color=f"C{number}", label=f"{name}, {tier}")
    for aim in (1.05, 1.10):
        axes.axhline(aim, color="grey", linewidth=0.8, linestyle="--")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("a step of the ceiling, ms")
    axes.set_ylabel("cached epoch over its ceiling")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Run, print, keep. Cases are added to those that --out holds already, so that a run may be made in parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cuts", type=int, nargs="+", default=[0, 1, 2, 3], help="0 is the head, 3 the middle")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="of an epoch of the ceiling, at most")
    parser.add_argument("--smoke", action="store_true", help="one head, short: does it run?")
    parser.add_argument("--out", type=Path, help="results file")
    parser.add_argument("--plot", type=Path, help="PNG of all that the results file holds")
    args = parser.parse_args()
    if args.smoke:
        args.models, args.cuts, args.rounds, args.seconds = ["mobilenet_v2"], [0], 2, 0.01
    before, cases = load_average(), []
    for name in args.models:
        for number in args.cuts:
            with tempfile.TemporaryDirectory(prefix="cachefreeze-ceiling-") as folder:
                cases.append(case(name, MODELS[name][2][number], Path(folder), args.rounds, args.seconds))
            print(table(cases[-1:]), flush=True)
    now = {(one["model"], one["cut"]) for one in cases}
    kept = json.loads(args.out.read_text())["cases"] if args.out is not None and args.out.exists() else []
    cases += [one for one in kept if (one["model"], one["cut"]) not in now]
    order = [(name, cut) for name, (_, _, cuts) in MODELS.items() for cut in cuts]
    found = {
        "schema": 1,
        "benchmark": "ceiling",
        "config": {"rounds": args.rounds, "seconds": args.seconds},
        **made_on(before),
        "cases": sorted(cases, key=lambda one: order.index((one["model"], one["cut"]))),
    }
    finish(found, args.out)
    if args.plot is not None:
        plot(found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
