"""One field of a cache file as bytes: where each row lies, and how a batch becomes those bytes and comes back.

Shapes:
    packed: (bytes,) uint8, the rows of a batch one after another, each at its own length.
    padded: (n, width * item_bytes) uint8, the rows of a batch side by side; zeros follow a row's last byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachefreeze.stores.base import FieldSpec


@final
class Packed:
    """Rows as they are written: consecutive rows are consecutive bytes.

    Attributes:
        data: (bytes,) uint8.
        ends: (n + 1,) where row i begins, and row i - 1 ends.
    """

    def __init__(self, data: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.data = data
        self.ends = ends

    def stretch(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of rows start … stop - 1 of the batch."""
        return self.data[self.ends[start] : self.ends[stop]]

    def rows(self) -> Sequence[NDArray[np.uint8]]:
        """The bytes of each row."""
        return [self.data[start:end] for start, end in pairwise(self.ends.tolist())]


@final
class Column:
    """One field's dataset within the file.

    Args:
        field: What it holds.
        file: (file_bytes,) uint8, the mapped file.
        offset: Of the dataset.
        rows: Of the store.
    """

    def __init__(self, field: FieldSpec, file: NDArray[np.uint8], offset: int, rows: int) -> None:
        self.field = field
        self.offset = offset
        self._data = file[offset : offset + field.items(rows) * field.item_bytes]

    def spans(self, rows: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) row indices -> where each row's bytes begin in the dataset, and how many they are."""
        item_bytes, lengths = self.field.item_bytes, self.field.lengths
        if lengths is None:
            return rows.numpy() * item_bytes, np.full(len(rows), item_bytes, np.int64)
        return lengths.starts(rows).numpy() * item_bytes, lengths.of(rows).numpy() * item_bytes

    def pack(self, rows: Tensor, batch: Tensor) -> Packed:
        """(n, *batch_shape) on any device -> the bytes of its rows, without padding."""
        items = batch.detach()
        if self.field.lengths is not None:
            kept = self.field.lengths.mask(rows, batch.shape[1]).flatten().nonzero().flatten()
            items = items.flatten(0, 1).index_select(0, kept.to(batch.device))
        data = items.cpu().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy()
        ends = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(self.spans(rows)[1], out=ends[1:])
        return Packed(data, ends)

    def gather(self, rows: Tensor) -> tuple[Tensor, list[NDArray[np.uint8]]]:
        """Copy rows out of the file.

        Returns:
            The batch, and the bytes of each of its rows as the file has them.
        """
        field = self.field
        shape = field.batch_shape(rows)
        if field.lengths is None:
            fresh = torch.empty(shape, dtype=field.dtype)
            bytes_ = fresh.view(-1).view(torch.uint8).view(len(rows), field.item_bytes)
            # "clip" as "raise" gathers into a second buffer first; the indices have been checked
            np.take(self._data.reshape(-1, field.item_bytes), rows.numpy(), axis=0, out=bytes_.numpy(), mode="clip")
            raw = list(bytes_.numpy())
        else:
            fresh = torch.zeros(shape, dtype=field.dtype)
            bytes_ = fresh.view(-1).view(torch.uint8).view(len(rows), shape[1] * field.item_bytes)
            starts, sizes = self.spans(rows)
            raw = [row[:size] for row, size in zip(bytes_.numpy(), sizes.tolist(), strict=True)]
            for row, start in zip(raw, starts.tolist(), strict=True):
                row[:] = self._data[start : start + len(row)]
        # A bool of any other byte than 0 and 1 is undefined behaviour in torch, and the file may hold one.
        return (bytes_.ne(0).view(shape) if field.dtype == torch.bool else fresh), raw

    def row(self, start: int, size: int) -> NDArray[np.uint8]:
        """A row's bytes in the file."""
        return self._data[start : start + size]
