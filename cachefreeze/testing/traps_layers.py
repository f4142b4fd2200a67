"""Traps of layers and operations: kernels, dtypes, sequences, randomness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cachefreeze.testing.trap_table import TrapTable, linear
from cachefreeze.testing.traps import images, sequences, tokens

table = TrapTable()

# torch chooses another kernel for these when no gradient is needed
_KERNEL = 1e-5


class _Recurrent(nn.Module):
    """A recurrent layer, batch first, without its state."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU | nn.RNN]) -> None:
        super().__init__()
        self.rnn = kind(6, 3, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


def _recurrent(kind: type[nn.LSTM | nn.GRU | nn.RNN]) -> Callable[[], nn.Module]:
    return lambda: _Recurrent(kind)


def _through(self: Any, x: Tensor) -> Any:
    return self.head(self.mid(self.stem(x)))


for _kind in (nn.LSTM, nn.GRU, nn.RNN):
    _through.__doc__ = f"A bidirectional {_kind.__name__}."
    _through.__name__ = f"frozen_{_kind.__name__.lower()}"
    table("mid", inputs=sequences, tolerance=_KERNEL, stem=_recurrent(_kind), mid=linear())(_through)
    _through.__name__ = f"trained_{_kind.__name__.lower()}"
    table("mid", inputs=sequences, tolerance=_KERNEL, mid=_recurrent(_kind))(_through)


def _with_lengths() -> tuple[Tensor, Tensor]:
    return sequences(), torch.tensor([5, 2, 4, 3])


@table("rnn", inputs=_with_lengths, rnn=lambda: nn.GRU(6, 6, batch_first=True))
def packed_after(self: Any, x: Tensor, lengths: Tensor) -> Any:
    """Sequences are packed by their lengths behind the boundary."""
    packed = pack_padded_sequence(self.stem(x), lengths, batch_first=True, enforce_sorted=False)
    y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
    return self.head(y)


@table("mid", inputs=_with_lengths, rnn=lambda: nn.GRU(6, 6, batch_first=True), mid=linear(),
       refused="reads a value of the batch")  # fmt: skip
def packed_before(self: Any, x: Tensor, lengths: Tensor) -> Any:
    """Sequences are packed by their lengths before the boundary, and padded to a fixed length."""
    packed = pack_padded_sequence(self.stem(x), lengths, batch_first=True, enforce_sorted=False)
    y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
    return self.head(self.mid(y))


@table("cell", inputs=sequences, cell=lambda: nn.LSTMCell(6, 6))
def cell_loop(self: Any, x: Tensor) -> Any:
    """A loop over time through an LSTM cell."""
    y = self.stem(x)
    h = c = y.new_zeros(x.shape[0], 6)
    for step in y.unbind(1):
        h, c = self.cell(step, (h, c))
    return self.head(h)


@table("mid", inputs=sequences, cell=lambda: nn.GRUCell(6, 6), mid=linear())
def cell_loop_frozen(self: Any, x: Tensor) -> Any:
    """A loop over time through a frozen cell, one step of which crosses beside the last."""
    h = x.new_zeros(x.shape[0], 6)
    states = []
    for at in range(x.shape[1]):
        h = self.cell(self.stem(x[:, at]), h)
        states.append(h)
    return self.head(self.mid(h) + states[1])


def _encoder(layers: int = 2, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, **options)
        return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    return make


def _padded() -> dict[str, Tensor]:
    return {"x": sequences(), "padding": torch.arange(5)[None] >= torch.tensor([[5], [2], [4], [3]])}


@table("mid", inputs=_padded, stem=_encoder(), mid=_encoder(), tolerance=_KERNEL)
def encoder_with_padding(self: Any, x: Tensor, padding: Tensor) -> Any:
    """Encoders with a padding mask on both sides."""
    y = self.stem(x, src_key_padding_mask=padding)
    z = self.mid(y, src_key_padding_mask=padding).masked_fill(padding[..., None], 0.0)
    return self.head(z)


def _nested_encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), 2)


@table("mid", inputs=_padded, stem=_nested_encoder, mid=linear(), tolerance=_KERNEL)
def nested_tensor_encoder(self: Any, x: Tensor, padding: Tensor) -> Any:
    """The nested-tensor path of eval mode cuts the output to the longest sample: padded here to a fixed length."""
    y = self.stem(x, src_key_padding_mask=padding)
    y = functional.pad(y, (0, 0, 0, x.shape[1] - y.shape[1])).masked_fill(padding[..., None], 0.0)
    return self.head(self.mid(y))


@table("mid", inputs=sequences, stem=_encoder(norm_first=True), mid=_encoder(1, norm_first=True), tolerance=_KERNEL)
def encoder_causal(self: Any, x: Tensor) -> Any:
    """Encoders with a causal mask that glue makes."""
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    y = self.stem(x, mask=mask, is_causal=True)
    return self.head(self.mid(y, mask=mask, is_causal=True))


@table("model.decoder", inputs=lambda: (sequences(), sequences(length=3)),
       model=lambda: nn.Transformer(6, 2, 1, 1, 12, batch_first=True), tolerance=_KERNEL)  # fmt: skip
def encoder_decoder(self: Any, x: Tensor, y: Tensor) -> Any:
    """A whole nn.Transformer, trained from its decoder."""
    return self.head(self.model(self.stem(x), y))


