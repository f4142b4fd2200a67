"""Interleaved rounds: an epoch of every variant in turns, so that a machine that becomes slower slows all of them."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from cachefreeze.isolation import preserved_random_state
from cachefreeze.machine import load_average, synchronize
from cachefreeze.timings.results import results
from cachefreeze.timings.variants import Job, Variant, ceiling, through_engine

Way = TypeVar("Way")
_WARM_UP_BATCHES = 2


def measure(job: Job, *, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Time a job.

    Models, the dataset and the random states are as before afterwards; the files of the HDF5 tier are gone.

    Args:
        job: What is timed.
        say: Gets a line at the beginning of each of :func:`steps` steps.

    Returns:
        What a results file holds: configuration, machine, versions, load, and every single time, in seconds.

    Raises:
        SplitError: Nothing runs before what trains, or it cannot be cut exactly.
        RandomSampleError: The samples are random, so that there is nothing to cache.
    """
    load_before = load_average()
    open_variants: list[Variant] = []

    def through(name: str, store: str) -> Variant:
        open_variants.append(through_engine(job, name, store))
        return open_variants[-1]

    with (
        preserved_random_state(),
        tempfile.TemporaryDirectory(prefix="cachefreeze-bench-", dir=job.folder) as folder,
    ):
        try:
            say("rows of the ceiling, warm-up")
            best, parts = ceiling(job)
            _warm_up(job, best, through)
            filled = _fill(job, Path(folder), through, say)
            variants = [through("live", "off"), through("frozen", "off"), *filled, best]
            _take_turns(job, variants, say)
        finally:
            for variant in open_variants:
                variant.close()
    return results(job, parts, {variant.name: variant for variant in variants}, load_before)


def steps(job: Job) -> int:
    """How many lines :func:`measure` says."""
    return 1 + job.fills * len(job.tiers) + job.rounds


def in_turn(ways: Sequence[Way], round_: int) -> list[Way]:
    """The order of one round: every round begins with the next of them, and goes on from there."""
    first = round_ % len(ways)
    return [*ways[first:], *ways[:first]]


def run_epoch(job: Job, variant: Variant, seed: int, *, batches: int | None = None) -> float:
    """One epoch of training in seconds; the device is waited for before and after, not in between."""
    torch.manual_seed(seed)
    variant.model.train()
    total = torch.zeros((), device=job.device)
    synchronize(job.device)
    began = time.perf_counter()
    for step, (x, y) in enumerate(variant.batches):
        if step == batches:
            break
        variant.optimizer.zero_grad(set_to_none=True)
        loss = job.loss(variant.forward(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        variant.optimizer.step()
        total += loss.detach()
    variant.end_epoch()
    synchronize(job.device)
    seconds = time.perf_counter() - began
    variant.losses.append(float(total))
    variant.sources.append(getattr(variant.batches, "source", variant.name))
    return seconds


def _warm_up(job: Job, best: Variant, through: Callable[[str, str], Variant]) -> None:
    for name in ("live", "frozen"):
        run_epoch(job, through(name, "off"), job.seed, batches=_WARM_UP_BATCHES)
    first = copy.deepcopy(best.model.state_dict())
    run_epoch(job, best, job.seed, batches=_WARM_UP_BATCHES)
    best.restart(first)


def _fill(job: Job, folder: Path, through: Callable[[str, str], Variant], say: Callable[[str], None]) -> list[Variant]:
    """Fill every tier as often as was asked for, and go on with the last fill of each."""
    filled: dict[str, Variant] = {}
    for attempt in range(job.fills):
        for name in job.tiers:
            say(f"fill {attempt + 1}/{job.fills}: {name}")
            variant = through(name, f"hdf5:{folder}/{attempt}" if name == "hdf5" else name)
            seconds = run_epoch(job, variant, job.seed)
            if name in filled:
                filled[name].close()
                variant.fill_seconds = filled[name].fill_seconds
            variant.fill_seconds.append(seconds)
            filled[name] = variant
    return list(filled.values())


def _take_turns(job: Job, variants: list[Variant], say: Callable[[str], None]) -> None:
    for round_ in range(job.rounds):
        say(f"round {round_ + 1}/{job.rounds}")
        for variant in in_turn(variants, round_):
            # the k-th epoch of every variant has the same seed; a tier's first was its fill
            variant.seconds.append(run_epoch(job, variant, job.seed + len(variant.losses)))
