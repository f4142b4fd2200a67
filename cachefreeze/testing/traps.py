"""Trap models: small modules, each with one construction that breaks a naive split into prefix and suffix.

``TRAPS`` must split exactly, ``REFUSED`` must raise; each entry says where to cut. An executor that is written
elsewhere can be held against both tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS = 4


def images(channels: int = 3, size: int = 8) -> Tensor:
    """A batch of images that differ, positive and negative; the global random state stays as it is."""
    return torch.randn(ROWS, channels, size, size, generator=torch.Generator().manual_seed(1))


def vectors(width: int = 6) -> Tensor:
    """A batch of vectors."""
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(2))


def sequences(width: int = 6, length: int = 5) -> Tensor:
    """A batch of sequences, batch first."""
    return torch.randn(ROWS, length, width, generator=torch.Generator().manual_seed(3))


def tokens(length: int = 5, vocabulary: int = 11) -> Tensor:
    """A batch of token ids."""
    return torch.randint(vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(4))


@dataclass(frozen=True)
class Trap:
    """A model, its inputs and the boundary that springs the trap.

    Attributes:
        make: Builds the model.
        inputs: Builds ``example_inputs`` of ``ROWS`` samples.
        train_from: The boundary.
        message: For refused traps, a part of the error (a regular expression).
        tolerance: Where torch chooses another kernel without gradients, equal within this only; 0 is bit for bit.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    train_from: str
    message: str = ""
    tolerance: float = 0.0


class Chain(nn.Sequential):
    """No trap: convolution, norm, activation, twice, and a head."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1 = norm(4)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = norm(4)
        self.act2 = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.head = nn.Linear(4, 2)


class DropoutPrefix(nn.Sequential):
    """Dropout before the boundary: random unless the freeze holds it in eval mode."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 2))


class FirstInPlace(nn.Sequential):
    """The first op writes into the model's own input."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))


class PreActivation(nn.Module):
    """The block begins with an in-place ReLU, and its skip reads the tensor which that ReLU has overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = _PreActivationBlock()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        out: Tensor = self.head(self.block(self.stem(x)).mean((2, 3)))
        return out


class _PreActivationBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.relu(x)) + x
        return out


class ActivatedTwice(nn.Module):
    """An in-place ReLU returns its own input: two names of one tensor cross, and the suffix writes into one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to vectors."""
        y = self.stem(x)
        z = self.relu(y)
        out: Tensor = self.head(x)
        z.mul_(2.0)
        return torch.add(out, y)


class AliasedView(nn.Module):
    """A tensor and its flattened view both cross; the suffix writes into one and reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = self.stem(x)
        flat = y.flatten(1)
        out: Tensor = self.head(y.mean((2, 3)))
        y.mul_(2.0)
        return torch.add(out, flat[:, :4])


class AliasedSlices(nn.Module):
    """Two chunks of one tensor cross beside the tensor itself; the suffix overwrites a chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to vectors."""
        y = self.stem(x)
        a, b = y.chunk(2, 1)
        out: Tensor = self.head(x)
        b.add_(1.0)
        return torch.add(out + a, y.sum(1, keepdim=True))


class TiedHead(nn.Module):
    """The head's weight is the embedding's: freezing the embedding freezes it; its bias still trains."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids to logits."""
        out: Tensor = self.head(self.body(self.embed(ids)))
        return out


class Skip(nn.Module):
    """Two stages' outputs and the raw input cross the boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to logits."""
        a = self.first(x)
        b = self.second(functional.relu(a))
        out: Tensor = self.head(self.third(b) + a + x)
        return out


class SharedModule(nn.Module):
    """One module runs before the boundary and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to vectors."""
        out: Tensor = self.norm(self.head(self.norm(self.stem(x)).relu()))
        return out


class ClassToken(nn.Module):
    """Parameters of the root, a class token and positions, are used between the stem and the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(1, 6, 6))
        self.stem = nn.Linear(6, 6)
        self.layers = nn.Sequential(*[nn.TransformerEncoderLayer(6, 2, 12, batch_first=True) for _ in range(2)])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences to logits."""
        y = self.stem(x)
        token = self.class_token.expand(y.shape[0], -1, -1)
        y = self.layers(torch.cat([token, y], 1) + self.positions)
        out: Tensor = self.head(self.norm(y)[:, 0])
        return out


