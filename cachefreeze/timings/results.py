"""What was measured as data and as text: medians, ratios within a round, totals, the epoch from which a cache pays."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from cachefreeze.machine import made_on
from cachefreeze.splitting import Parts
from cachefreeze.timings.variants import Job, Variant

SCHEMA = 1
_OPTIONS = ("batch_size", "workers", "seed", "rounds", "fills", "epochs", "prefix")


def results(job: Job, parts: Parts, variants: Mapping[str, Variant], load_before: list[float] | None) -> dict[str, Any]:
    """Everything that a results file holds."""
    batches = math.ceil(len(job.samples) / job.batch_size)
    return {
        "schema": SCHEMA,
        "benchmark": "epoch_timings",
        "config": {
            "model": type(job.frozen).__name__,
            **job.facts,
            "train_from": parts.boundary.name,
            "samples": len(job.samples),
            **{name: getattr(job, name) for name in _OPTIONS},
            "device": str(job.device),
        },
        "split": {
            "executor": parts.executor,
            "cached_fraction": parts.cached_fraction,
            "bytes_per_sample": parts.boundary.bytes_per_sample,
        },
        "batches_per_epoch": batches,
        **made_on(load_before, job.device),
        "variants": {name: _row(variant, variants, job, batches) for name, variant in variants.items()},
    }


def _row(variant: Variant, variants: Mapping[str, Variant], job: Job, batches: int) -> dict[str, Any]:
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
        "total_seconds": _total(variant, job.epochs),
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


def table(found: Mapping[str, Any]) -> str:
    """The results, readable: the job, the machine, and a line for each variant."""
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
