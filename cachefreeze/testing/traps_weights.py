"""Traps of weights: parameters that are used without their module, and weights that are made of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from cachefreeze.testing.trap_table import TrapTable, linear
from cachefreeze.testing.traps import images, tokens, vectors

table = TrapTable()


@table("mid", mid=linear(), setup=lambda m: m.register_parameter("gain", nn.Parameter(torch.ones(6) * 2)))
def root_parameter_after(self: Any, x: Tensor) -> Any:
    """A parameter of the root is used behind the boundary."""
    return self.head(self.mid(self.stem(x)) * self.gain)


@table("mid", mid=linear(), setup=lambda m: m.register_parameter("gain", nn.Parameter(torch.ones(6) * 2)))
def root_parameter_before(self: Any, x: Tensor) -> Any:
    """A parameter of the root is used before the boundary and again behind it."""
    return self.head(self.mid(self.stem(x) * self.gain) * self.gain)


def _gain_list(model: Any) -> None:
    model.gains = nn.ParameterList([torch.full((6,), float(i + 1)) for i in range(3)])


@table("mid", mid=linear(), setup=_gain_list)
def parameter_list(self: Any, x: Tensor) -> Any:
    """A ParameterList of which one entry is used before the boundary and two behind it."""
    y = self.mid(self.stem(x) * self.gains[0])
    return self.head(y * self.gains[1] + self.gains[2])


def _gain_dict(model: Any) -> None:
    model.gains = nn.ParameterDict({"a": torch.ones(6), "b": torch.full((6,), 2.0)})


@table("mid", mid=linear(), setup=_gain_dict)
def parameter_dict(self: Any, x: Tensor) -> Any:
    """A ParameterDict of which one entry is used on each side."""
    return self.head(self.mid(self.stem(x) * self.gains["a"]) * self.gains["b"])


@table("mid", mid=linear())
def functional_weight(self: Any, x: Tensor) -> Any:
    """A frozen module's weights are used without calling it."""
    y = functional.linear(x, self.stem.weight, self.stem.bias)
    return self.head(self.mid(y))


@table("mid", mid=linear())
def functional_weight_after(self: Any, x: Tensor) -> Any:
    """A frozen module's weights are used once more behind the boundary."""
    z = self.mid(self.stem(x))
    return self.head(functional.linear(z, self.stem.weight))


@table("mid", mid=linear(), other=linear())
def tied_by_transposition(self: Any, x: Tensor) -> Any:
    """The suffix decodes with the frozen encoder's transposed weight."""
    z = self.mid(self.stem(x))
    return self.head(self.other(z)) + (z @ self.stem.weight.t())[:, :2]


@table(stem=lambda: parametrizations.weight_norm(nn.Linear(6, 6)))
def weight_norm_frozen(self: Any, x: Tensor) -> Any:
    """A weight-normed layer before the boundary."""
    return self.head(self.stem(x))


@table(head=lambda: parametrizations.weight_norm(nn.Linear(6, 2)))
def weight_norm_trained(self: Any, x: Tensor) -> Any:
    """A weight-normed boundary."""
    return self.head(self.stem(x))


@table(stem=lambda: parametrizations.spectral_norm(nn.Linear(6, 6)))
def spectral_norm_frozen(self: Any, x: Tensor) -> Any:
    """Spectral norm before the boundary: its power iteration must rest."""
    return self.head(self.stem(x))


@table(head=lambda: parametrizations.spectral_norm(nn.Linear(6, 2)))
def spectral_norm_trained(self: Any, x: Tensor) -> Any:
    """Spectral norm at the boundary: its power iteration runs once a step."""
    return self.head(self.stem(x))


@table(stem=lambda: parametrizations.orthogonal(nn.Linear(6, 6)))
def orthogonal_frozen(self: Any, x: Tensor) -> Any:
    """An orthogonal layer before the boundary."""
    return self.head(self.stem(x))


class Symmetric(nn.Module):
    """A user's parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        """The symmetric part."""
        return x.triu() + x.triu(1).transpose(-1, -2)


def _symmetric() -> nn.Module:
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


@table("mid", stem=_symmetric, mid=_symmetric)
def parametrized(self: Any, x: Tensor) -> Any:
    """A user's parametrization on both sides."""
    return self.head(self.mid(self.stem(x)).relu())


# a trace has no context managers: the weight is made twice, and its gradient summed in another order
@table("mid", mid=_symmetric, tolerance=1e-6)
def parametrized_cached(self: Any, x: Tensor) -> Any:
    """Parametrizations under ``parametrize.cached``."""
    with parametrize.cached():
        return self.head(self.mid(self.mid(self.stem(x))))


def _old_weight_norm() -> nn.Module:
    with torch.no_grad():
        return nn.utils.spectral_norm(nn.Linear(6, 6))


@table("mid", stem=_old_weight_norm, mid=linear())
def old_spectral_norm_frozen(self: Any, x: Tensor) -> Any:
    """Spectral norm by a forward pre-hook, before the boundary."""
    return self.head(self.mid(self.stem(x)))


@table("mid", mid=_old_weight_norm)
def old_spectral_norm_trained(self: Any, x: Tensor) -> Any:
    """Spectral norm by a forward pre-hook, at the boundary."""
    return self.head(self.mid(self.stem(x)))


def _standardised() -> nn.Module:
    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = functional.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
            return functional.conv2d(input, weight, self.bias, padding=1)

    return Standardised(3, 4, 3)


@table(inputs=images, stem=_standardised, head=linear(2, 4))
def weight_standardisation(self: Any, x: Tensor) -> Any:
    """``batch_norm(training=True)`` of weights is no batch statistic."""
    return self.head(self.stem(x).relu().mean((2, 3)))


@table(inputs=tokens, stem=lambda: nn.Embedding(11, 6, padding_idx=0))
def padding_index(self: Any, ids: Tensor) -> Any:
    """An embedding with a padding index."""
    return self.head(self.stem(ids))


@table("mid", inputs=tokens, stem=lambda: nn.Embedding(11, 6, max_norm=0.5), mid=linear())
def embedding_max_norm(self: Any, ids: Tensor) -> Any:
    """``max_norm`` rewrites the frozen embedding's weights in its forward."""
    return self.head(self.mid(self.stem(ids)))


@table("embed", inputs=tokens, stem=lambda: nn.Embedding(11, 6), embed=lambda: nn.Embedding(11, 6, max_norm=0.5))
def embedding_max_norm_trained(self: Any, ids: Tensor) -> Any:
    """``max_norm`` rewrites the trained embedding's weights in its forward."""
    return self.head(self.stem(ids) + self.embed(ids))


@table("embed", inputs=tokens, stem=lambda: nn.Embedding(11, 6), embed=lambda: nn.Embedding(11, 6, sparse=True))
def sparse_gradients(self: Any, ids: Tensor) -> Any:
    """The trained embedding has sparse gradients; the ids cross."""
    return self.head(self.stem(ids) + self.embed(ids))


class _Lazy(nn.Module):
    """Makes a weight on first use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LazyLinear(6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def _lazy() -> nn.Module:
    layer = _Lazy()
    layer(vectors())
    return layer


@table("mid", mid=_lazy)
def lazy_linear(self: Any, x: Tensor) -> Any:
    """A lazy layer that was initialised before the split."""
    return self.head(self.mid(self.stem(x)))


TRAPS, REFUSED = table.traps, table.refused
