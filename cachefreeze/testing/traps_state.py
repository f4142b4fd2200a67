"""Traps of state: buffers, caches, attributes and hooks that a forward changes, weights made from weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachefreeze.testing.trap_table import TrapTable, linear
from cachefreeze.testing.traps import Chain, images, sequences

table = TrapTable()


class _Meter:
    """A plain object that counts, as a running mean of a metric does."""

    def __init__(self) -> None:
        self.calls, self.seen = 0, []  # type: ignore[var-annotated]


@table("mid", mid=linear(), setup=lambda m: setattr(m, "meter", _Meter()))
def metered(self: Any, x: Tensor) -> Any:
    """A plain object counts the forwards, and the output follows from it."""
    z = self.mid(self.stem(x))
    self.meter.calls += 1
    self.meter.seen.append(len(x))
    return self.head(z) / self.meter.calls


@table("mid", mid=linear(), setup=lambda m: setattr(m, "own", torch.Generator().manual_seed(5)))
def own_generator_after(self: Any, x: Tensor) -> Any:
    """Noise behind the boundary from a generator that the model keeps for itself."""
    z = self.mid(self.stem(x))
    return self.head(z + torch.randn(6, generator=self.own))


@table("mid", mid=linear(), setup=lambda m: setattr(m, "own", torch.Generator().manual_seed(5)), refused="draws|random")
def own_generator_before(self: Any, x: Tensor) -> Any:
    """Noise before the boundary from a generator that the model keeps for itself."""
    return self.head(self.mid(self.stem(x) + torch.randn(6, generator=self.own)))


class _NoisyLinear(nn.Linear):
    """Adds noise from a generator of its own, in eval mode too."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.own = torch.Generator().manual_seed(5)

    def forward(self, input: Tensor) -> Tensor:
        """The layer with noise."""
        return super().forward(input) + torch.randn(6, generator=self.own)


@table(stem=_NoisyLinear, refused="draws random numbers")
def own_generator_in_a_frozen_layer(self: Any, x: Tensor) -> Any:
    """A frozen layer draws from a generator of its own."""
    return self.head(self.stem(x))


def _counter(model: Any) -> None:
    model.register_buffer("calls", torch.zeros((), dtype=torch.long))


@table(setup=_counter)
def counted(self: Any, x: Tensor) -> Any:
    """The root counts its training steps in a buffer, before the boundary."""
    if self.training:
        self.calls += 1
    return self.head(self.stem(x))


@table("mid", mid=linear(), setup=_counter)
def counted_after(self: Any, x: Tensor) -> Any:
    """The root counts its training steps in a buffer, behind the boundary, and scales by it."""
    z = self.mid(self.stem(x))
    if self.training:
        self.calls += 1
    return self.head(z / (1 + self.calls))


@table("mid", mid=linear(), setup=_counter)
def count_read_before(self: Any, x: Tensor) -> Any:
    """A buffer that the suffix changes is read before the boundary."""
    scale = 1.0 + self.calls
    z = self.mid(self.stem(x))
    if self.training:
        self.calls.add_(1)
    return self.head(z * scale)


@table("mid", mid=linear(), setup=lambda m: m.register_buffer("mean", torch.zeros(6)))
def moving_average_of_features(self: Any, x: Tensor) -> Any:
    """An average of what the frozen part makes, kept by the root and used behind the boundary."""
    y = self.stem(x)
    z = self.mid(y)
    if self.training:
        self.mean.lerp_(y.detach().mean(0), 0.1)
    return self.head(z - self.mean)


@table("mid", mid=linear(), setup=lambda m: m.register_buffer("mean", torch.zeros(6)))
def decaying_average_of_features(self: Any, x: Tensor) -> Any:
    """The same, decayed by an operation of its own, which shows nothing at the first step: zeros stay zeros."""
    y = self.stem(x)
    z = self.mid(y)
    if self.training:
        self.mean.mul_(0.9).add_(0.1 * y.detach().mean(0))
    return self.head(z - self.mean)


