"""Traps of inputs and outputs: what a forward is given and what it returns."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cachefreeze.testing.trap_table import TrapTable, linear
from cachefreeze.testing.traps import ROWS, vectors

table = TrapTable()


@table("mid", mid=linear(), inputs=lambda: {"x": vectors(), "scale": 2.0, "features": True, "name": "a"})
def plain_keyword_inputs(self: Any, x: Tensor, scale: float = 1.0, features: bool = False, name: str = "") -> Any:
    """Numbers, flags and strings are among the inputs."""
    y = self.stem(x) * scale
    out = self.head(self.mid(y) * scale)
    return {"out": out, "features": y, name: out * 2} if features else out


@table("mid", mid=linear(), inputs=lambda: (vectors(), vectors() * 2))
def variable_arguments(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``*args, **kwargs``."""
    x, y = args
    return self.head(self.mid(self.stem(x)) + y, **kwargs)


@table("mid", mid=linear(), inputs=lambda: {"x": vectors(), "y": vectors() * 2})
def variable_keywords(self: Any, **kwargs: Any) -> Any:
    """``**kwargs`` alone."""
    return self.head(self.mid(self.stem(kwargs["x"])) + kwargs["y"])


@table("mid", mid=linear(), inputs=lambda: {"x": vectors(), "mask": None})
def none_input(self: Any, x: Tensor, mask: Tensor | None = None) -> Any:
    """None is given for an optional input."""
    y = self.stem(x) if mask is None else self.stem(x) * mask
    return self.head(self.mid(y))


@table("mid", mid=linear(), inputs=lambda: ([vectors(), vectors() * 2],))
def list_input(self: Any, xs: list[Tensor]) -> Any:
    """The input is a list of tensors."""
    return self.head(self.mid(self.stem(xs[0])) + xs[1])


@table("mid", mid=linear(), inputs=lambda: ({"a": vectors(), "b": vectors() * 2},))
def dict_input(self: Any, x: dict[str, Tensor]) -> Any:
    """The input is one dict of tensors."""
    return self.head(self.mid(self.stem(x["a"])) + x["b"])


@table("mid", mid=linear(), refused="no batch dimension", inputs=lambda: (vectors(), torch.tensor(2.0)))
def scalar_input(self: Any, x: Tensor, temperature: Tensor) -> Any:
    """A tensor without a batch dimension is used behind the boundary."""
    return self.head(self.mid(self.stem(x)) / temperature)


@table("mid", mid=linear(), inputs=lambda: (vectors(), torch.tensor(2.0)))
def scalar_input_before(self: Any, x: Tensor, temperature: Tensor) -> Any:
    """A tensor without a batch dimension is used before the boundary alone."""
    return self.head(self.mid(self.stem(x) / temperature))


@table("mid", mid=linear(), refused="no batch dimension", inputs=lambda: (vectors(), torch.arange(6.0)))
def input_without_batch(self: Any, x: Tensor, weights: Tensor) -> Any:
    """A vector of weights for the features is given beside the batch."""
    return self.head(self.mid(self.stem(x)) * weights)


@table("mid", mid=linear(), inputs=lambda: (vectors(), None, vectors() > 0))
def positional_none(self: Any, x: Tensor, bias: Tensor | None, mask: Tensor) -> Any:
    """A positional None in between, and a mask."""
    y = self.stem(x) if bias is None else self.stem(x) + bias
    return self.head(self.mid(y).masked_fill(mask, 0.0))


Tagged = namedtuple("Tagged", ["value", "kind"])


@table("mid", mid=linear())
def ordered_output(self: Any, x: Tensor) -> Any:
    """An OrderedDict of a namedtuple, a list, a None and a number."""
    y = self.stem(x)
    z = self.mid(y)
    return OrderedDict(one=Tagged(self.head(z), "logits"), two=[y, [z]], three=None, four=3)


@table("mid", mid=linear())
def same_tensor_twice_in_the_output(self: Any, x: Tensor) -> Any:
    """The output names one tensor twice, and the input itself."""
    y = self.stem(x)
    z = self.head(self.mid(y))
    return {"x": x, "y": y, "again": y, "z": (z, z)}


@table("mid", mid=linear())
def scalar_output(self: Any, x: Tensor) -> Any:
    """The output is a loss, a scalar."""
    return self.head(self.mid(self.stem(x))).square().mean()


@table("mid", mid=linear(), inputs=lambda: {"x": vectors(), "y": torch.tensor([0, 1, 1, 0])})
def loss_inside(self: Any, x: Tensor, y: Tensor | None = None) -> Any:
    """Labels enter the forward and a loss comes out."""
    logits = self.head(self.mid(self.stem(x)))
    return (functional.cross_entropy(logits, y), logits) if y is not None else logits


@table("mid", mid=linear(), inputs=lambda: {"x": vectors(), "y": torch.tensor([2, 1, 3, 0])})
def labels_are_checked(self: Any, x: Tensor, y: Tensor) -> Any:
    """Before anything runs, labels out of range are an error of the model's own, as in models of speech."""
    if y.max() >= 6:
        raise ValueError("labels beyond the classes")
    logits = self.mid(self.stem(x))
    return (functional.cross_entropy(logits, y), self.head(logits))


@table("mid", mid=linear(), inputs=lambda: {"x": vectors(), "y": torch.tensor([0, 1, 3, 0])}, refused="reads a value")
def labels_choose_the_way(self: Any, x: Tensor, y: Tensor) -> Any:
    """A label of any sample changes all rows. Those of the first samples alone look like a mask."""
    h = self.stem(x)
    return self.head(self.mid(h * 2 if y.max() >= 6 else h)) + y[:, None]


@table("mid", mid=linear(), inputs=lambda: {"x": vectors(), "y": torch.tensor([2, 1, 3, 0])}, refused="reads a value")
def labels_choose_the_way_to_an_error(self: Any, x: Tensor, y: Tensor) -> Any:
    """The other way fails on these inputs, but later: it was no check."""
    h = self.stem(x)
    return self.head(self.mid(h @ torch.ones(3, 6) if y.max() >= 6 else h)) + y[:, None]


@table("mid", mid=linear())
def detached_output(self: Any, x: Tensor) -> Any:
    """One output needs no gradient."""
    z = self.mid(self.stem(x))
    return {"out": self.head(z), "features": z.detach(), "best": z.argmax(1)}


@table("mid", mid=linear())
def structure_depends_on_training(self: Any, x: Tensor) -> Any:
    """In train mode auxiliary outputs come beside the logits."""
    y = self.stem(x)
    z = self.mid(y)
    return (self.head(z), y, z) if self.training else self.head(z)


@table("mid", mid=linear(), inputs=lambda: (vectors().repeat(1, 3).view(ROWS, 3, 6), torch.arange(ROWS)))
def gathered_by_index(self: Any, x: Tensor, at: Tensor) -> Any:
    """Each sample picks one of its steps by an index input."""
    y = self.stem(x)
    picked = y[torch.arange(x.shape[0]), at % 3]
    return self.head(self.mid(picked))


TRAPS, REFUSED = table.traps, table.refused
