"""Trap models of what a forward is given, hands over at the boundary and returns, and in which order it asks for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


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
