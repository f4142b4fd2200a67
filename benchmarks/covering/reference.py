"""What a split is compared with: the untouched model, frozen by hand, and what it does when it runs alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from covering.case import Case
from covering.comparing import call, difference, draw, loss_of, pick, tensors
from covering.recording import Recording

_OTHER_SAMPLES = 1e-3  # a sample beside other ones: kernels may round differently
_SEEDS = 8  # steps that are tried for random control flow


def settle(case: Case, model: nn.Module) -> None:
    """Make the outputs of a new model depend on its inputs.

    Layers whose weights start as zeros, as some heads do, draw random ones. One batch sets the statistics of batch
    norms: with those of a new model, a deep one outputs its last bias.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) and not layer.weight.any():
            layer.reset_parameters()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        call(model, draw(case, 4, 5))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def reached(case: Case, model: nn.Module) -> set[str]:
    """Names of the parameters that get a gradient in a training step of the model itself.

    Raises:
        ValueError: Its outputs are such that a comparison would mean nothing.
    """
    own = copy.deepcopy(model).eval()
    with torch.no_grad():
        one, two = (call(own, draw(case, 2, seed)) for seed in (3, 4))
    if not any(bool(leaf.isfinite().any()) for leaf in tensors(one)):
        raise ValueError("no output is finite, so nothing could be compared")
    if difference(one, two) == 0.0:
        raise ValueError("no output depends on the inputs")
    own.train()
    loss_of(call(own, draw(case, 2, 3))).backward()
    return {name for name, parameter in own.named_parameters() if parameter.grad is not None}


class Reference:
    """A copy of a model that trains from ``boundary``: by our own recording, not by the package's freeze.

    Parameters first used before the boundary's first call get no gradient. Modules whose first call has ended by then
    are in eval mode whenever it trains.
    """

    def __init__(self, model: nn.Module, recording: Recording, boundary: str) -> None:
        self.model = copy.deepcopy(model)
        start = recording.starts[boundary]
        for name, parameter in self.model.named_parameters():
            if recording.parameters.get(name, start + 1) <= start:
                parameter.requires_grad_(False)
        order = list(recording.starts)
        early = order[: order.index(boundary)]  # time stands still between calls that compute nothing: order decides
        self.early = [
            n for n in early if n and recording.ends.get(n, start + 1) <= start and not boundary.startswith(f"{n}.")
        ]

    def frozen(self) -> set[str]:
        """Names of the parameters without gradient."""
        return {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}

    def train(self) -> None:
        """``model.train()``, with what ran before the boundary in eval mode."""
        self.model.train()
        for name in self.early:
            self.model.get_submodule(name).eval()


def why_not(case: Case, model: nn.Module, recording: Recording, boundary: str) -> str | None:
    """Why no exact rows can exist here, found by running the model itself; None where nothing stands in the way."""
    frozen = Reference(model, recording, boundary)
    reference = frozen.model.eval()
    inputs = draw(case, 3, 16)
    one, two = (_arrivals(reference, boundary, inputs, seed) for seed in (1, 2))
    if difference(one.values, two.values) > 0:
        return "the model itself is random before the boundary even in eval mode"
    frozen.train()
    if len({tuple(_arrivals(reference, boundary, inputs, seed).calls) for seed in range(_SEEDS)}) > 1:
        return "the model itself calls other modules before the boundary in every training step (random control flow)"
    reference.eval()
    one, two = (_arrivals(reference, boundary, pick(inputs, [0, other]), 1) for other in (1, 2))
    for a, b in zip(one.values, two.values, strict=False):
        if a.dim() and a.shape == b.shape and a.shape[0] % 2 == 0:
            half = a.shape[0] // 2
            if difference([a[:half]], [b[:half]]) > _OTHER_SAMPLES:
                return "the model itself makes a sample's value depend on its batch before the boundary"
    return None


def draws_before(case: Case, model: nn.Module, recording: Recording, boundary: str) -> bool:
    """Whether what enters the boundary is random in a training step of the model itself.

    So it is where a half-frozen parent calls a dropout by itself: what comes after the draw differs in every step, and
    must be computed in every step, frozen or not.
    """
    frozen = Reference(model, recording, boundary)
    frozen.train()
    one, two = (_arrivals(frozen.model, boundary, draw(case, 3, 16), seed) for seed in (1, 2))
    return difference(one.values, two.values) > 0


class _Arrived(BaseException):
    """The boundary was reached."""


@dataclass
class _Arrival:
    calls: list[str]
    values: list[Tensor]


def _arrivals(model: nn.Module, boundary: str, inputs: Any, seed: int) -> _Arrival:
    """Modules called up to the boundary's first call, and its arguments."""
    found = _Arrival([], [])

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            found.calls.append(name)
            if name == boundary or name.startswith(f"{boundary}."):
                found.values = [leaf.detach().clone() for leaf in tensors((args, kwargs))]
                raise _Arrived

        return hook

    named = model.named_modules(remove_duplicate=False)
    handles = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in named]
    torch.manual_seed(seed)
    try:
        with torch.no_grad(), suppress(_Arrived):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
