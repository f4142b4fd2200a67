"""Traps of rows: where the batch is in what crosses, what it is made of, and what couples samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachefreeze.testing.trap_table import TrapTable, linear
from cachefreeze.testing.traps import ROWS, images, sequences, tokens, vectors

table = TrapTable()


@table("mid", inputs=lambda: vectors().double(), stem=linear(dtype=torch.float64), mid=linear(dtype=torch.float64),
       head=linear(2, dtype=torch.float64))  # fmt: skip
def double_precision(self: Any, x: Tensor) -> Any:
    """The whole model in float64."""
    return self.head(self.mid(self.stem(x)))


@table("mid", stem=linear(dtype=torch.float64), mid=linear())
def half_double(self: Any, x: Tensor) -> Any:
    """The frozen half of the model in float64."""
    return self.head(self.mid(self.stem(x.double()).float()))


@table("mid", stem=linear(dtype=torch.bfloat16), mid=linear())
def frozen_in_bfloat16(self: Any, x: Tensor) -> Any:
    """The frozen half of the model in bfloat16."""
    return self.head(self.mid(self.stem(x.bfloat16()).float()))


@table("mid", stem=linear(dtype=torch.bfloat16), mid=linear(dtype=torch.bfloat16), head=linear(2, dtype=torch.bfloat16))
def all_bfloat16(self: Any, x: Tensor) -> Any:
    """The whole model in bfloat16."""
    return self.head(self.mid(self.stem(x.bfloat16())))


@table("mid", mid=linear())
def integers_cross(self: Any, x: Tensor) -> Any:
    """Ranks, flags and small integers of the frozen part cross."""
    y = self.stem(x)
    rank, flag, small = y.argsort(1), y > 0, (y * 3).to(torch.int8)
    return self.head(self.mid(y) * flag + rank + small)


@table("mid", mid=lambda: nn.Embedding(6, 6))
def codes_cross(self: Any, x: Tensor) -> Any:
    """Vector quantisation: only integers cross."""
    return self.head(self.mid(self.stem(x).argmax(1)))


@table(
    "mid", inputs=lambda: torch.complex(vectors(), vectors().flip(1)), stem=linear(dtype=torch.complex64), mid=linear()
)
def complex_weights(self: Any, x: Tensor) -> Any:
    """Complex inputs and weights."""
    return self.head(self.mid(self.stem(x).abs()))


@table("mid", inputs=sequences, mid=linear())
def batch_second(self: Any, x: Tensor) -> Any:
    """The batch is dimension 1 of what crosses."""
    y = self.stem(x.transpose(0, 1))
    return self.head(self.mid(y) + y).transpose(0, 1)


@table("mid", inputs=sequences, mid=linear())
def batch_last(self: Any, x: Tensor) -> Any:
    """The batch is the last dimension of what crosses."""
    y = self.stem(x).permute(1, 2, 0).contiguous()
    return self.head(self.mid(y.permute(2, 0, 1)) + y.permute(2, 0, 1))


@table("mid", inputs=sequences, mid=linear())
def folded_heads(self: Any, x: Tensor) -> Any:
    """Batch and heads are folded: a sample owns three rows of what crosses."""
    y = self.stem(x).view(-1, 5, 3, 2).transpose(1, 2).reshape(-1, 5, 2)
    y = y @ y.transpose(1, 2)
    z = self.mid(functional.pad(y, (0, 1)))
    return self.head((z + y.sum(-1, keepdim=True)).view(x.shape[0], 3, 5, 6).sum(1))


@table("mid", inputs=sequences, mid=linear())
def folded_time_major(self: Any, x: Tensor) -> Any:
    """Batch and time are folded with the time outside: a sample's rows are not neighbours."""
    y = self.stem(x).transpose(0, 1).reshape(-1, 6)
    return self.head(self.mid(y)).view(5, x.shape[0], 2)


@table("mid", inputs=images, stem=lambda: nn.Conv2d(3, 4, 3, padding=1), mid=linear(inputs=16), head=linear())
def windows(self: Any, x: Tensor) -> Any:
    """Windows are folded into the batch, as in a Swin transformer."""
    y = self.stem(x).unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 4, 16)
    return self.head(self.mid(y)).view(x.shape[0], 4, 4, 6)


@table("mid", mid=linear(), refused="other samples of its batch")
def doubled_batch(self: Any, x: Tensor) -> Any:
    """Two views of every sample are concatenated along the batch."""
    y = self.stem(torch.cat([x, x.flip(1)]))
    a, b = self.mid(y).chunk(2)
    return self.head(a * b)


@table("mid", inputs=sequences, mid=linear())
def frames_through_the_stem(self: Any, x: Tensor) -> Any:
    """Frames are folded into the batch for the frozen part: a sample owns five neighbouring rows."""
    y = self.stem(x.flatten(0, 1)).relu()
    z = self.mid(y).view(x.shape[0], 5, 6)
    return self.head(z.mean(1))


