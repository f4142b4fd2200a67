"""How a model is called, on which samples, and when two outputs are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils import _pytree as pytree

from covering.case import Case


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """``model(inputs)`` as its caller would write it, on tensors of its own."""
    own = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
    if isinstance(own, dict):
        return model(**own)
    return model(*own) if isinstance(own, tuple) else model(own)


def draw(case: Case, batch: int, seed: int) -> Any:
    """Inputs of ``batch`` samples."""
    return case.inputs(batch, Generator().manual_seed(seed))


def pick(inputs: Any, indices: list[int]) -> Any:
    """Samples of a batch."""
    return pytree.tree_map(lambda leaf: leaf[indices] if isinstance(leaf, Tensor) else leaf, inputs)


def difference(wanted: Any, got: Any) -> float:
    """The largest difference, relative to the largest magnitude in all of ``wanted``; inf where kinds differ."""
    wanted, got = pytree.tree_leaves(wanted), pytree.tree_leaves(got)
    if len(wanted) != len(got):
        return float("inf")
    scale, worst = 1e-6, 0.0
    for a, b in zip(wanted, got, strict=True):
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return float("inf")
        if not isinstance(a, Tensor):
            if type(a) is not type(b) or (isinstance(a, int | float | str | bool) and a != b):
                return float("inf")
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if torch.equal(a, b) or not a.numel():
            scale = max(scale, _magnitude(a))
            continue
        if not a.is_floating_point() or not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        scale = max(scale, _magnitude(a))
        finite = a.isfinite()
        gap = (a.detach().double() - b.detach().double())[finite]
        worst = max(worst, float(gap.abs().max())) if gap.numel() else worst
    return worst / scale


def _magnitude(tensor: Tensor) -> float:
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    return float(tensor.detach().nan_to_num(0.0, 0.0, 0.0).abs().max())


def loss_of(output: Any) -> Tensor:
    """A scalar that every floating leaf reaches, each element with a weight of its own."""
    generator = Generator().manual_seed(7)
    total = torch.zeros(())
    for leaf in tensors(output):
        if leaf.is_floating_point() and leaf.requires_grad:
            weights = torch.randn(leaf.shape, generator=generator)
            total = total + (leaf.float() * weights).masked_fill(~leaf.isfinite(), 0.0).mean()
    return total


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors among what a model returned."""
    return (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
