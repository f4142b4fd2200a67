"""Operations of all heads in one: what heads share runs once, linear layers and cross entropies run as larger ones.

``SideBySide`` knows these and activations and nothing else. ``SharedInput`` does the same beneath ``torch.func.vmap``,
which knows nearly all operations and takes ten times as long to get to each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# What ``CrossEntropyLoss`` says beside ``ignore_index`` where it is made without arguments.
_PLAIN = {"weight": None, "size_average": None, "reduce": None, "reduction": "mean", "label_smoothing": 0.0}


class UnknownOperationError(Exception):
    """Heads need ``vmap`` for it. Never leaves the package."""


# Of each number on its own, whatever dimensions there are.
_ACTIVATIONS = (
    functional.relu, functional.relu6, functional.leaky_relu, functional.elu, functional.gelu, functional.silu,
    functional.mish, functional.softplus, functional.sigmoid, functional.tanh, functional.hardtanh,
    functional.hardswish, functional.hardsigmoid, torch.relu, torch.tanh, torch.sigmoid,
)  # fmt: skip


class SideBySide(TorchFunctionMode):
    """Linear layers, activations and cross entropies of all heads; what they share runs once, as it is.

    Args:
        of_all: Tensors of all heads, in their first dimension.

    Raises:
        UnknownOperationError: Another operation is given one of these, or one that was made of them.
    """

    def __init__(self, of_all: Sequence[Tensor]) -> None:
        super().__init__()
        self._of_all = {id(tensor): tensor for tensor in of_all}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(self._is_of_all(value) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        found = self._compute(func, args, kwargs)
        self._of_all[id(found)] = found
        return found

    def with_heads(self, made: Any, count: int) -> Any:
        """What a module made, every tensor with a first dimension of ``count``."""

        def of_all(leaf: Any) -> Tensor:
            if not isinstance(leaf, Tensor):
                raise UnknownOperationError(f"an output of type {type(leaf).__name__}")
            return leaf if self._is_of_all(leaf) else leaf.expand(count, *leaf.shape)

        # walking a tree takes as long as a small head
        return of_all(made) if isinstance(made, Tensor) else pytree.tree_map(of_all, made)

    def _is_of_all(self, value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(self._is_of_all(part) for part in value)
        return id(value) in self._of_all

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        if func is functional.linear and len(args) == 3 and not kwargs:
            input, weight, bias = args
            if self._is_of_all(weight) and (bias is None or self._is_of_all(bias)):
                return _linear_of_each(*args) if self._is_of_all(input) else _linear(*args)
        if func in _ACTIVATIONS:
            made: Tensor = func(*args, **kwargs)
            return made
        if func is functional.cross_entropy and len(args) == 2 and _is_plain(kwargs):
            output, target = args
            if output.dim() == 3 and target.dim() == 1 and not self._is_of_all(target):
                return _cross_entropy(output, target, kwargs.get("ignore_index", -100))
        raise UnknownOperationError(getattr(func, "__name__", str(func)))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of one input (*batch, in) with (heads, out, in): (heads, *batch, out), one matrix product."""
    joined = functional.linear(input, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return joined.view(*joined.shape[:-1], len(weight), -1).movedim(-2, 0)


def _linear_of_each(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of each head's input (heads, *batch, in) with (heads, out, in): (heads, *batch, out)."""
    rows, transposed = input.flatten(1, -2), weight.transpose(1, 2)
    made = torch.bmm(rows, transposed) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, transposed)
    return made.view(*input.shape[:-1], -1)


def _cross_entropy(output: Tensor, target: Tensor, ignored: int) -> Tensor:
    """The mean cross entropies (heads,) of (heads, batch, classes) with one target (batch,)."""
    heads, batch, classes = output.shape
    outputs = output.transpose(0, 1).reshape(batch * heads, classes)
    targets = target.unsqueeze(1).expand(batch, heads).reshape(-1)
    each = functional.cross_entropy(outputs, targets, ignore_index=ignored, reduction="none")
    return each.view(batch, heads).sum(0) / (target != ignored).sum()


class SharedInput(TorchFunctionMode):
    """What heads share need not be as often as there are heads, as it is for vmap: inputs of layers, and targets.

    Linear layers of all heads on one input are one matrix product, and their cross entropies with one target are that
    of a picture with a head at each pixel, in a third of the time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and not kwargs and len(args) == 3:
            return _SharedLinear.apply(*args)
        if func is functional.cross_entropy and len(args) == 2 and _is_plain(kwargs):
            output, target = args
            if output.dim() == 2 and target.dim() == 1:
                return _SharedTarget.apply(output, target, kwargs.get("ignore_index", -100))
        return func(*args, **kwargs)


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # weights that train differ between heads and go through vmap below: here are frozen ones only
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.to(gradients[0].dtype), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        if in_dims[0] is not None or in_dims[1] != 0 or (bias is not None and in_dims[2] != 0):
            return vmap(functional.linear, in_dims=in_dims)(input, weight, bias), 0
        return _linear(input, weight, bias), 0


def _is_plain(kwargs: dict[str, Any]) -> bool:
    return all(key == "ignore_index" or (key in _PLAIN and value == _PLAIN[key]) for key, value in kwargs.items())


class _SharedTarget(torch.autograd.Function):
    """The mean cross entropy of (N, classes) with (N,) classes."""

    @staticmethod
    def forward(output: Tensor, target: Tensor, ignored: int) -> Tensor:
        return functional.cross_entropy(output, target, ignore_index=ignored)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.ignored = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # what trains differs between heads and goes through vmap below
        output, target = ctx.saved_tensors
        with torch.enable_grad():
            again = output.detach().requires_grad_()
            loss = functional.cross_entropy(again, target, ignore_index=ctx.ignored)
        return torch.autograd.grad(loss, again, gradients[0])[0], None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, output: Tensor, target: Tensor, ignored: int) -> tuple[Tensor, int]:
        if in_dims[0] is None or in_dims[1] is not None:
            alone = partial(functional.cross_entropy, ignore_index=ignored)
            return vmap(alone, in_dims=in_dims[:2])(output, target), 0
        return _cross_entropy(output.movedim(in_dims[0], 0), target, ignored), 0
