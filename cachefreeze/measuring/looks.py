"""What a few samples show of a run in a few milliseconds, before anything is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from cachefreeze.isolation import evaluating
from cachefreeze.measuring.forwards import first_call, wait
from cachefreeze.ragged import evenly
from cachefreeze.running import autocast, model_device
from cachefreeze.samples import View
from cachefreeze.tracing import Example, Usage, noted_usage

# A split records, cuts and verifies with forwards and backwards of a few samples: about this many of their forwards,
# and, for following every call and for fingerprints, so many times what it takes to put the model's state back (21 cuts
# of seven models: benchmarks/results/plan_accuracy.json). Only for the first decision; after a move its own time is
# known.
_SPLIT_FORWARDS, _SPLIT_WALKS = 21, 55
# Of those cuts the fastest, forwards included, took 2.2 ms for each module of the model.
_SPLIT_MODULE_SECONDS = 0.001
# Over what is predicted of a few samples. A run that saves less than this has little to gain, and measuring takes as
# long as a part of it.
_SETUP_AT_MOST = 2.2
FEW = 3
# Of a look: of the samples that a run computes, and seconds of one forward.
_LOOK_SHARE, _LOOK_SECONDS = 0.01, 0.1


@dataclass(frozen=True)
class Run:
    """What is ahead of a model.

    Attributes:
        samples: Of an epoch.
        epochs: With something frozen; rows are made in the first one.
        batch_size: Of the training loader.
        thawed: Whether what trains now may freeze in one of them.
    """

    samples: int
    epochs: int
    batch_size: int
    thawed: bool = False

    @classmethod
    def of(cls, dataloader: DataLoader[Any], samples: int, epochs: int, *, thawed: bool = False) -> Run:
        """With the batches of a training loader."""
        return cls(samples, epochs, dataloader.batch_size or 64, thawed)

    @property
    def read(self) -> int:
        """Rows that are read rather than made."""
        return self.samples * (self.epochs - 1)

    @property
    def looked_at(self) -> float:
        """Samples whose forward a look may spend: a batch, and never a hundredth of the run's."""
        return min(self.batch_size, _LOOK_SHARE * self.samples * self.epochs)


@dataclass(frozen=True)
class FirstLook:
    """What a few samples show, in a few milliseconds.

    Attributes:
        forward: Seconds of the forward of three samples.
        each: Seconds a sample of the forward of the most samples that were looked at.
        frozen: Likewise until something is called that trains: what rows would spare of it, or more.
        walk: Seconds to note the model's state and to put it back.
        fetch: Seconds a sample.
        usage: What the forward used, in order; None where it did not show.
    """

    forward: float
    each: float
    frozen: float
    walk: float
    fetch: float
    usage: Usage | None

    @property
    def setup(self) -> float:
        """Seconds to split and to verify."""
        return _SPLIT_FORWARDS * self.forward + _SPLIT_WALKS * self.walk

    def shows_short(self, run: Run) -> bool:
        """Whether splitting may take longer than all that rows could save in a run: to measure more would not pay."""
        spared = (self.each if run.thawed else self.frozen) + self.fetch
        return run.read * spared < _SETUP_AT_MOST * self.setup


def short_for_any(model: nn.Module, fetch: float, run: Run) -> bool:
    """Whether :meth:`FirstLook.shows_short` is true however long a forward takes, so that none is needed.

    A sample of a batch takes no longer than one of three. What rows spare of fetching grows with no forward, so that is
    held against what a split takes at least.

    Args:
        model: That would be split.
        fetch: Seconds that a sample takes to fetch.
        run: That is ahead.
    """
    least = _SPLIT_MODULE_SECONDS * sum(1 for _ in model.modules())
    return run.read <= _SETUP_AT_MOST * _SPLIT_FORWARDS * FEW and run.read * fetch < _SETUP_AT_MOST * least


def first_look(
    model: nn.Module,
    example: Example,
    fetch: float,
    autocast_dtype: torch.dtype | None = None,
    run: Run | None = None,
) -> FirstLook:
    """Compute three samples, without a trace, and then them again as a batch of more, where three show too little.

    Args:
        model: On its device.
        example: Three samples.
        fetch: Seconds that one of them took to fetch.
        autocast_dtype: Of the model.
        run: That is ahead; None where its length is not known: three are all.
    """
    device = model_device(model)
    example = example.to(device).fresh()
    entering = time.perf_counter()
    with evaluating(model), autocast(device, autocast_dtype):
        entered = time.perf_counter()
        trained = _trained_leaves(model)
        with noted_usage(model) if trained else nullcontext(lambda: None) as noted:
            forward, until = timed_forward(model, example, device, trained)
        look = FirstLook(forward, forward / FEW, until / FEW, entered - entering, fetch, noted())
        if run is not None and not look.shows_short(run):
            count = int(min(run.looked_at, _LOOK_SECONDS / max(look.each, 1e-9)))
            if count > FEW:
                whole, until = timed_forward(model, example.take([i % FEW for i in range(count)]), device, trained)
                look = replace(look, each=whole / count, frozen=until / count)
        leaving = time.perf_counter()
    return replace(look, walk=look.walk + time.perf_counter() - leaving)


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


def look_at(
    model: nn.Module, view: View, autocast_dtype: torch.dtype | None = None, run: Run | None = None
) -> FirstLook:
    """:func:`first_look` at samples of a view, evenly spread."""
    began = time.perf_counter()
    raw = view.fetch(spread(len(view), FEW))
    fetch = (time.perf_counter() - began) / FEW
    return first_look(model, view.layout.example(raw), fetch, autocast_dtype, run)


def spread(samples: int, count: int) -> list[int]:
    """Indices of ``count`` samples, evenly spread; again from the first where there are fewer."""
    return evenly(samples, count) if samples >= count else [i % samples for i in range(count)]
