"""Samples of different lengths: small readers of padded text, each with one construction that padding can spoil.

``READERS`` must train from rows as they train without; ``REFUSED`` must raise when a loader is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

VOCABULARY = 23
CLASSES = 3
_LONGEST = 40


class Texts(Dataset[dict[str, Any]]):
    """Texts of 3 to 17 tokens, as a tokenizer gives them: lists of numbers, a label for each text and token.

    Args:
        count: Texts.
        seed: Of their content.
        lengths: Of each text; None draws them.
    """

    def __init__(self, count: int = 37, seed: int = 0, lengths: Sequence[int] | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(3, 18, (count,), generator=generator).tolist()
        self.lengths = list(lengths) if lengths is not None else drawn
        self.title = "text"
        self.ids = [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in self.lengths]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = list(self.ids[index])
        return {
            "ids": ids,
            "tags": [i % CLASSES for i in ids],
            "label": sum(ids) % CLASSES,
            "name": f"{self.title} {index}",
        }


@dataclass(frozen=True)
class Pad:
    """A collate function that pads to the longest text of a batch.

    Attributes:
        left: On the left.
        multiple: To a multiple of this.
        labels: ``text``: one a text; ``tags``: one a token, padding -100; ``tags0``: padding 0; "": none.
        mask: Whether a mask of the padding is part of the batch.
        positions: Whether each token's position within its text is.
        fixed: To this length whatever the batch.
        other: How the mask is padded, if on the other side.
        extra: Keys of the items that are handed on as lists.
    """

    left: bool = False
    multiple: int = 1
    labels: str = "text"
    mask: bool = True
    positions: bool = False
    fixed: int | None = None
    other: bool = False
    extra: tuple[str, ...] = ()

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of some items."""
        longest = self.fixed or max(len(item["ids"]) for item in items)
        size = -(-longest // self.multiple) * self.multiple

        def padded(rows: list[list[int]], value: int, *, left: bool) -> Tensor:
            made = torch.full((len(rows), size), value)
            for i, row in enumerate(rows):
                start = size - len(row) if left else 0
                made[i, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
            return made

        ids = [item["ids"] for item in items]
        batch: dict[str, Any] = {"ids": padded(ids, 0, left=self.left)}
        if self.mask:
            batch["mask"] = padded([[1] * len(row) for row in ids], 0, left=self.left != self.other)
        if self.positions:
            batch["positions"] = padded([[*range(len(row))] for row in ids], 0, left=self.left)
        if self.labels == "text":
            batch["labels"] = torch.tensor([item["label"] for item in items])
        elif self.labels:
            value = 0 if self.labels == "tags0" else -100
            batch["labels"] = padded([item["tags"] for item in items], value, left=self.left)
        return batch | {key: [item[key] for item in items] for key in self.extra}


class Block(nn.Module):
    """Attention with a mask, and two layers after it.

    Args:
        hidden: What is added to the attention of masked tokens.
        causal: Whether a token sees those before it only.
    """

    def __init__(self, width: int, hidden: float = -1e9, *, causal: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)
        self.hidden = hidden
        self.causal = causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, length, width) and a mask (batch, length) -> (batch, length, width)."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        scores = q @ k.transpose(1, 2) / x.shape[2] ** 0.5
        if mask is not None:
            scores = scores + (mask == 0)[:, None, :] * self.hidden
        if self.causal:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, torch.finfo(x.dtype).min)
        return x + self.dropout(self.out(functional.gelu(scores.softmax(dim=2) @ v)))  # type: ignore[no-any-return]


