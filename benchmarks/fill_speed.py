"""What the first epoch of a cache costs: fills with the exact and the optimized prefix beside a plain frozen epoch.

The method is in benchmarks/README.md. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import finish
from shared_data import DATA
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import cachefreeze as cf
from cachefreeze.cli.data import load_data
from cachefreeze.cli.models import build_model
from cachefreeze.machine import load_average, made_on, synchronize
from cachefreeze.timings import evenly
from cachefreeze.timings.rounds import in_turn

SCHEMA = 1
# name of a variant -> store, prefix; a plain epoch has neither
FILLS = {
    "exact": ("host", "exact"),
    "optimized": ("host", "optimized"),
    "optimized hdf5": ("hdf5", "optimized"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """One job: a head on a frozen model."""

    model: str = "mobilenet_v2"
    head: str = "classifier"
    weights: str | None = None
    data: str = "digits"
    image_size: int | None = None
    samples: int = 128
    batch_size: int = 64
    rounds: int = 5
    seed: int = 0
    device: str = "cpu"


class Decoded(Dataset[Any]):
    """The same samples, decoded before the clock starts."""

    def __init__(self, samples: Any) -> None:
        self.samples = [samples[i] for i in range(len(samples))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def plain_epoch(model: nn.Module, head: nn.Module, loader: DataLoader[Any], device: torch.device) -> dict[str, Any]:
    """A frozen epoch without a cache as people write it, in eval mode but for the head."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in head.parameters():
        parameter.requires_grad_(True)
    model.eval()
    head.train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    return timed_epoch(model, optimizer, loader, device)


def timed_epoch(forward: Any, optimizer: torch.optim.Optimizer, loader: Any, device: torch.device) -> dict[str, Any]:
    total = torch.zeros((), device=device)
    synchronize(device)
    began = time.perf_counter()
    for x, y in loader:
        optimizer.zero_grad(set_to_none=True)
        x, y = (value.to(device) if isinstance(value, torch.Tensor) else value for value in (x, y))
        loss = functional.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        total += loss.detach()
    synchronize(device)
    return {"seconds": time.perf_counter() - began, "loss": float(total)}


@dataclass
class Filler:
    """A frozen model, split once; every fill of it has a new store, and makes its choice anew."""

    parts: cf.Parts
    setup_seconds: float

    @classmethod
    def of(cls, model: nn.Module, head: str, example: torch.Tensor) -> Filler:
        began = time.perf_counter()
        cf.freeze(model, head)
        return cls(cf.split(model, example), time.perf_counter() - began)

    def epoch(self, loader: DataLoader[Any], variant: str, folder: str, device: torch.device) -> dict[str, Any]:
        """The first epoch, with choosing and committing."""
        tier, prefix = FILLS[variant]
        manager = cf.CacheManager(self.parts, f"hdf5:{folder}" if tier == "hdf5" else tier, prefix=prefix)
        batches = manager.loader(loader)
        spent = {"write": 0.0, "choose": 0.0}
        store = batches.rows.store
        _clock(store, "write", spent, "write")
        _clock(store, "commit", spent, "write")
        if prefix != "exact":
            _clock(batches.rows.prefix, "_choose", spent, "choose")
        self.parts.model.train()
        optimizer = torch.optim.AdamW([p for p in self.parts.model.parameters() if p.requires_grad], lr=1e-3)
        began = time.perf_counter()
        found = timed_epoch(lambda rows: self.parts.suffix(*rows.tensors), optimizer, batches, device)
        manager.commit()
        seconds = time.perf_counter() - began
        made_by = manager.made_by
        manager.close()
        return {
            **found,
            "seconds": seconds,
            "setup_seconds": self.setup_seconds,
            "write_seconds": spent["write"],
            "choose_seconds": spent["choose"],
            "prefix": made_by,
        }


def _clock(owner: Any, name: str, spent: dict[str, float], what: str) -> None:
    """Add up the seconds of a method."""
    inner: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[what] += time.perf_counter() - began

    setattr(owner, name, timed)


def measure(config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    load_before = load_average()
    device = torch.device(config.device)
    data = load_data(config.data, image_size=config.image_size)
    chosen = evenly(data.train, config.samples)
    torch.manual_seed(config.seed)
    base = build_model(config.model, weights=config.weights, classes=len(data.classes)).to(device)
    tables = {}
    plain = copy.deepcopy(base)
    filler = Filler.of(copy.deepcopy(base), config.head, torch.stack([chosen[i][0] for i in range(3)]).to(device))
    for table, samples in (("with decoding", chosen), ("decoded before", Decoded(chosen))):
        _run("plain", plain, filler, config, samples, device)  # warm-up: the heap grows, pages are read
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("plain", *FILLS)}
        for round_ in range(config.rounds):
            say(f"{table}: round {round_ + 1}/{config.rounds}")
            for name in in_turn(list(runs), round_):
                runs[name].append(_run(name, plain, filler, config, samples, device))
        tables[table] = {name: _row(name, runs) for name in runs}
    return {
        "schema": SCHEMA,
        "benchmark": "fill_speed",
        "config": {
            **asdict(config),
            "data": data.name,
            "samples": len(chosen),
            "weights": Path(config.weights).name if config.weights else None,
        },
        **made_on(load_before, device),
        "tables": tables,
    }


