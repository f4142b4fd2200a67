"""Traps of calls: who is called when, how often, with what arguments, and what comes back."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cachefreeze.testing.trap_table import TrapTable, linear
from cachefreeze.testing.traps import sequences, vectors

table = TrapTable()


@table("mid", mid=linear(), norm=lambda: nn.LayerNorm(6))
def called_three_times(self: Any, x: Tensor) -> Any:
    """One frozen norm is called twice before the boundary and once behind it."""
    y = self.norm(self.norm(self.stem(x)).relu())
    return self.head(self.norm(self.mid(y)))


@table("mid", mid=linear())
def boundary_called_twice(self: Any, x: Tensor) -> Any:
    """The boundary is called twice, the second time on a frozen value."""
    y = self.stem(x)
    return self.head(self.mid(y) + self.mid(y.relu()))


@table("mid", mid=linear())
def frozen_called_again(self: Any, x: Tensor) -> Any:
    """The frozen stem is called again on a value of the suffix; gradients flow through it."""
    y = self.stem(x)
    return self.head(self.stem(self.mid(y).relu()))


@table("mid", mid=linear())
def weights_applied_again(self: Any, x: Tensor) -> Any:
    """A loop of three steps through frozen and trained layers."""
    for _ in range(3):
        x = self.mid(self.stem(x)).relu()
    return self.head(x)


def _alias(model: Any) -> None:
    model.second = model.stem
    model.parts = nn.ModuleDict({"a": model.stem, "b": model.mid})


@table("mid", mid=linear(), setup=_alias)
def three_names(self: Any, x: Tensor) -> Any:
    """Modules have several names and are called by all of them."""
    y = self.second(x)
    return self.head(self.parts["b"](y) + self.parts["a"](x) + self.mid(y))


@table("layers.1", layers=lambda: nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]))
def reversed_loop(self: Any, x: Tensor) -> Any:
    """Layers run in reversed order: the last registered is the first frozen."""
    for layer in reversed(self.layers):
        x = layer(x).relu()
    return self.head(x)


@table("layers.1", layers=lambda: nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]))
def enumerated_with_skips(self: Any, x: Tensor) -> Any:
    """A U-shaped loop: outputs are kept in a list and popped."""
    kept = []
    for layer in self.layers:
        x = layer(x)
        kept.append(x)
    for at in range(3):
        x = x + kept.pop() * (at + 1)
    return self.head(x)


@table("mid", mid=linear())
def early_return(self: Any, x: Tensor, features: bool = False) -> Any:
    """An early return that a flag asks for."""
    y = self.stem(x)
    if features:
        return y
    return self.head(self.mid(y))


@dataclass
class Output:
    """What a model of the user's own returns."""

    logits: Tensor
    features: Tensor


@table("mid", mid=linear())
def dataclass_output(self: Any, x: Tensor) -> Any:
    """The output is a dataclass that pytrees do not know."""
    y = self.mid(self.stem(x))
    return Output(self.head(y), y)


@table("mid", mid=linear())
def try_except(self: Any, x: Tensor) -> Any:
    """A failed call is caught, another one takes its place."""
    y = self.stem(x)
    try:
        z = self.mid(y.unsqueeze(1).expand(-1, 2, -1).reshape(-1, 12))
    except RuntimeError:
        z = self.mid(y)
    return self.head(z)


class CallsItself(nn.Linear):
    """Overrides ``__call__``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Twice what the layer gives."""
        return super().__call__(*args, **kwargs) * 2


@table("mid", stem=lambda: CallsItself(6, 6), mid=lambda: CallsItself(6, 6))
def call_overridden(self: Any, x: Tensor) -> Any:
    """Modules override ``__call__`` on both sides."""
    return self.head(self.mid(self.stem(x)))


def _replaced(model: Any) -> None:
    for layer in (model.stem, model.mid):
        own = layer.forward
        layer.forward = functools.partial(_doubled, own)


def _doubled(own: Any, x: Tensor) -> Tensor:
    out: Tensor = own(x) * 2
    return out


@table("mid", mid=linear(), setup=_replaced)
def forward_replaced(self: Any, x: Tensor) -> Any:
    """The user has replaced ``forward`` on instances, on both sides."""
    return self.head(self.mid(self.stem(x)))


def _root_replaced(model: Any) -> None:
    own = model.forward
    model.forward = lambda x: own(x) * 2


@table("mid", mid=linear(), setup=_root_replaced)
def root_forward_replaced(self: Any, x: Tensor) -> Any:
    """The user has replaced the root's ``forward`` by one that encloses the old one."""
    return self.head(self.mid(self.stem(x)))


@table("mid", mid=linear())
def method_called(self: Any, x: Tensor) -> Any:
    """A frozen module's ``forward`` is called without its ``__call__``."""
    return self.head(self.mid(self.stem.forward(x)))


@table("mid", mid=linear())
def boundary_method_called(self: Any, x: Tensor) -> Any:
    """The boundary is called by its ``forward`` first."""
    y = self.stem(x)
    return self.head(self.mid.forward(y) + self.mid(y))


@table("mid", mid=linear())
def mutable_default(self: Any, x: Tensor, seen: list[int] = [0]) -> Any:  # noqa: B006 - the trap
    """A default argument is a list that the forward writes into."""
    seen[0] += 1
    return self.head(self.mid(self.stem(x)))


@table("mid", mid=linear())
def no_grad_inside(self: Any, x: Tensor) -> Any:
    """The forward itself runs a part without gradients."""
    with torch.no_grad():
        y = self.stem(x)
        z = self.mid(y)
    return self.head(self.mid(y) + z)


