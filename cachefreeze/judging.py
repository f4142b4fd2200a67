"""Whether ``auto`` caches at all: never where the same epochs without a cache are predicted to take no longer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from cachefreeze.batches import Inputs
from cachefreeze.measuring import FirstLook, Run, first_look, look_at, measure, short_for_any
from cachefreeze.moves import Costs, Move, worthwhile
from cachefreeze.running import forward_arguments, model_device
from cachefreeze.samples import View, alike_example_of
from cachefreeze.tracing import Usage

_LOG = logging.getLogger("cachefreeze")


@dataclass(frozen=True)
class Judgement:
    """What was decided for a boundary that stays.

    Attributes:
        pays: Whether to cache.
        move: The decision and its figures, as under a schedule.
        epochs: That were counted; None where it was not known how many there will be: then one of them.
        costs: Measured; None where the outcome was evident without.
    """

    pays: bool
    move: Move
    epochs: int | None
    costs: Costs | None

    @property
    def reason(self) -> str:
        """Why, in one line."""
        if self.costs is None:
            return f"splitting the model takes longer than {self.epochs} epochs could save"
        many = "an epoch" if self.epochs is None else f"{self.epochs} epochs"
        return (
            f"{many} would spend {self.move.seconds_moving:.3g} s on frozen blocks and inputs with a cache, and "
            f"{self.move.seconds_staying:.3g} s without"
        )


def measure_boundary(
    model: nn.Module,
    usage: Usage,
    boundary: str,
    loaders: Sequence[tuple[DataLoader[Any], View]],
    store: str,
    autocast: torch.dtype | None,
    epochs: int | None,
    look: FirstLook | None,
) -> Costs | None:
    """The costs of one boundary: block 0 is all before it, block 1 the rest.

    ``look`` was taken already, where there is one.

    Returns:
        The costs; None where a few samples show that splitting takes longer than all that could be saved.
    """
    names, device = ("", boundary), model_device(model)
    samples = sum(view.samples for _, view in loaders)
    run = None if epochs is None else Run.of(loaders[0][0], samples, epochs)
    look = look or look_at(model, loaders[0][1], autocast, run)
    if run is not None and look.shows_short(run):
        return None
    first = measure(model, usage, names, loaders, tiers=(), autocast_dtype=autocast, epochs=epochs, look=look)
    return first.costs_in(store, device, loaders[0][0].batch_size or 64)


def is_short(
    model: nn.Module, dataloader: DataLoader[Any], inputs: Inputs, autocast: torch.dtype | None, epochs: int
) -> tuple[bool, FirstLook | None]:
    """Whether a run is evidently too short to cache for, before its samples are probed.

    Probing, recording and measuring take as long as a short run does.

    Returns:
        Whether it is, and a look at a few samples where one was taken.
    """
    with suppress(Exception):  # what is wrong with the loader or the model is said by what needs them
        example, fetch = alike_example_of(dataloader, forward_arguments(model), inputs)
        run = Run.of(dataloader, len(dataloader.dataset), epochs)  # type: ignore[arg-type]
        if short_for_any(model, fetch, run):
            return True, None
        look = first_look(model, example, fetch, autocast, run)
        return look.shows_short(run), look
    return False, None


def judge(costs: Costs | None, boundary: str, epoch: int, left: int | None) -> Judgement:
    """Cache or not, for a boundary that stays.

    Args:
        costs: From :func:`measure_boundary`; None: evident without, or there is one epoch.
        boundary: Its name.
        epoch: That begins.
        left: Epochs from then on; None where unknown: what is ahead in any number of them is cached.
    """
    if costs is None:
        return Judgement(False, Move(epoch, boundary, None, None, 0.0, 0.0), left, None)
    if left is None:
        cached, plain = costs.epoch(1, 1), costs.epoch(0, 1)
        pays = cached < plain
        return Judgement(pays, Move(epoch, boundary, None, boundary if pays else None, cached, plain), None, costs)
    path, seconds, held = worthwhile([1] * left, costs, 0)
    pays = path[:1] == [1]
    seconds = seconds if pays else costs.move(0, 1, left) + left * costs.epoch(1, 1)
    return Judgement(pays, Move(epoch, boundary, None, boundary if pays else None, seconds, held), left, costs)


def tell(judgement: Judgement) -> None:
    """Log a decision against the cache."""
    if not judgement.pays:
        _LOG.warning(
            "store='auto' does not cache at %r: %s. Give store='host' to cache all the same",
            judgement.move.frozen,
            judgement.reason,
        )