@table("mid", inputs=sequences, mid=linear(18))
def attention_by_hand(self: Any, x: Tensor) -> Any:
    """Scaled dot product attention with dropout, by function, behind the boundary."""
    q, k, v = self.mid(self.stem(x)).chunk(3, -1)
    y = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.3 if self.training else 0.0)
    return self.head(y)


@table("mid", inputs=images, stem=lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), mid=lambda: nn.Conv2d(4, 16, 3),
       head=linear(2, 4))  # fmt: skip
def transposed_convolution(self: Any, x: Tensor) -> Any:
    """A transposed convolution and a pixel shuffle."""
    y = self.stem(x)
    return self.head(functional.pixel_shuffle(self.mid(y), 2).mean((2, 3)))


@table("mid", inputs=images, stem=lambda: nn.Conv2d(3, 4, 3, padding=1), mid=lambda: nn.Conv2d(4, 4, 1),
       head=linear(2, 4), locate=lambda: nn.Linear(4, 6))  # fmt: skip
def spatial_transformer(self: Any, x: Tensor) -> Any:
    """``affine_grid`` and ``grid_sample`` of the raw input behind the boundary."""
    y = self.stem(x)
    z = self.mid(y)
    theta = self.locate(z.mean((2, 3))).view(-1, 2, 3)
    grid = functional.affine_grid(theta, [x.shape[0], 3, 8, 8], align_corners=False)
    moved = functional.grid_sample(x, grid, align_corners=False)
    return self.head(z.mean((2, 3)) + moved.mean((1, 2, 3))[:, None])


@table("mid", inputs=images, stem=lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), mid=lambda: nn.Conv2d(4, 4, 1),
       head=lambda: nn.Conv2d(4, 2, 1))  # fmt: skip
def resized_to_the_input(self: Any, x: Tensor) -> Any:
    """Segmentation: logits are resized to the raw input's size."""
    z = self.head(self.mid(self.stem(x)))
    return functional.interpolate(z, size=x.shape[-2:], mode="bilinear", align_corners=False)


@table("mid", inputs=sequences, mid=linear())
def einsum(self: Any, x: Tensor) -> Any:
    """``einsum`` across the boundary."""
    y = self.stem(x)
    return self.head(torch.einsum("btf,bsf->bsf", self.mid(y), y))


@table("mid", mid=linear())
def selected(self: Any, x: Tensor) -> Any:
    """``where``, ``topk``, ``sort`` and ``gather``."""
    y = self.stem(x)
    best, at = y.topk(3, 1)
    z = torch.where(y > 0, self.mid(y), y.sort(1).values)
    return self.head(z + z.gather(1, at).sum(1, keepdim=True) + best.mean(1, keepdim=True))


@table("mid", inputs=sequences, mid=linear())
def cumulative(self: Any, x: Tensor) -> Any:
    """``cumsum``, ``flip`` and ``roll`` along the sequence."""
    y = self.stem(x).cumsum(1).flip(1)
    return self.head(self.mid(y).cumsum(1) + y.roll(1, 1))


@table("mid", inputs=sequences, mid=lambda: nn.Linear(6, 6))
def fourier(self: Any, x: Tensor) -> Any:
    """A complex spectrum crosses."""
    spectrum = torch.fft.rfft(self.stem(x), dim=1)
    y = self.mid(spectrum.abs())
    return self.head(torch.fft.irfft(spectrum * y, n=x.shape[1], dim=1))


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@table("mid", mid=linear())
def autograd_function(self: Any, x: Tensor) -> Any:
    """A straight-through function on both sides."""
    y = _Straight.apply(self.stem(x))
    return self.head(_Straight.apply(self.mid(y)) + y)


@table("mid", mid=linear())
def straight_through(self: Any, x: Tensor) -> Any:
    """A straight-through estimator by ``detach``."""
    z = self.mid(self.stem(x))
    return self.head(z + (z.round() - z).detach())


@table("mid", inputs=sequences, mid=linear())
def vmapped(self: Any, x: Tensor) -> Any:
    """A frozen and a trained function under ``vmap``."""
    y = torch.vmap(lambda row: row - row.mean(0))(self.stem(x))
    return self.head(torch.vmap(lambda row: row * row.amax(0))(self.mid(y)))


@table("mid", mid=linear())
def input_gradient(self: Any, x: Tensor) -> Any:
    """The forward differentiates through its own trained layers (a penalty on gradients)."""
    y = self.stem(x)
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        z = self.mid(y).tanh()
        (grad,) = torch.autograd.grad(z.sum(), y, create_graph=True)
    return self.head(z + grad)


@table("mid", mid=linear())
def raw_operators(self: Any, x: Tensor) -> Any:
    """``torch.ops.aten`` called by hand on both sides, in a forward that no trace can read."""
    y = torch.ops.aten.relu.default(self.stem(x))
    if float(self.stem.weight.detach().sum()) > -1e3:
        y = torch.ops.aten.mul.Tensor(y, x)
    return self.head(torch.ops.aten.tanh.default(self.mid(y)) + y)


@table("mid", inputs=tokens, stem=lambda: nn.EmbeddingBag(11, 6), mid=linear())
def embedding_bag(self: Any, ids: Tensor) -> Any:
    """An embedding bag."""
    return self.head(self.mid(self.stem(ids)))


TRAPS, REFUSED = table.traps, table.refused
