"""Traps of chance: random numbers on both sides of the boundary, random control flow."""

from __future__ import annotations

from typing import Any

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


TRAPS, REFUSED = table.traps, table.refused
