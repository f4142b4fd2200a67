"""Traps of memory: writes in place, views and aliases across the boundary, detached and copied values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachefreeze.testing.trap_table import TrapTable, careful, linear
from cachefreeze.testing.traps import images, sequences

table = TrapTable()


@table()
def added_in_place(self: Any, x: Tensor) -> Any:
    """Glue before the boundary adds in place."""
    y = self.stem(x)
    y += 1
    return self.head(y)


@table(head=careful(2), mid=linear())
def added_in_place_after(self: Any, x: Tensor) -> Any:
    """Behind the boundary the crossing value is written, then read."""
    y = self.stem(x)
    z = self.head(y)
    y += 1
    return z + self.mid(y)[:, :2]


@table("mid", mid=careful())
def written_between_two_reads(self: Any, x: Tensor) -> Any:
    """The boundary reads the old value, what follows the new one."""
    y = self.stem(x)
    z = self.mid(y)
    y.mul_(2).sub_(1)
    return self.head(z + y)


@table("mid", mid=linear(bias=False))
def input_written_after(self: Any, x: Tensor) -> Any:
    """The raw input crosses and is written behind the boundary."""
    y = self.stem(x)
    z = self.mid(y)
    x.relu_()
    return self.head(z + x)


@table("mid", mid=linear())
def input_written_before(self: Any, x: Tensor) -> Any:
    """The raw input is written before the boundary and read behind it."""
    y = self.stem(x)
    x.clamp_(min=0)
    return self.head(self.mid(y) + x)


@table("mid", mid=linear())
def input_written_through_a_view(self: Any, x: Tensor) -> Any:
    """A view of the raw input is written before the boundary, the input itself is read behind it."""
    half = x[:, :3]
    y = self.stem(x)
    half.mul_(3)
    return self.head(self.mid(y) + x)


@table()
def slice_assigned(self: Any, x: Tensor) -> Any:
    """Slice assignment into the crossing value, before the boundary."""
    y = self.stem(x)
    y[:, :2] = y[:, 2:4] * 2
    return self.head(y)


@table("mid", mid=careful())
def slice_assigned_after(self: Any, x: Tensor) -> Any:
    """Slice assignment into the crossing value, behind the boundary."""
    y = self.stem(x)
    z = self.mid(y)
    y[:, :2] = z[:, 2:4]
    return self.head(y + z)


@table("mid", mid=linear())
def slice_assigned_into_new(self: Any, x: Tensor) -> Any:
    """A buffer made of the crossing value's shape is filled by slices from both sides."""
    y = self.stem(x)
    made = torch.zeros_like(y)
    made[:, :3] = y[:, :3]
    z = self.mid(y)
    made[:, 3:] = z[:, 3:]
    return self.head(made)


@table()
def masked_filled(self: Any, x: Tensor) -> Any:
    """``masked_fill_`` with a mask of the raw input."""
    y = self.stem(x)
    y.masked_fill_(x > 0, -1.0)
    return self.head(y)


@table("mid", mid=linear())
def masked_filled_after(self: Any, x: Tensor) -> Any:
    """A mask made before the boundary is used by a write behind it."""
    mask = x > 0
    y = self.stem(x)
    z = self.mid(y)
    return self.head(z.masked_fill_(mask, 0.0) + y)


@table("mid", mid=careful())
def copied_into(self: Any, x: Tensor) -> Any:
    """``copy_`` into a tensor of glue."""
    made = torch.empty_like(x)
    made.copy_(self.stem(x))
    z = self.mid(made)
    made.copy_(z.detach())
    return self.head(made + z)


@table("mid", mid=linear())
def index_put(self: Any, x: Tensor) -> Any:
    """``index_put_`` along the features."""
    y = self.stem(x)
    y.index_put_((torch.arange(x.shape[0]), torch.zeros(x.shape[0], dtype=torch.long)), x[:, 1])
    return self.head(self.mid(y) + y)


