"""On which side, and with what, a collate function pads: read from samples collated alone and beside each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cachefreeze.errors import BatchDependentError

# An input's dimension: number of the input among the leaves of the inputs, and the dimension.
Place = tuple[int, int]


class Sides:
    """On which side, and with what, the inputs of one axis are padded."""

    def __init__(self, places: list[Place], names: Callable[[int], str]) -> None:
        self.values: dict[Place, float] = {}
        self._places = places
        self._names = names
        self._possible = {True, False}
        self._rows: dict[Place, list[Tensor]] = {place: [] for place in places}

    def compare(self, together: list[Any], alone: list[list[Any]]) -> None:
        """Look at a short and a long sample in one batch, and at each alone."""
        for leaf, dim in self._places:
            possible = set()
            for side in (False, True):
                found = self._padding_of(together[leaf], [one[leaf] for one in alone], dim, left=side)
                values = {self.values[leaf, dim]} if (leaf, dim) in self.values else set()
                if found is not None and len(values | found) <= 1:
                    possible.add(side)
                    for value in found:
                        self.values[leaf, dim] = value
            if not possible & self._possible:
                raise BatchDependentError(
                    f"the collate function does not simply pad {self._names(leaf)}: a short sample beside a long one "
                    "is neither at the front nor at the back of its row with one value in the rest of it, or another "
                    "input is padded on the other side. Pad all on one side, with one value each, or to a fixed length"
                )
            self._possible &= possible
            self._rows[leaf, dim] += [one[leaf][0].movedim(dim - 1, 0) for one in alone]

    def left(self) -> bool:
        """Whether padding comes first; where nothing tells, it does not."""
        return False not in self._possible

    def has_mask(self, *, left: bool) -> bool:
        """Whether one of the inputs is a padding mask: ones on the content, then zeros, padded with zeros.

        That of an empty sample has no ones; one of them must have some.
        """
        return any(
            self.values.get(place) == 0.0
            and any(bool(row.any()) for row in rows)
            and all(_is_mask(row, left=left) for row in rows)
            for place, rows in self._rows.items()
        )

    @staticmethod
    def _padding_of(batch: Tensor, alone: list[Tensor], dim: int, *, left: bool) -> set[float] | None:
        """The padding's values, none where there is no padding; None where this is not the side."""
        values: set[float] = set()
        for position, one in enumerate(alone):
            row, own = batch[position].movedim(dim - 1, 0), one[0].movedim(dim - 1, 0)
            extra = len(row) - len(own)
            if extra < 0:
                return None
            kept, added = (row[extra:], row[:extra]) if left else (row[: len(own)], row[len(own) :])
            if not torch.equal(kept, own):
                return None
            values |= set(added.double().flatten().tolist())
        return values


def _is_mask(row: Tensor, *, left: bool) -> bool:
    if row.dim() != 1 or row.dtype.is_complex:
        return False
    from_content = row.flip(0) if left else row
    ones = int((from_content == 1).sum())
    return bool((from_content[:ones] == 1).all()) and bool((from_content[ones:] == 0).all())
