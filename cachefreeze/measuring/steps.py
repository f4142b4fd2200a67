"""How long one training step from each block on takes: all of them from one forward and one backward.

A step from block c on is the forward from c on, the loss, and the backward down to c. The backward of the whole model
passes every block, so hooks on gradients say when it does. Of block c itself the gradient of its input is not needed:
of its first layer with weights, about half of the backward goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachefreeze.batches import leaves_of
from cachefreeze.isolation import preserved_modes, preserved_random_state, preserved_state
from cachefreeze.measuring.forwards import called_names, tensors_of, wait
from cachefreeze.tracing import Example, Usage

Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

_REPEATS = 3
# Sizes from which the optimizer's step is read: its own, what a tensor adds, what an element adds.
_MANY, _SMALL, _LARGE = 32, 16, 1 << 19


def training_steps(
    model: nn.Module,
    usage: Usage,
    names: Sequence[str],
    example: Example,
    target: Tensor | None,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    optimizer: Optimizers,
    repeats: int,
    more: float,
) -> list[float]:
    """Seconds of one step from each block on, for ``more`` times the samples: forward, loss, backward, optimizer.

    Nothing is left behind: gradients are asked for and dropped, so that no ``.grad`` and no hook on one is touched.
    """
    device = next(model.parameters()).device
    starts = [usage.start(model, name) or 0 for name in names]
    used = [(event, model.get_parameter(name).numel()) for name, event in usage.parameters.items()]
    sizes = [[size for event, size in used if event >= start] for start in starts]
    shares = [len(after) / len(used) for after in sizes]
    with preserved_random_state(), preserved_modes(model), preserved_state(model), _trainable(model):
        model.train()
        recorded = [_one(model, usage, names, shares, example, target, loss_fn, device) for _ in range(1 + repeats)]
    passed = min(recorded[1:], key=max)  # the fastest, as that which least else came between
    stepping = _optimizer_seconds(device, optimizer)
    return [more * seconds + stepping(len(after), sum(after)) for seconds, after in zip(passed, sizes, strict=True)]


def _one(
    model: nn.Module,
    usage: Usage,
    names: Sequence[str],
    shares: Sequence[float],
    example: Example,
    target: Tensor | None,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    device: torch.device,
) -> list[float]:
    """Forward, loss and backward from each block on, of one instrumented pass over the whole model.

    A backward begins with a walk over all of its graph, of which a step from a block on has its share of the weights.
    """
    marks = _Marks(device)
    handles = marks.follow(model, usage, names)
    given = example.fresh()
    try:
        began = marks.now()
        output = given.call(model)
    finally:
        for handle in handles:
            handle.remove()
    forwarded = marks.now()
    loss = _loss(output, target, loss_fn)
    wanted = [p for p in model.parameters() if p.requires_grad]
    marks.watch(loss)
    lost = marks.now()
    torch.autograd.grad(loss, wanted, allow_unused=True)
    ended = marks.now()
    found, entered = [0.0] * len(names), forwarded
    passed = ended
    walked = marks.started - lost
    for index, (name, share) in enumerate(zip(names, shares, strict=True)):
        # backwards runs from the last block to the first: a block that was not seen is passed when the one before is
        through = marks.inputs.get(name, passed)
        first = min(marks.first.get(name, through), through)
        begins = marks.entered.get(name, began if index == 0 else entered)
        found[index] = (first - begins) - walked * (1 - share) + (through - first) / 2
        passed, entered = through, begins
    return found


class _Marks:
    """When each block was entered, when the backward began, and when it reached a block's first layer and its input."""

    def __init__(self, device: torch.device) -> None:
        self.started = 0.0
        self.entered: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.inputs: dict[str, float] = {}
        self._device = device

    def now(self) -> float:
        wait(self._device)
        return time.perf_counter()

    def follow(self, model: nn.Module, usage: Usage, names: Sequence[str]) -> list[Any]:
        """Hooks that take note of the next forward and of its backward."""
        handles: list[Any] = []
        for name, called in called_names(model, usage, names).items():
            module = model.get_submodule(called)
            handles.append(module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True))
            layer = _first_layer(model, usage, called)
            if layer is not None:
                handles.append(layer.register_forward_hook(partial(self._layer, name)))
        return handles

    def watch(self, loss: Tensor) -> None:
        """The next backward begins at ``loss``."""

        def note(gradient: Tensor) -> None:
            self.started = self.now()

        loss.register_hook(note)  # type: ignore[no-untyped-call]

    def _enter(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        if name not in self.entered:
            for tensor in tensors_of((args, kwargs)):
                self._watch(tensor, self.inputs, name)
            self.entered[name] = self.now()

    def _layer(self, name: str, _: nn.Module, args: Any, output: Any) -> None:
        for tensor in tensors_of(output):
            self._watch(tensor, self.first, name)

    def _watch(self, tensor: Tensor, noted: dict[str, float], name: str) -> None:
        def note(gradient: Tensor) -> None:
            noted[name] = self.now()

        if tensor.requires_grad:
            tensor.register_hook(note)  # type: ignore[no-untyped-call]


def _first_layer(model: nn.Module, usage: Usage, called: str) -> nn.Module | None:
    """The first module with weights of its own that runs within a block."""
    for call in usage.calls:
        if call.name == called or call.name.startswith(f"{called}."):
            module = model.get_submodule(call.name)
            if next(module.parameters(recurse=False), None) is not None:
                return module
    return None


def _loss(output: Any, target: Tensor | None, loss_fn: Callable[[Any, Any], Tensor] | None) -> Tensor:
    if loss_fn is not None:
        return loss_fn(output, target)
    leaves = [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor)]
    made = [tensor for tensor in leaves if tensor.is_floating_point() and tensor.requires_grad]
    if len(made) == 1 and target is not None and _classifies(made[0], target):
        return functional.cross_entropy(made[0], target)
    return torch.stack([tensor.float().square().mean() for tensor in made]).sum()


def _classifies(output: Tensor, target: Tensor) -> bool:
    """Whether output and target are those of a classifier."""
    if output.dim() != 2 or target.dim() != 1 or target.dtype != torch.int64:
        return False
    return bool((target >= 0).all() and (target < output.shape[1]).all())


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """Every weight asks for gradients inside; flags are as before on exit."""
    flags = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _optimizer_seconds(device: torch.device, optimizer: Optimizers) -> Callable[[int, int], float]:
    """Seconds of a step over some tensors of some elements together, from three steps over small ones."""

    def seconds(count: int, elements: int) -> float:
        parameters = [nn.Parameter(torch.zeros(elements, device=device)) for _ in range(count)]
        made = optimizer(parameters)
        times = []
        for _ in range(1 + _REPEATS):
            made.zero_grad(set_to_none=True)
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            wait(device)
            began = time.perf_counter()
            made.step()
            wait(device)
            times.append(time.perf_counter() - began)
        return min(times[1:])

    one, many, large = seconds(1, _SMALL), seconds(_MANY, _SMALL), seconds(1, _LARGE)
    a_tensor = max(0.0, many - one) / (_MANY - 1)
    an_element = max(0.0, large - one) / (_LARGE - _SMALL)
    return lambda tensors, elements: max(0.0, one - a_tensor) + tensors * a_tensor + elements * an_element
