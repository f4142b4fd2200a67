"""Trap models: small modules, each with one construction that breaks a naive split into prefix and suffix.

``TRAPS`` must split exactly, ``REFUSED`` must raise; each entry says where to cut. An executor that is written
elsewhere can be held against both tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachefreeze.testing.trap_models_crossing import (
    AsksHeadDtype,
    Branches,
    DataInteger,
    DictCrosses,
    DictOutput,
    HeadFirst,
    KeywordInputs,
    Masked,
    NumberedInput,
    ShapesCross,
    StructureCrosses,
    masked_batch,
)
from cachefreeze.testing.trap_models_random import (
    DropoutPrefix,
    FunctionalDropout,
    NoisyTail,
    RandomPrefix,
    RandomSuffix,
    ReboundBuffer,
    SpectralSuffix,
)
from cachefreeze.testing.trap_models_rows import (
    Attention,
    BatchMean,
    BatchSize,
    BatchStatistics,
    CentredBatch,
    FoldedBatch,
    Recurrent,
)
from cachefreeze.testing.trap_models_writes import (
    ActivatedTwice,
    AliasedSlices,
    AliasedView,
    Dense,
    FirstInPlace,
    PreActivation,
    Skip,
)

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