class ShapesCross(nn.Module):
    """Integers and a ``torch.Size`` of the raw input are used behind the boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.mid = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images to a matrix."""
        rows, shape = x.shape[0], x.shape
        y = self.mid(self.stem(x).relu())
        y = y.view(shape) + y.new_ones(rows, 1, 1, 1)
        out: Tensor = y.reshape(rows, -1)
        return out


class Pair(NamedTuple):
    """An output that is neither tensor nor plain tuple."""

    logits: Tensor
    features: Tensor


class DictOutput(nn.Module):
    """The output is a dict that holds a tuple, a named tuple, a None and a string."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Vectors to a tree."""
        y = self.stem(x)
        out = self.head(y)
        return {"pair": Pair(out, y), "both": (out * 2, [y]), "none": None, "kind": "logits"}


class PairStem(nn.Module):
    """A frozen module that returns a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Pair:
        """Vectors to two vectors."""
        return Pair(self.a(x), self.b(x))


class StructureCrosses(nn.Module):
    """A named tuple crosses the boundary and its fields are read behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = PairStem()
        self.extra = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to logits."""
        pair = self.stem(x)
        y = self.head(self.extra(x))
        out: Tensor = y + pair.logits[:, :2] + pair.features[:, 2:4]
        return out


class DictStem(nn.Module):
    """A frozen module that returns a dict with an optional entry."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Vectors to a dict."""
        return {"features": self.a(x), "mask": None, "scale": 2}


class DictCrosses(nn.Module):
    """A dict crosses the boundary and its entries are read behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = DictStem()
        self.extra = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to logits."""
        made = self.stem(x)
        y = self.head(self.extra(x))
        out: Tensor = y + made["features"][:, :2] * made["scale"]
        return out


class KeywordInputs(nn.Module):
    """Keyword inputs in another order than the signature's, and optional arguments that nobody gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        mask_2: Tensor | None = None,
        bias: Tensor | None = None,
        scale: float = 2.0,
        features: bool = False,
        *,
        sizes: tuple[int, ...] = (),
    ) -> Tensor:
        """Token ids and a mask to logits."""
        y: Tensor = self.body(self.stem(ids)) * scale
        if bias is not None:
            y = y + bias
        if mask_2 is not None:
            y = y * mask_2.unsqueeze(-1)
        if features or sizes:
            return y
        out: Tensor = self.head((y * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))
        return out


class NumberedInput(nn.Module):
    """An input is called as fx would call a fixed argument: ``mask_1`` beside an optional ``mask``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, mask_1: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors to logits."""
        y = self.stem(mask_1)
        if mask is not None:
            y = y * mask
        out: Tensor = self.head(y)
        return out


class HeadFirst(nn.Module):
    """The classifier is registered before the features."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 2)
        self.mid = nn.Linear(6, 6)
        self.stem = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to logits."""
        out: Tensor = self.head(self.mid(self.stem(x).relu()).relu())
        return out


class AsksHeadDtype(nn.Module):
    """The forward asks for the head's dtype and shape first: that is no use of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to logits."""
        y = self.stem(x.to(self.head.weight.dtype)) * self.head.weight.shape[1]
        out: Tensor = self.head(y.relu())
        return out


class FoldedBatch(nn.Module):
    """Batch and time are folded into one dimension right before the boundary, so a sample owns several rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences to logits per step."""
        rows, length, width = x.shape
        out: Tensor = self.head(self.stem(x).reshape(-1, width)).view(rows, length, 2)
        return out


class CentredBatch(nn.Module):
    """The forward subtracts the batch's mean right before the boundary. Refused."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to logits."""
        y = self.stem(x)
        out: Tensor = self.head(y - y.mean(0))
        return out


class Recurrent(nn.Module):
    """A recurrent suffix, time first in between: the batch is dimension 1 of what crosses."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU] = nn.LSTM) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.rnn = kind(6, 5, num_layers=2, dropout=0.5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences to logits."""
        y, _ = self.rnn(self.stem(x).transpose(0, 1))
        out: Tensor = self.head(y[-1])
        return out


class Attention(nn.Module):
    """Attention with dropout in prefix and suffix, packed as (values, None)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)
        self.second = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences to logits."""
        y, _ = self.first(x, x, x, need_weights=False)
        z, weights = self.second(y, y, y)
        out: Tensor = self.head(z + y).mean(1) + weights.mean()
        return out