@table("mid", mid=linear())
def detached_branch(self: Any, x: Tensor) -> Any:
    """A stopped gradient behind the boundary."""
    z = self.mid(self.stem(x))
    return self.head(z + z.detach().relu())


@table("mid", mid=linear())
def float64_region(self: Any, x: Tensor) -> Any:
    """A stretch of double precision across the boundary."""
    y = self.stem(x).double()
    z = self.mid(y.float()).double()
    return self.head((z + y).float())


@table("mid", mid=linear())
def autocast_inside(self: Any, x: Tensor) -> Any:
    """The forward has an autocast region of its own across the boundary."""
    with torch.autocast("cpu", torch.bfloat16):
        y = self.stem(x)
        z = self.mid(y)
    return self.head(z.float() + y.float())


@table("mid", mid=linear())
def autocast_disabled_inside(self: Any, x: Tensor) -> Any:
    """The forward switches autocast off for a part."""
    y = self.stem(x)
    with torch.autocast("cpu", enabled=False):
        z = self.mid(y.float())
    return self.head(z)


@table("mid", mid=linear())
def depends_on_training(self: Any, x: Tensor) -> Any:
    """Behind the boundary the forward does something else in train mode."""
    z = self.mid(self.stem(x))
    return self.head(z) if self.training else self.head(z).softmax(1)


@table("mid", mid=linear(), aux=linear(2))
def auxiliary_head_in_training(self: Any, x: Tensor) -> Any:
    """An auxiliary head on frozen features runs in train mode only."""
    y = self.stem(x)
    z = self.head(self.mid(y))
    return z + self.aux(y) if self.training else z


@table("layers.1", inputs=sequences, layers=lambda: nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]))
def checkpointed(self: Any, x: Tensor) -> Any:
    """Activation checkpointing on both sides."""
    for layer in self.layers:
        x = checkpoint(layer, x, use_reentrant=False).relu()
    return self.head(x)


@table("layers.1", inputs=sequences,
       layers=lambda: nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)) for _ in range(3)]))  # fmt: skip
def checkpointed_dropout(self: Any, x: Tensor) -> Any:
    """Activation checkpointing of layers with dropout: the recomputation draws the same numbers."""
    for layer in self.layers:
        x = checkpoint(layer, x, use_reentrant=False)
    return self.head(x)


@table("layers.1", inputs=sequences, layers=lambda: nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]), extra=linear())
def checkpointed_reentrant(self: Any, x: Tensor) -> Any:
    """Reentrant checkpointing, of a trained layer behind a trained layer."""
    y = self.layers[1](self.layers[0](x))
    y = checkpoint(self.layers[2], y, use_reentrant=True) if self.training else self.layers[2](y)
    return self.head(self.extra(y))


@table("layers.1", layers=lambda: nn.ModuleList([nn.Linear(6, 6) for _ in range(2)]))
def checkpointed_across(self: Any, x: Tensor) -> Any:
    """One checkpointed function encloses frozen and trained layers."""

    def run(value: Tensor) -> Tensor:
        out: Tensor = self.layers[1](self.layers[0](value).relu())
        return out

    return self.head(checkpoint(run, x, use_reentrant=False))


@table("inner.mid", inner=lambda: _Inner())
def property_parameter(self: Any, x: Tensor) -> Any:
    """A property hands out a frozen module's weight behind the boundary."""
    return self.head(self.inner(self.stem(x)))


class _Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid = nn.Linear(6, 6), nn.Linear(6, 6)

    @property
    def scale(self) -> Tensor:
        return self.first.weight.mean(0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mid(self.first(x)) * self.scale
        return out


class _Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.mid(y) + self.inner(x)
        return out


@table("wrapped.inner.mid", wrapped=lambda: _Wrapper(_Inner()))
def attributes_forwarded(self: Any, x: Tensor) -> Any:
    """A wrapper hands out its inner module's children by ``__getattr__``."""
    return self.head(self.wrapped(self.stem(x)))


table.add(
    "data_parallel", lambda: nn.DataParallel(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))), vectors, "module.1"
)


@table("mid", mid=linear())
def generator_of_layers(self: Any, x: Tensor) -> Any:
    """Layers are called from a generator and by ``functools.reduce``."""
    y = functools.reduce(lambda value, layer: layer(value), (m for m in (self.stem, self.mid)), x)
    return self.head(y)


@table("mid", mid=linear())
def batch_size_used(self: Any, x: Tensor) -> Any:
    """The batch size is read before the boundary and used behind it, without harm."""
    rows = len(x)
    y = self.stem(x)
    z = self.mid(y)
    return self.head(z.view(rows, -1)) + torch.zeros(rows, 1)


@table("mid", mid=linear(), refused="number of samples|another order")
def looped_over_samples(self: Any, x: Tensor) -> Any:
    """The forward goes through its batch sample by sample before the boundary."""
    y = torch.stack([self.stem(row) for row in x])
    return self.head(self.mid(y))


@table("mid", mid=linear())
def looped_over_samples_after(self: Any, x: Tensor) -> Any:
    """The forward goes through its batch sample by sample behind the boundary."""
    y = self.stem(x)
    return self.head(torch.stack([self.mid(row) for row in y]))


@table("mid", mid=linear())
def asserts_its_shapes(self: Any, x: Tensor) -> Any:
    """Assertions and messages on shapes."""
    y = self.stem(x)
    assert y.shape == x.shape, f"{y.shape} {x.shape}"
    if y.size(-1) != 6 or y.ndim != 2 or y.dtype != torch.float32:
        raise ValueError("other features")
    return self.head(self.mid(y))


TRAPS, REFUSED = table.traps, table.refused