@table("mid", mid=linear())
def scatter_added(self: Any, x: Tensor) -> Any:
    """``scatter_add_`` with indices of the raw input."""
    y = self.stem(x)
    at = x.argsort(1)
    made = torch.zeros_like(y).scatter_add_(1, at, y)
    return self.head(self.mid(made) + made)


@table("mid", mid=linear())
def out_argument(self: Any, x: Tensor) -> Any:
    """A frozen result is written through ``out=``."""
    y = self.stem(x)
    made = torch.empty_like(y)
    torch.add(y.detach(), 1.0, out=made)
    return self.head(self.mid(made) + made)


@table("mid", mid=careful())
def relu_in_place_on_a_view(self: Any, x: Tensor) -> Any:
    """An in-place activation of half of the crossing value, behind the boundary."""
    y = self.stem(x)
    z = self.mid(y)
    functional.relu_(y[:, 3:])
    return self.head(z + y)


@table("mid", mid=careful())
def transposed_and_written(self: Any, x: Tensor) -> Any:
    """A transposed view is written, the tensor itself crosses."""
    y = self.stem(x)
    y.t().add_(1)
    z = self.mid(y)
    y.t().mul_(2)
    return self.head(z + y)


@table("mid", mid=careful())
def detached_and_written(self: Any, x: Tensor) -> Any:
    """``detach()`` shares memory: a write into it is a write into the crossing value."""
    y = self.stem(x)
    y.detach().mul_(2)
    z = self.mid(y)
    y.detach().add_(1)
    return self.head(z.detach() + y) + self.head(z)


@table("mid", mid=linear())
def data_written(self: Any, x: Tensor) -> Any:
    """``.data`` shares memory and hides the write from the version counter."""
    y = self.stem(x)
    y.data.mul_(2)
    return self.head(self.mid(y) + y)


@table("mid", mid=linear())
def data_written_after(self: Any, x: Tensor) -> Any:
    """``.data`` of the crossing value is written behind the boundary."""
    y = self.stem(x)
    z = self.mid(y)
    y.data.zero_()
    return self.head(z + y)


@table("mid", mid=linear())
def cloned(self: Any, x: Tensor) -> Any:
    """A clone keeps the old value while the original is written."""
    y = self.stem(x)
    kept = y.clone()
    y.zero_()
    return self.head(self.mid(kept) + y)


@table("mid", mid=careful())
def cloned_after(self: Any, x: Tensor) -> Any:
    """The clone is taken before the boundary, the original is written behind it."""
    y = self.stem(x)
    kept = y.clone()
    z = self.mid(y)
    y.zero_()
    return self.head(z + kept + y)


@table("mid", mid=linear(), act=lambda: nn.ReLU(inplace=True))
def skip_past_in_place_activation(self: Any, x: Tensor) -> Any:
    """The skip reads what an in-place activation of the boundary's input has overwritten."""
    y = self.stem(x)
    z = self.mid(self.act(y))
    return self.head(z + y)


@table("mid", inputs=images, stem=lambda: nn.Conv2d(3, 4, 3, padding=1), mid=lambda: nn.Conv2d(4, 4, 1),
       act=lambda: nn.Hardswish(inplace=True), head=linear(2, 4))  # fmt: skip
def hardswish_shared_in_place(self: Any, x: Tensor) -> Any:
    """One in-place activation is called on both sides."""
    y = self.act(self.stem(x))
    return self.head(self.act(self.mid(y) + y).mean((2, 3)))


@table("mid", mid=linear())
def unbound(self: Any, x: Tensor) -> Any:
    """``unbind`` hands out many views, one is written behind the boundary."""
    first, *others = self.stem(x).unbind(1)
    y = torch.stack([first, *others], 1)
    z = self.mid(y)
    return self.head(z + first[:, None] + others[-1][:, None] * 2)