class Dense(nn.Module):
    """Every layer reads all earlier ones: several tensors cross, and the suffix writes into their concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList([nn.Conv2d(4 * (i + 1), 4, 3, padding=1) for i in range(3)])
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        made = [self.stem(x)]
        for layer in self.layers:
            made.append(self.relu(layer(torch.cat(made, 1))))
        out: Tensor = self.head(torch.cat(made, 1).mean((2, 3)))
        return out


class RandomSuffix(nn.Module):
    """The suffix draws random numbers even in eval mode: allowed, it is not cached."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to a sample."""
        y: Tensor = self.head(self.stem(x))
        return y + torch.randn_like(y)


class RunningMean(nn.Module):
    """A buffer that is bound anew, not written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Centre by the running mean."""
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class ReboundBuffer(nn.Sequential):
    """A suffix whose buffer is another object after each forward in train mode."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.Linear(6, 6), RunningMean(), nn.Linear(6, 2))


class SpectralSuffix(nn.Sequential):
    """A parametrised suffix layer that updates its buffers in train mode."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)))


class NoisyReLU(nn.ReLU):
    """A subclass of a harmless activation that is random in train mode."""

    def forward(self, input: Tensor) -> Tensor:
        """ReLU, with noise in train mode."""
        return super().forward(input + torch.randn_like(input) if self.training else input)


class NoisyTail(nn.Sequential):
    """The boundary block starts with a subclass of ReLU that is random in train mode: no parameter-free tail."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.block = nn.Sequential(NoisyReLU(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 2)


class FunctionalDropout(nn.Module):
    """Functional dropout in a half-frozen parent: no freeze can switch it off. Refused."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to logits."""
        out: Tensor = self.head(functional.dropout(self.stem(x), 0.5, self.training))
        return out


class Noise(nn.Module):
    """Adds noise in every mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Add noise."""
        return x + torch.randn_like(x)


class RandomPrefix(nn.Sequential):
    """The prefix is random even in eval mode. Refused."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), Noise(), nn.Linear(6, 2))


class BatchCentre(nn.Module):
    """Subtracts the batch's mean."""

    def forward(self, x: Tensor) -> Tensor:
        """Centre over the batch."""
        return x - x.mean(0, keepdim=True)


class BatchMean(nn.Sequential):
    """A row of the prefix depends on the other samples. Refused."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), BatchCentre(), nn.Linear(6, 6), nn.Linear(6, 2))


class BatchShare(nn.Module):
    """Divides by the number of samples."""

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the batch size."""
        return x / x.shape[0]


class BatchSize(nn.Sequential):
    """A row of the prefix depends on how many samples the batch has. Refused."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), BatchShare(), nn.Linear(6, 6), nn.Linear(6, 2))


class BatchStatistics(nn.Sequential):
    """Batch norm without running statistics: batch statistics even in eval mode. Refused."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 2))


class Longest(nn.Module):
    """Returns its input and an integer read from the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        """The layer's output and the index of the largest entry of the first sample."""
        return self.layer(x), int(x[0].argmax())


class DataInteger(nn.Module):
    """An integer that was read from the data crosses the boundary: no row can stand for it. Refused."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Longest()
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to vectors."""
        y, at = self.stem(x)
        out: Tensor = self.head(y) * (at + 1)
        return out


class Branches(nn.Module):
    """Control flow on values in the boundary's parent: fx cannot read it. Refused."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.inner = _Branching()

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to logits."""
        out: Tensor = self.inner(self.stem(x))
        return out