def _run(
    name: str, plain: nn.Module, filler: Filler, config: Config, samples: Any, device: torch.device
) -> dict[str, Any]:
    order = torch.Generator().manual_seed(config.seed)
    loader = DataLoader(samples, config.batch_size, shuffle=True, generator=order)
    if name == "plain":
        return plain_epoch(plain, plain.get_submodule(config.head), loader, device)
    with tempfile.TemporaryDirectory(prefix="cachefreeze-fill-") as folder:
        return filler.epoch(loader, name, folder, device)


def _row(name: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds; ratios are medians of the ratio within a round."""
    found, plain = runs[name], runs["plain"]
    pairs = list(zip(found, plain, strict=True))
    row: dict[str, Any] = {
        "seconds": [run["seconds"] for run in found],
        "median_seconds": statistics.median(run["seconds"] for run in found),
        "to_plain": statistics.median(run["seconds"] / other["seconds"] for run, other in pairs),
    }
    if name == "plain":
        return row
    return row | {
        # what a fill of very many rows tends to: the choice is made once
        "to_plain_after_choosing": statistics.median(
            (run["seconds"] - run["choose_seconds"]) / other["seconds"] for run, other in pairs
        ),
        "choose_seconds": statistics.median(run["choose_seconds"] for run in found),
        "setup_seconds": statistics.median(run["setup_seconds"] for run in found),
        "write_share": statistics.median(run["write_seconds"] / run["seconds"] for run in found),
        "prefixes": [run["prefix"] for run in found],
    }


def table(found: dict[str, Any]) -> str:
    config, machine = found["config"], found["hardware"]
    weights = config["weights"] or "random weights"
    job = (
        f"{config['model']} with {weights}, {config['head']!r} trains: {config['samples']} images of "
        f"{config['image_size']} px ({config['data']}), batch {config['batch_size']}, {config['rounds']} rounds"
    )
    where = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads; torch "
        f"{found['versions']['torch']}; load {found['load_average']['before']} -> {found['load_average']['after']}"
    )
    lines = [job, where]
    for name, rows in found["tables"].items():
        lines += [
            "",
            (
                f"{name:16} {'epoch s':>8} {'min':>8} {'max':>8} {'ms/image':>9} {'/plain':>7} {'chosen':>7} "
                f"{'choosing s':>10} {'writing':>8} {'setup s':>8}"
            ),
        ]
        for variant, row in rows.items():
            after, choose = row.get("to_plain_after_choosing"), row.get("choose_seconds")
            lines.append(
                f"{variant:16} {row['median_seconds']:8.3f} {min(row['seconds']):8.3f} {max(row['seconds']):8.3f} "
                f"{1e3 * row['median_seconds'] / config['samples']:9.2f} {row['to_plain']:7.3f} "
                + (
                    ""
                    if after is None
                    else f"{after:7.3f} {choose:10.3f} {row['write_share']:8.2%} {row['setup_seconds']:8.2f}"
                )
            )
        last = rows["optimized"]["prefixes"][-1]
        lines.append(f"  optimized: {last['choice']}, {last.get('size')} at a time, error {last.get('error', 0.0):.1e}")
    return "\n".join(lines)


def main() -> int:
    default = Config()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=default.model, help="a torchvision classifier")
    parser.add_argument("--head", default=default.head, help="the module that trains")
    parser.add_argument("--weights", help="FILE.safetensors; default random")
    parser.add_argument("--data", help="an image folder; default the shared photos (CACHEFREEZE_DATA), else the digits")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--samples", type=int, default=default.samples)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--smoke", action="store_true", help="seconds; its numbers say nothing")
    parser.add_argument("--out", type=Path, help="results file")
    found = vars(parser.parse_args())
    out, smoke = found.pop("out"), found.pop("smoke")
    photos = DATA / "flowers"
    found["data"] = found["data"] or (str(photos) if photos.is_dir() else "digits")
    if smoke:
        found |= {"data": "digits", "image_size": 32, "samples": 128, "rounds": 1}
    result = measure(Config(**found), lambda line: print(line, file=sys.stderr, flush=True))
    print(table(result))
    finish(result, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