@table("mid", mid=linear(), setup=lambda m: setattr(m, "seen", 0))
def counted_in_an_attribute(self: Any, x: Tensor) -> Any:
    """A Python number counts the training steps; the loss is annealed by it."""
    z = self.mid(self.stem(x))
    if self.training:
        self.seen += 1
    return self.head(z) / (1 + self.seen)


@table("mid", mid=linear(), setup=lambda m: setattr(m, "seen", 0))
def changes_after_some_steps(self: Any, x: Tensor) -> Any:
    """A Python number counts the forwards in train mode; after five of them the forward changes."""
    z = self.mid(self.stem(x))
    if self.training:
        self.seen += 1
        if self.seen > 5:
            z = z.relu()
    return self.head(z)


@table("mid", mid=linear(), setup=lambda m: setattr(m, "history", []))
def changes_with_a_list(self: Any, x: Tensor) -> Any:
    """A Python list grows with every forward; from eight entries on the forward changes."""
    z = self.mid(self.stem(x))
    self.history.append(x.shape[0])
    return self.head(z.relu() if len(self.history) > 8 else z)


@table("mid", mid=linear(), setup=lambda m: m.register_buffer("calls", torch.zeros((), dtype=torch.long)))
def changes_with_a_buffer(self: Any, x: Tensor) -> Any:
    """A buffer counts the steps in train mode; after five of them the forward changes."""
    z = self.mid(self.stem(x))
    if self.training:
        self.calls += 1
        if self.calls > 5:
            z = z.relu()
    return self.head(z)


@table("mid", mid=linear(), setup=lambda m: setattr(m, "last", None))
def keeps_its_features(self: Any, x: Tensor) -> Any:
    """The forward leaves its features in an attribute and reads them back."""
    y = self.stem(x)
    self.last = y
    z = self.mid(y)
    return self.head(z + self.last)


@table("mid", mid=linear(), setup=lambda m: setattr(m, "losses", []))
def collects_losses(self: Any, x: Tensor) -> Any:
    """The forward collects auxiliary losses in a list of its own and empties it."""
    self.losses.clear()
    y = self.stem(x)
    self.losses.append(y.square().mean(1))
    z = self.mid(y)
    self.losses.append(z.square().mean(1))
    return self.head(z) + sum(self.losses)[:, None]


@table("mid", inputs=sequences, mid=linear(), setup=lambda m: setattr(m, "tables", {}))
def cached_positions(self: Any, x: Tensor) -> Any:
    """Positions are made on first use and kept in a dict by length."""
    length = x.shape[1]
    if length not in self.tables:
        self.tables[length] = torch.arange(length, dtype=x.dtype)[None, :, None] / length
    y = self.stem(x) + self.tables[length]
    return self.head(self.mid(y) + self.tables[length])


@table("mid", inputs=sequences, mid=linear(), setup=lambda m: m.register_buffer("cached", None, persistent=False))
def cached_mask_buffer(self: Any, x: Tensor) -> Any:
    """A buffer that is None until the first forward."""
    if self.cached is None or self.cached.shape[0] < x.shape[1]:
        self.cached = torch.ones(x.shape[1], x.shape[1]).tril()
    y = self.cached[: x.shape[1], : x.shape[1]] @ self.stem(x)
    return self.head(self.cached[: x.shape[1], : x.shape[1]] @ self.mid(y))


@table("mid", mid=linear(), setup=lambda m: setattr(m, "scale", torch.tensor(2.0)))
def plain_tensor_attribute(self: Any, x: Tensor) -> Any:
    """A tensor that is neither parameter nor buffer."""
    return self.head(self.mid(self.stem(x) * self.scale) * self.scale)


@table(stem=lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=None)),
       head=lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=None)))  # fmt: skip
def cumulative_batch_norm(self: Any, x: Tensor) -> Any:
    """Batch norm with a cumulative average on both sides."""
    return self.head(self.stem(x))