@table("mid", inputs=sequences, mid=linear())
def frames_unfolded(self: Any, x: Tensor) -> Any:
    """Frames are folded into the batch for the frozen part and unfolded before the boundary."""
    y = self.stem(x.flatten(0, 1)).unflatten(0, (x.shape[0], -1))
    return self.head(self.mid(y).mean(1) + y[:, 0])


@table("mid", inputs=sequences, mid=linear(), refused="other samples of its batch")
def frames_time_major(self: Any, x: Tensor) -> Any:
    """Time-major frames are folded into the batch for the frozen part: a sample's rows are apart."""
    y = self.stem(x.transpose(0, 1).flatten(0, 1))
    return self.head(self.mid(y).view(5, x.shape[0], 6).mean(0))


@table("mid", mid=linear())
def repeated_batch(self: Any, x: Tensor) -> Any:
    """Every sample is repeated side by side for the frozen part (test-time augmentation)."""
    y = self.stem(x.repeat_interleave(2, 0))
    return self.head(self.mid(y)).view(-1, 2, 2).mean(1)


@table("mid", mid=linear(), refused="other samples of its batch")
def similarities_before(self: Any, x: Tensor) -> Any:
    """Similarities of all samples of the batch, before the boundary."""
    y = self.stem(x)
    return self.head(self.mid((y @ y.t()).softmax(1) @ y))


@table("mid", mid=linear())
def similarities_after(self: Any, x: Tensor) -> Any:
    """Similarities of all samples of the batch, behind the boundary: they are not cached."""
    z = self.mid(self.stem(x))
    return self.head((z @ z.t()).softmax(1) @ z)


@table("mid", mid=linear(), refused="other samples of its batch")
def centred_by_batch_after_input(self: Any, x: Tensor) -> Any:
    """The raw batch is normalised by its own statistics."""
    y = self.stem((x - x.mean()) / x.std())
    return self.head(self.mid(y))


@table("mid", mid=linear(), refused="other samples|batch")
def sorted_batch(self: Any, x: Tensor) -> Any:
    """The samples of a batch are sorted before the frozen part and put back behind the boundary."""
    order = x[:, 0].argsort()
    z = self.mid(self.stem(x[order]))
    return self.head(z[order.argsort()])


@table("mid", mid=linear(), refused="other samples|batch")
def shifted_batch(self: Any, x: Tensor) -> Any:
    """Each sample is mixed with its neighbour (MixUp inside the model)."""
    y = self.stem(0.5 * x + 0.5 * x.roll(1, 0))
    return self.head(self.mid(y))


@table("mid", inputs=tokens, stem=lambda: nn.Embedding(11, 6), mid=linear())
def mask_from_ids(self: Any, ids: Tensor) -> Any:
    """A padding mask is made from the ids before the boundary and used behind it."""
    mask = (ids != 0).unsqueeze(-1)
    y = self.stem(ids) * mask
    z = self.mid(y).masked_fill(~mask, 0.0)
    return self.head(z.sum(1) / mask.sum(1).clamp(min=1))


@table("mid", inputs=tokens, stem=lambda: nn.Embedding(11, 6), mid=linear(), refused="reads a value|Python")
def cut_to_the_longest(self: Any, ids: Tensor) -> Any:
    """The batch is cut to its longest sample, read from the data."""
    longest = int((ids != 0).sum(1).max())
    y = self.stem(ids[:, :longest])
    return self.head(self.mid(y)).mean(1)


@table("mid", inputs=tokens, stem=lambda: nn.Embedding(11, 6), mid=linear(), refused="dimension|nonzero|batch")
def only_real_tokens(self: Any, ids: Tensor) -> Any:
    """Padding is removed: tokens of all samples in one list."""
    y = self.stem(ids[ids != 0])
    return self.head(self.mid(y))


@table("mid", inputs=tokens, stem=lambda: nn.Embedding(11, 6), mid=linear())
def only_real_tokens_after(self: Any, ids: Tensor) -> Any:
    """Padding is removed behind the boundary."""
    z = self.mid(self.stem(ids))
    return self.head(z)[ids != 0]


@table("mid", inputs=lambda: torch.rand(ROWS, 6) > 0.5, mid=linear())
def boolean_inputs(self: Any, x: Tensor) -> Any:
    """The inputs are flags."""
    return self.head(self.mid(self.stem(x.float())) * x)


@table("mid", inputs=lambda: (vectors() * 40 + 100).to(torch.uint8), mid=linear())
def byte_inputs(self: Any, x: Tensor) -> Any:
    """The inputs are bytes, kept raw."""
    y = self.stem(x.float() / 255)
    return self.head(self.mid(y) + x)


TRAPS, REFUSED = table.traps, table.refused
