"""Traps of chance: random numbers on both sides of the boundary, random control flow."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cachefreeze.testing.trap_table import TrapTable, linear

table = TrapTable()


@table("mid", mid=linear())
def dropout_function_after(self: Any, x: Tensor) -> Any:
    """Functional dropout behind the boundary."""
    z = functional.dropout(self.mid(self.stem(x)), 0.5, self.training)
    return self.head(z)


@table("mid", mid=linear())
def noise_in_training(self: Any, x: Tensor) -> Any:
    """Noise on a frozen value behind the boundary, in train mode."""
    y = self.stem(x)
    z = self.mid(y)
    return self.head(z + torch.randn_like(y) if self.training else z)


class _StochasticDepth(nn.Module):
    """Skips its layer for some samples in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.training:
            y = y * torch.empty(x.shape[0], 1).bernoulli_(0.5)
        return x + y


@table("mid", stem=_StochasticDepth, mid=_StochasticDepth)
def stochastic_depth(self: Any, x: Tensor) -> Any:
    """Stochastic depth per sample on both sides; the frozen one rests."""
    return self.head(self.mid(self.stem(x)))


@table("mid", mid=linear())
def gumbel_after(self: Any, x: Tensor) -> Any:
    """Gumbel noise behind the boundary, in eval mode too."""
    return self.head(functional.gumbel_softmax(self.mid(self.stem(x)), tau=0.5))


@table("mid", mid=linear(), refused="draws random numbers")
def gumbel_before(self: Any, x: Tensor) -> Any:
    """Gumbel noise before the boundary, in eval mode too."""
    y = functional.gumbel_softmax(self.stem(x), tau=0.5)
    return self.head(self.mid(y))


@table("mid", mid=linear(), refused="")
def variational(self: Any, x: Tensor) -> Any:
    """Reparametrised sampling behind the boundary."""
    z = self.mid(self.stem(x))
    return self.head(z + torch.randn(z.shape) * z.exp().sqrt())


@table("layers.1", layers=lambda: nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]), refused="random|another order")
def layer_drop(self: Any, x: Tensor) -> Any:
    """LayerDrop in eval mode too: layers are skipped at random."""
    for layer in self.layers:
        if torch.rand(()) > 0.5:
            x = layer(x)
    return self.head(self.stem(x))


@table("mid", mid=lambda: nn.Linear(6, 6), refused="random")
def layer_drop_frozen_in_training(self: Any, x: Tensor) -> Any:
    """LayerDrop of a frozen layer in train mode."""
    y = self.stem(x)
    if not self.training or torch.rand(()) > 0.5:
        y = self.stem(y)
    y = self.mid(y)
    return self.head(y)


@table("mid", mid=lambda: nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]))
def layer_drop_after(self: Any, x: Tensor) -> Any:
    """LayerDrop of all trained layers in train mode: the boundary itself may be skipped."""
    y = self.stem(x)
    for layer in self.mid:
        if not self.training or torch.rand(()) > 0.5:
            y = layer(y)
    return self.head(y)


@table("mid", mid=linear(), extra=linear(), tail=linear())
def layer_drop_behind(self: Any, x: Tensor) -> Any:
    """One trained layer is skipped at random in train mode."""
    y = self.mid(self.stem(x))
    if not self.training or torch.rand(()) > 0.5:
        y = self.extra(y)
    return self.head(y)


@table("mid", mid=linear(), extra=linear())
def dropped_with_python_random(self: Any, x: Tensor) -> Any:
    """One trained layer is skipped by Python's random in train mode."""
    y = self.mid(self.stem(x))
    if not self.training or random.random() > 0.5:
        y = self.extra(y)
    return self.head(y)


@table("mid", mid=linear(), extra=linear())
def scaled_by_numpy_random(self: Any, x: Tensor) -> Any:
    """A scale is drawn from numpy in train mode, behind the boundary."""
    y = self.mid(self.stem(x))
    return self.head(y * float(np.random.rand()) if self.training else y)  # noqa: NPY002 - the global state is the trap


TRAPS, REFUSED = table.traps, table.refused
