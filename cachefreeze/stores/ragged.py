"""Rows of different lengths: how long each is, and where its items lie among those of all rows.

An *item* is one step along the first dimension of a row, such as the activation of one token.

Shapes:
    flat: (total, *rest): the items of every row, row after row, nothing between them.
    padded: (n, width, *rest): n rows side by side, each from item 0 on; zeros follow its last item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from cachefreeze.errors import StoreError


@final
class Lengths:
    """How many items each row of a field has: immutable, compared and hashed by value. 8 bytes a row.

    Args:
        lengths: One integer ≥ 0 per row, in row order.

    Raises:
        StoreError: They are no integers ≥ 0, or too many items to count.
    """

    def __init__(self, lengths: Sequence[int] | Tensor | NDArray[Any]) -> None:
        values = np.asarray(lengths.cpu() if isinstance(lengths, Tensor) else lengths)
        if values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
            raise StoreError(f"lengths must be one integer per row, got {values.dtype} of shape {values.shape}")
        values = values.astype(np.int64)
        if (values < 0).any():
            row = int((values < 0).argmax())
            raise StoreError(f"lengths must be 0 or more, got {int(values[row])} for row {row}")
        starts = np.zeros(len(values) + 1, np.int64)
        np.cumsum(values, out=starts[1:])
        if (starts < 0).any():  # the first sum that overflows wraps to a negative number
            raise StoreError("lengths add up to more than 2**63 - 1 items: no store can hold them")
        self.longest = int(values.max(initial=0))
        self._starts = torch.from_numpy(starts)
        self._hash = xxhash.xxh3_64_intdigest(starts.data)

    @property
    def total(self) -> int:
        """Items of all rows together."""
        return int(self._starts[-1])

    @property
    def values(self) -> Tensor:
        """(rows,) int64, a copy."""
        return self._starts.diff()

    def of(self, rows: Tensor) -> Tensor:
        """(n,) row indices -> (n,) lengths."""
        return self._starts[rows + 1] - self._starts[rows]

    def starts(self, rows: Tensor) -> Tensor:
        """(n,) row indices -> (n,) position in ``flat`` of each row's first item."""
        return self._starts[rows]

    def width(self, rows: Tensor) -> int:
        """Items of the longest of ``rows``: how wide a batch of them is. 0 for no rows."""
        return int(self.of(rows).max()) if len(rows) else 0

    def mask(self, rows: Tensor, width: int) -> Tensor:
        """(n, width) bool: which places of a padded batch hold an item."""
        return torch.arange(width) < self.of(rows)[:, None]

    def positions(self, rows: Tensor, width: int) -> Tensor:
        """(n, width) int64: where in ``flat`` the item at each place of a padded batch lies; ``total`` at padding."""
        inside = self._starts[rows][:, None] + torch.arange(width)
        return inside.masked_fill_(~self.mask(rows, width), self.total)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Lengths):
            return NotImplemented
        return self is other or (self._hash == other._hash and torch.equal(self._starts, other._starts))

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Lengths({len(self):,} rows, longest {self.longest:,}, {self.total:,} items)"