@table(stem=lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False)), norm=lambda: nn.BatchNorm1d(2))
def batch_norm_without_weights(self: Any, x: Tensor) -> Any:
    """Batch norm without weights before the boundary: no flag freezes it."""
    return self.norm(self.head(self.stem(x)))


@table(norm=lambda: nn.BatchNorm1d(6, affine=False))
def batch_norm_without_weights_at_the_boundary(self: Any, x: Tensor) -> Any:
    """Batch norm without weights between the last frozen layer and the boundary."""
    return self.head(self.norm(self.stem(x)))


@table(norm=lambda: nn.BatchNorm1d(2, track_running_stats=False))
def batch_statistics_after(self: Any, x: Tensor) -> Any:
    """Batch statistics even in eval mode, behind the boundary: they are not cached."""
    return self.norm(self.head(self.stem(x)))


@table(inputs=images, stem=lambda: nn.Conv2d(3, 4, 3), norm=lambda: nn.InstanceNorm2d(4, track_running_stats=True),
       head=linear(2, 4))  # fmt: skip
def instance_norm_with_statistics(self: Any, x: Tensor) -> Any:
    """Instance norm that keeps statistics, before the boundary."""
    return self.head(self.norm(self.stem(x)).relu().mean((2, 3)))


class _Norms(nn.Module):
    """Batch norm called on two inputs in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.norm(x) * self.norm(y)
        return out


@table("norms", mid=linear(), norms=_Norms)
def statistics_twice_a_step(self: Any, x: Tensor) -> Any:
    """One batch norm moves twice a step: two crossing values go through it."""
    y = self.stem(x)
    return self.head(self.norms(y, x))


def _hooked(kind: str) -> Any:
    def setup(model: Any) -> None:
        if kind == "forward":
            model.mid.register_forward_hook(lambda _m, _a, out: out * 2)
        elif kind == "prefix":
            model.stem.register_forward_hook(lambda _m, _a, out: out.relu())
        elif kind == "pre":
            model.mid.register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
        elif kind == "keywords":
            model.mid.register_forward_pre_hook(lambda _m, args, kw: ((args[0] * 3,), kw), with_kwargs=True)
        elif kind == "backward":
            model.mid.register_full_backward_hook(
                lambda _m, grads, _out: tuple(g if g is None else g * 2 for g in grads)
            )
        elif kind == "root":
            model.register_forward_hook(lambda _m, _a, out: out * 2)
        elif kind == "root_pre":
            model.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
        elif kind == "tensor":
            model.mid.weight.register_hook(lambda grad: grad * 3)

    return setup


def _stem_mid_head(self: Any, x: Tensor) -> Any:
    return self.head(self.mid(self.stem(x)).relu())


for _kind in ("forward", "prefix", "pre", "keywords", "backward", "root", "root_pre", "tensor"):
    _stem_mid_head.__name__ = f"hook_{_kind}"
    _stem_mid_head.__doc__ = f"A {_kind} hook."
    table("mid", mid=linear(), setup=_hooked(_kind))(_stem_mid_head)


def _forward_replaced(model: Any) -> None:
    model.mid.forward = lambda x: functional.linear(x, model.mid.weight) * 2


def _stem_forward_replaced(model: Any) -> None:
    own = model.stem.forward
    model.stem.forward = lambda x: own(x) * 2


@table("mid", mid=linear(), setup=lambda m: setattr(m.stem, "scale", 2.0))
def attribute_of_a_frozen_module(self: Any, x: Tensor) -> Any:
    """The forward reads a plain attribute of a frozen module behind the boundary."""
    return self.head(self.mid(self.stem(x)) * self.stem.scale)


table.add("batch_norm_eval_by_hand", lambda: _eval_norms(Chain()), images, "conv2")


def _eval_norms(model: nn.Module) -> nn.Module:
    """The user keeps every batch norm in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


TRAPS, REFUSED = table.traps, table.refused