@table("mid", mid=linear())
def split_and_written(self: Any, x: Tensor) -> Any:
    """A part of a split is written behind the boundary, the whole is read."""
    y = self.stem(x)
    a, _ = torch.split(y, [2, 4], 1)
    z = self.mid(y)
    z = z + a.sum(1, keepdim=True)
    y = y.clone()
    y[:, :2] += a
    return self.head(z + y)


@table("mid", mid=linear())
def expanded(self: Any, x: Tensor) -> Any:
    """An expanded view (stride 0) crosses."""
    y = self.stem(x)[:, :1].expand(-1, 6)
    return self.head(self.mid(y) + y)


@table("mid", inputs=sequences, mid=linear())
def expanded_batch(self: Any, x: Tensor) -> Any:
    """A constant of the weights, expanded over the batch, crosses."""
    y = self.stem(x)
    token = self.stem.bias.expand(x.shape[0], 1, -1)
    return self.head(torch.cat([self.mid(y), token], 1))


@table("mid", mid=careful())
def resized_in_place(self: Any, x: Tensor) -> Any:
    """``unsqueeze_`` and ``squeeze_`` change a tensor's shape under its name."""
    y = self.stem(x)
    y.unsqueeze_(1)
    z = self.mid(y)
    y.squeeze_(1)
    return self.head(z.squeeze(1) + y)


@table("mid", mid=linear())
def set_through_list(self: Any, x: Tensor) -> Any:
    """A Python list collects values on both sides and is written through."""
    made = [self.stem(x)]
    made.append(made[0].relu())
    z = self.mid(made[-1])
    made[0].add_(z.detach())
    made.append(z)
    return self.head(sum(made))


@table("mid", mid=linear())
def swapped(self: Any, x: Tensor) -> Any:
    """Two crossing values change names in a loop."""
    a, b = self.stem(x), x
    for _ in range(3):
        a, b = b, a
    z = self.mid(a)
    a = a + 1
    return self.head(z + a + b)


@table("mid", mid=linear())
def clamped_out_to_itself(self: Any, x: Tensor) -> Any:
    """``out=`` names an input of the op."""
    y = self.stem(x)
    with torch.no_grad():
        torch.clamp(y, min=0.0, out=y)
    return self.head(self.mid(y) + y)


@table("mid", mid=careful(), stem=lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Identity()))
def identity_returns_its_input(self: Any, x: Tensor) -> Any:
    """Identity, dropout in eval mode and ``.to()`` return the same tensor, which is written behind the boundary."""
    y = self.stem(x)
    same = functional.dropout(y.to(y.dtype).contiguous(), 0.0)
    z = self.mid(same)
    y += 1
    return self.head(z + same)


@table("mid", mid=careful())
def as_strided(self: Any, x: Tensor) -> Any:
    """A view by strides of the crossing value."""
    y = self.stem(x)
    view = y.as_strided((y.shape[0], 2), (6, 3))
    z = self.mid(y)
    y.add_(1)
    return self.head(z) + view


@table("mid", mid=careful())
def viewed_as_complex(self: Any, x: Tensor) -> Any:
    """A complex view of the crossing value, written behind the boundary."""
    y = self.stem(x)
    turned = torch.view_as_complex(y.view(-1, 3, 2))
    z = self.mid(y)
    y.mul_(2)
    return self.head(z + turned.abs().repeat(1, 2))


@table("mid", mid=linear())
def real_and_imaginary(self: Any, x: Tensor) -> Any:
    """A complex value crosses."""
    y = torch.complex(self.stem(x), x)
    z = self.mid(y.real)
    return self.head(z + y.imag * y.abs())


@table("mid", mid=careful())
def foreach_written(self: Any, x: Tensor) -> Any:
    """``torch._foreach_add_`` writes into a list of crossing values."""
    y, other = self.stem(x), x * 2
    z = self.mid(y)
    torch._foreach_add_([y, other], 1.0)
    return self.head(z + y + other)


TRAPS, REFUSED = table.traps, table.refused