class Reader(nn.Module):
    """No trap: embeddings with positions, three blocks, and one result for each text or each token.

    Args:
        per: ``text`` or ``token``.
        causal: Whether a token sees those before it only.
        hidden: What is added to the attention of masked tokens.
        width: Of a token's activation.
    """

    def __init__(self, per: str = "text", *, causal: bool = False, hidden: float = -1e9, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(_LONGEST, width)
        self.blocks = nn.ModuleList(Block(width, hidden, causal=causal) for _ in range(3))
        self.head = nn.Linear(width, CLASSES)
        self.per = per

    def start(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """Embeddings; positions are counted from the start of the row where none are given."""
        where = torch.arange(ids.shape[1]) if positions is None else positions
        return self.embed(ids) + self.places(where)  # type: ignore[no-any-return]

    def end(self, x: Tensor, mask: Tensor | None, labels: Tensor | None) -> dict[str, Tensor]:
        """Pool over the text where it takes one result, and the loss where there are labels."""
        if self.per == "text":
            real = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
            x = (x * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": functional.cross_entropy(logits.flatten(0, -2), labels.flatten()), "logits": logits}

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Token ids (batch, length) and what else the batch holds to logits and a loss."""
        x = self.start(ids, positions)
        for block in self.blocks:
            x = block(x, mask)
        return self.end(x, mask, labels)


class _Running(nn.Module):
    """Adds to every token what comes before it in its text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        before = (x * mask[..., None]).cumsum(dim=1).clamp(-2, 2)
        return self.dropout(x + before * self.weight)  # type: ignore[no-any-return]


class Running(Reader):
    """No trap: all but the head rounds alike in every batch, however far that is padded, which matrix products do not.

    Args:
        per: As for :class:`Reader`.
    """

    def __init__(self, per: str = "token") -> None:
        super().__init__(per, width=6)
        self.blocks = nn.ModuleList(_Running(6) for _ in range(4))


class Convolved(Reader):
    """The frozen part looks at neighbours: at the end of a text, at the padding's embedding."""

    def __init__(self, *, blanked: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.blanked = blanked

    def start(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """Embeddings, convolved."""
        x = super().start(ids, positions)
        if self.blanked:  # as beyond the edge of the batch
            x = x * (ids != 0)[..., None]
        return self.conv(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


class Normed(Reader):
    """Batch norm over all tokens of a batch, in what trains."""

    def __init__(self) -> None:
        super().__init__("token")
        self.norm = nn.BatchNorm1d(12)

    def end(self, x: Tensor, mask: Tensor | None, labels: Tensor | None) -> dict[str, Tensor]:
        """Normed before the head."""
        return super().end(self.norm(x.transpose(1, 2)).transpose(1, 2), mask, labels)


class Recurrent(nn.Module):
    """A recurrent layer over the padded batch."""

    def __init__(self, *, both: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.first = nn.GRU(12, 12, batch_first=True, bidirectional=both)
        self.last = nn.Linear(24 if both else 12, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Token ids (batch, length) to logits for each token and a loss; the mask is ignored."""
        logits = self.last(self.first(self.embed(ids))[0])
        if labels is None:
            return {"logits": logits}
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class _Hidden(nn.Module):
    """Makes numbers to add to attention of a mask; with a weight its result is kept, without it is made anew."""

    def __init__(self, *, weighted: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(-1e9)) if weighted else None

    def forward(self, mask: Tensor) -> Tensor:
        return (mask == 0) * (-1e9 if self.weight is None else self.weight)


class NumericMask(Reader):
    """The mask is made into numbers, of which zero says that padding is content.

    Args:
        by: The ``forward`` itself, a ``module`` without weights, or one with frozen ``weights``, whose result is kept.
    """

    def __init__(self, by: str) -> None:
        super().__init__("token")
        self.hide = None if by == "forward" else _Hidden(weighted=by == "weights")
        self.last = nn.Linear(12, 12)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Token ids (batch, length) and a mask of the same shape to logits for each token and a loss."""
        assert mask is not None
        hidden = (mask == 0) * -1e9 if self.hide is None else self.hide(mask)
        x = self.start(ids, positions)
        for block in self.blocks[:2]:
            x = block(x, mask)
        weights = (x.sum(dim=2) + hidden).softmax(dim=1)
        x = self.last(x) + (weights[..., None] * x).sum(dim=1, keepdim=True)
        return self.end(x, mask, labels)


class Strided(Reader):
    """Halves the length: no input has the length of its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Conv1d(12, 12, 2, stride=2)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Token ids (batch, length) to logits and a loss; the mask is ignored."""
        x = self.pool(self.start(ids, positions).transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.end(x, None, labels)


@dataclass(frozen=True)
class Case:
    """A model, a collate function and a boundary.

    Attributes:
        model: Builds the model.
        collate: Of the loader over :class:`Texts`.
        train_from: The boundary.
        error: For refused cases, the class of the error and a part of it (a regular expression).
    """

    model: Callable[[], nn.Module]
    collate: Callable[[list[dict[str, Any]]], Any]
    train_from: str = "blocks.2"
    error: tuple[str, str] = field(default=("", ""))


READERS: dict[str, Case] = {
    "right": Case(Reader, Pad()),
    "left with positions": Case(Reader, Pad(left=True, positions=True)),
    "multiples": Case(Reader, Pad(multiple=8)),
    "left, multiples": Case(Reader, Pad(left=True, multiple=4, positions=True)),
    "labels per token": Case(partial(Reader, "token"), Pad(labels="tags", multiple=8)),
    "no mask, causal": Case(partial(Reader, "token", causal=True), Pad(labels="tags", mask=False)),
    "head only": Case(Reader, Pad(), "head"),
    "first block": Case(Reader, Pad(), "blocks.0"),
    "blanked convolution": Case(partial(Convolved, blanked=True), Pad(), "blocks.0"),
    "recurrent": Case(partial(Recurrent, both=False), Pad(labels="tags"), "last"),
    "mask made again": Case(partial(NumericMask, "forward"), Pad(labels="tags"), "last"),
    "mask made again by a module": Case(partial(NumericMask, "module"), Pad(labels="tags"), "last"),
}

REFUSED: dict[str, Case] = {
    "left with absolute positions": Case(Reader, Pad(left=True), error=("BatchDependentError", "how far its batch")),
    "weak mask": Case(partial(Reader, hidden=-2.0), Pad(), error=("BatchDependentError", "how far its batch")),
    "no mask": Case(Reader, Pad(mask=False), error=("BatchDependentError", "how far its batch")),
    "convolution": Case(Convolved, Pad(), "blocks.0", ("BatchDependentError", "convolution")),
    "recurrent both ways": Case(
        partial(Recurrent, both=True), Pad(labels="tags"), "last", ("BatchDependentError", "how far its batch")
    ),
    "batch norm": Case(Normed, Pad(labels="tags"), "norm", ("SplitError", "zeros in place of the padding")),
    "loss over padding": Case(partial(Reader, "token"), Pad(labels="tags0"), "head", ("SplitError", "loss.*differs")),
    "mean over padding": Case(
        partial(Reader, causal=True), Pad(mask=False), "head", ("BatchDependentError", "how far its batch")
    ),
    "mask as numbers": Case(
        partial(NumericMask, "weights"), Pad(labels="tags"), "last", ("SplitError", "zeros in place of the padding")
    ),
    "halved length": Case(Strided, Pad(), "blocks.0", ("SplitError", "follows the padded length in a way")),
    "two sides": Case(Reader, Pad(other=True), error=("BatchDependentError", "other side|does not simply pad")),
}