class Masked(nn.Module):
    """A small language model: a mask that glue expands, looked at in Python, labels inside, tied weights of none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Token ids (batch, length) and a mask of the same shape to logits and a loss."""
        padded = None if mask.all() else ~mask
        hidden = self.embed(ids) + torch.arange(ids.shape[1], device=ids.device)[None, :, None] / 10
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=padded)
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def masked_batch() -> dict[str, Tensor]:
    """Token ids, a mask with samples of other lengths, and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (4, 5), generator=generator)
    mask = torch.arange(5)[None] < torch.tensor([3, 5, 2, 4])[:, None]
    return {"ids": ids, "mask": mask, "labels": ids.flip(1)}


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if float(y.detach().sum()) > 0:
            y = y * 2
        out: Tensor = self.head(y)
        return out


def _keywords() -> dict[str, Tensor]:
    mask = (torch.arange(5) < torch.tensor([[5], [3], [4], [2]])).float()
    return {"mask": mask, "ids": tokens()}


# torch chooses another kernel for these when no gradient is needed: equal within rounding only
_KERNEL = 1e-5

TRAPS: dict[str, Trap] = {
    "batch_norm": Trap(Chain, images, "conv2"),
    "batch_norm_head": Trap(Chain, images, "head"),
    "batch_norm_boundary": Trap(Chain, images, "norm2"),
    "group_norm": Trap(lambda: Chain(lambda c: nn.GroupNorm(2, c)), images, "conv2"),
    "instance_norm": Trap(lambda: Chain(lambda c: nn.InstanceNorm2d(c, affine=True)), images, "conv2"),
    "running_instance_norm": Trap(
        lambda: Chain(lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True)), images, "conv2"
    ),
    "channels_last": Trap(
        lambda: Chain().to(memory_format=torch.channels_last),
        lambda: images().to(memory_format=torch.channels_last),
        "conv2",
    ),
    "dropout": Trap(DropoutPrefix, vectors, "2"),
    "first_in_place": Trap(FirstInPlace, vectors, "3"),
    "in_place_at_boundary": Trap(PreActivation, images, "block"),
    "in_place_in_boundary": Trap(PreActivation, images, "block.conv"),
    "in_place_alias": Trap(ActivatedTwice, vectors, "head"),
    "aliased_view": Trap(AliasedView, images, "head"),
    "aliased_slices": Trap(AliasedSlices, vectors, "head"),
    "tied_weights": Trap(TiedHead, tokens, "head"),
    "skip": Trap(Skip, vectors, "third"),
    "skip_early": Trap(Skip, vectors, "second"),
    "shared_module": Trap(SharedModule, vectors, "head"),
    "class_token": Trap(ClassToken, sequences, "layers"),
    "class_token_mid": Trap(ClassToken, sequences, "layers.1", tolerance=_KERNEL),
    "class_token_head": Trap(ClassToken, sequences, "head", tolerance=_KERNEL),
    "shapes_cross": Trap(ShapesCross, images, "mid"),
    "dict_output": Trap(DictOutput, vectors, "head"),
    "named_tuple_crosses": Trap(StructureCrosses, vectors, "head"),
    "dict_crosses": Trap(DictCrosses, vectors, "head"),
    "keyword_inputs": Trap(KeywordInputs, _keywords, "head"),
    "keyword_inputs_mid": Trap(KeywordInputs, _keywords, "body"),
    "numbered_input": Trap(NumberedInput, vectors, "head"),
    "head_first": Trap(HeadFirst, vectors, "mid"),
    "asks_head_dtype": Trap(AsksHeadDtype, vectors, "head"),
    "folded_batch": Trap(FoldedBatch, sequences, "head"),
    "lstm": Trap(Recurrent, sequences, "rnn"),
    "lstm_prefix": Trap(Recurrent, sequences, "head", tolerance=_KERNEL),
    "gru": Trap(lambda: Recurrent(nn.GRU), sequences, "rnn"),
    "attention": Trap(Attention, sequences, "second"),
    "attention_prefix": Trap(Attention, sequences, "head", tolerance=_KERNEL),
    "dense": Trap(Dense, images, "layers.1"),
    "dense_list": Trap(Dense, images, "layers"),
    "random_suffix": Trap(RandomSuffix, vectors, "head"),
    "rebound_buffer": Trap(ReboundBuffer, vectors, "1"),
    "spectral_norm": Trap(SpectralSuffix, vectors, "2"),
    "masked_mid": Trap(Masked, masked_batch, "layers.1"),
    "masked_head": Trap(Masked, masked_batch, "head"),
    "functional_dropout": Trap(FunctionalDropout, vectors, "head"),
    "noisy_tail": Trap(NoisyTail, vectors, "block"),
}

REFUSED: dict[str, Trap] = {
    "centred_batch": Trap(CentredBatch, vectors, "head", "other samples of its batch"),
    "random_prefix": Trap(RandomPrefix, vectors, "2", "draws random numbers"),
    "batch_mean": Trap(BatchMean, vectors, "2", "other samples of its batch"),
    "batch_size": Trap(BatchSize, vectors, "2", "batch"),
    "batch_statistics": Trap(BatchStatistics, vectors, "2", "other samples of its batch"),
    "data_integer": Trap(DataInteger, vectors, "head", "batch"),
    "branches": Trap(Branches, vectors, "inner.head", "inner.*_Branching"),
}
