"""Where samples of different lengths lie in a padded batch, and how they get out of it and back into another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachefreeze.errors import BatchDependentError
from cachefreeze.tracing import Example


@dataclass(frozen=True)
class Axis:
    """One length that a sample has, and the padded dimensions of the model's inputs that follow it.

    Attributes:
        places: (number of the input among the leaves of the inputs, its dimension).
        values: Per place the value that it is padded with; None where no padding was seen.
        left: Whether padding comes before a sample's content.
        name: The inputs' names, for messages.
    """

    places: tuple[tuple[int, int], ...]
    values: tuple[float | None, ...]
    left: bool
    name: str

    def check(self, example: Example, lengths: Tensor) -> None:
        """Compare a batch with what is known of its samples: (n,) how much of each row is content.

        Raises:
            BatchDependentError: The batch is padded otherwise.
        """
        leaves = input_leaves(example)
        for (leaf, dim), value in zip(self.places, self.values, strict=True):
            rows = leaves[leaf].movedim(dim, 1)
            real = content(lengths, rows.shape[1], left=self.left).to(rows.device)
            cut = int(lengths.max()) > rows.shape[1]
            if cut or (value is not None and not bool((rows[~real] == value).all())):
                raise BatchDependentError(
                    f"a batch is not padded as its samples were when the loader was made ({self.name}: content on the "
                    f"{'right' if self.left else 'left'}, then {value}), so their rows do not fit in: a collate "
                    "function that cuts or sorts some batches, or a tokenizer whose settings changed? Make a new "
                    "loader after such a change"
                )

    def size(self, example: Example) -> int:
        """To how many steps a batch is padded."""
        leaf, dim = self.places[0]
        return int(input_leaves(example)[leaf].shape[dim])


@dataclass(frozen=True)
class Padded:
    """A collated batch of samples of different lengths.

    Attributes:
        example: The model's inputs.
        axes: The lengths that samples have.
        lengths: Per axis (n,) int64: how much of each sample's row is content.
    """

    example: Example
    axes: tuple[Axis, ...]
    lengths: tuple[Tensor, ...]

    def axis(self, place: tuple[int, int]) -> int:
        """Number of the axis that an input's dimension follows."""
        return next(i for i, axis in enumerate(self.axes) if place in axis.places)


def input_leaves(example: Example) -> list[Any]:
    """The leaves of a model's inputs, numbered as places are."""
    return pytree.tree_leaves((example.args, example.kwargs))


def unpad(tensor: Tensor, dims: tuple[int, int], lengths: Tensor, *, left: bool) -> Tensor:
    """Take the content out of a padded batch.

    Args:
        tensor: A batch with padding.
        dims: Its batch dimension and its padded one.
        lengths: (n,) how much of each row is content.
        left: Whether padding comes first.

    Shapes:
        tensor with n and the padded size at ``dims`` -> (n, longest of ``lengths``, *rest), zero after the content.

    """
    rows = tensor.movedim(dims, (0, 1))
    size, longest = rows.shape[1], int(lengths.max())
    if left:
        return _shifted(rows, lengths, size - lengths, longest)
    return _blank(rows[:, :longest], lengths).contiguous()


def pad(rows: Tensor, dims: tuple[int, int], lengths: Tensor, size: int, *, left: bool) -> Tensor:
    """The inverse of :func:`unpad`: content where it was, zeros where the padding was.

    Shapes:
        (n, at least the longest of ``lengths``, *rest) -> a tensor with n and ``size`` at ``dims``.
    """
    if left:
        made = _shifted(rows, lengths, lengths - size, size, last=True)
    else:
        made = rows.new_zeros((len(rows), size, *rows.shape[2:]))
        width = min(rows.shape[1], size)
        made[:, :width] = _blank(rows[:, :width], lengths)
    return made if dims == (0, 1) else made.movedim((0, 1), dims).contiguous()


def content(lengths: Tensor, size: int, *, left: bool) -> Tensor:
    """(n,) -> (n, size) bool: which steps of padded rows are content."""
    steps = torch.arange(size, device=lengths.device)
    return steps >= size - lengths[:, None] if left else steps < lengths[:, None]


def _shifted(rows: Tensor, lengths: Tensor, by: Tensor, size: int, *, last: bool = False) -> Tensor:
    """Step ``k + by`` of a row becomes its step ``k``; what is no content is zero."""
    index = (torch.arange(size)[None, :] + by[:, None]).clamp(0, max(rows.shape[1] - 1, 0)).to(rows.device)
    samples = torch.arange(len(rows), device=rows.device)[:, None]
    if not rows.shape[1]:
        return rows.new_zeros((len(rows), size, *rows.shape[2:]))
    return _blank(rows[samples, index], lengths, left=last)


def _blank(rows: Tensor, lengths: Tensor, *, left: bool = False) -> Tensor:
    real = content(lengths, rows.shape[1], left=left).to(rows.device)
    return torch.where(real.reshape(*real.shape, *[1] * (rows.dim() - 2)), rows, rows.new_zeros(()))


def ladder(sizes: Tensor, lengths: Tensor) -> tuple[int, int, int] | None:
    """Three samples: the second is padded less than the third on every axis, the first has less content than both.

    Args:
        sizes: (n, axes) to how much each sample is padded alone.
        lengths: (n, axes) how much of it is content.

    Returns:
        Their positions, the last two as long as possible; None where there are no such three.
    """
    order = sorted(range(len(sizes)), key=lambda i: int(lengths[i].sum()))
    padded, content_of = sizes.tolist(), lengths.tolist()

    def below(values: list[list[int]], a: int, b: int) -> bool:
        return all(x < y for x, y in zip(values[a], values[b], strict=True))

    for longest in reversed(order):
        for middle in reversed(order):
            if below(padded, middle, longest):
                shortest = next((i for i in order if below(content_of, i, middle)), None)
                if shortest is not None:
                    return shortest, middle, longest
    return None
