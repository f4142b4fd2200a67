"""What a few samples show of a run in a few milliseconds, before anything is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from cachefreeze.isolation import evaluating
from cachefreeze.measuring.forwards import first_call, wait
from cachefreeze.ragged import evenly
from cachefreeze.running import autocast, model_device
from cachefreeze.samples import View
from cachefreeze.tracing import Example

# A split records, cuts and verifies with forwards and backwards of a few samples: about this many of their forwards,
# and, for following every call and for fingerprints, so many times what it takes to put the model's state back (21 cuts
# of seven models: benchmarks/results/plan_accuracy.json). Only for the first decision; after a move its own time is
# known.
_SPLIT_FORWARDS, _SPLIT_WALKS = 21, 55
FEW = 3
# Of a look: of the samples that a run computes, and seconds of one forward.
_LOOK_SHARE, _LOOK_SECONDS = 0.01, 0.1


@dataclass(frozen=True)
class FirstLook:
    """What a few samples show, in a few milliseconds.

    Attributes:
        forward: Seconds of the forward of three samples.
        each: Seconds a sample of the forward of the most samples that were looked at.
        frozen: Likewise until something is called that trains: what rows would spare of it, or more.
        walk: Seconds to note the model's state and to put it back.
        fetch: Seconds a sample.
    """

    forward: float
    each: float
    frozen: float
    walk: float
    fetch: float

    @property
    def setup(self) -> float:
        """Seconds to split and to verify."""
        return _SPLIT_FORWARDS * self.forward + _SPLIT_WALKS * self.walk

    def most(self, samples: int, *, thawed: bool = False) -> float:
        """Seconds that rows of ``samples`` samples can spare at most, also of what trains now if ``thawed``."""
        return samples * ((self.each if thawed else self.frozen) + self.fetch)


def first_look(
    model: nn.Module,
    example: Example,
    fetch: float,
    autocast_dtype: torch.dtype | None = None,
    spent: float = 0,
) -> FirstLook:
    """Compute three samples, without a trace, and then them again as a batch of more.

    Args:
        model: On its device.
        example: Three samples.
        fetch: Seconds that one of them took to fetch.
        autocast_dtype: Of the model.
        spent: Samples that the batch may have.
    """
    device = model_device(model)
    example = example.to(device).fresh()
    entering = time.perf_counter()
    with evaluating(model), autocast(device, autocast_dtype):
        entered = time.perf_counter()
        trained = _trained_leaves(model)
        forward, until = timed_forward(model, example, device, trained)
        each, frozen = forward / FEW, until / FEW
        count = int(min(spent, _LOOK_SECONDS / max(each, 1e-9)))
        if count > FEW:
            whole, until = timed_forward(model, example.take([i % FEW for i in range(count)]), device, trained)
            each, frozen = whole / count, until / count
        leaving = time.perf_counter()
    walk = time.perf_counter() - leaving + entered - entering
    return FirstLook(forward, each, frozen, walk, fetch)


def timed_forward(
    model: nn.Module, example: Example, device: torch.device, marked: Sequence[nn.Module] = ()
) -> tuple[float, float]:
    """Seconds of a forward, and of it until one of the ``marked`` modules is called; all of it if none is."""
    with first_call(marked, device) as called:
        began = time.perf_counter()
        example.call(model)
        wait(device)
        ended = time.perf_counter()
    return ended - began, next(iter(called), ended) - began


def _trained_leaves(model: nn.Module) -> list[nn.Module]:
    """Modules that are called when a parameter of theirs that trains is used, and not before; none if compiled.

    One with children may run them first, and what is compiled would be compiled once more with hooks.
    """
    modules = list(model.modules())
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in modules):
        return []
    return [
        one
        for one in modules
        if not one._modules and any(p.requires_grad for p in one._parameters.values() if p is not None)
    ]


def look_at(model: nn.Module, view: View, autocast_dtype: torch.dtype | None = None, spent: float = 0) -> FirstLook:
    """:func:`first_look` at samples of a view, evenly spread."""
    began = time.perf_counter()
    raw = view.fetch(spread(len(view), FEW))
    fetch = (time.perf_counter() - began) / FEW
    return first_look(model, view.layout.example(raw), fetch, autocast_dtype, spent)


def looked_at(dataloader: DataLoader[Any], samples: int, epochs: int) -> float:
    """Samples whose forward a look may spend: a batch, and never a hundredth of the run's."""
    return min(dataloader.batch_size or 64, _LOOK_SHARE * samples * epochs)


def spread(samples: int, count: int) -> list[int]:
    """Indices of ``count`` samples, evenly spread; again from the first where there are fewer."""
    return evenly(samples, count) if samples >= count else [i % samples for i in range(count)]
