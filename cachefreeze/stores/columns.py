"""One field of a cache file as bytes: where each row lies, and how a batch becomes those bytes and comes back.

Shapes:
    packed: (bytes,) uint8, the rows of a batch one after another, each at its own length.
    padded: (n, width * item_bytes) uint8, the rows of a batch side by side; zeros follow a row's last byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachefreeze.stores.base import FieldSpec
from cachefreeze.stores.recycling import Recycler
from cachefreeze.stores.source import Source, stretches


@final
class Packed:
    """Rows as they are written: consecutive rows are consecutive bytes.

    Attributes:
        data: The bytes of all rows.
        ends: n + 1 numbers: where row i begins in ``data``, and row i - 1 ends.
        starts: n numbers: where row i begins in the file.
    """

    def __init__(self, data: memoryview, ends: list[int], starts: list[int]) -> None:
        self.data = data
        self.ends = ends
        self.starts = starts

    def rows(self) -> list[memoryview]:
        """The bytes of each row."""
        return [self.data[start:end] for start, end in pairwise(self.ends)]


@final
class Column:
    """One field's dataset within the file.

    Args:
        field: What it holds.
        source: The file.
        offset: Of the dataset.
        recycler: Where batches lie.
    """

    def __init__(self, field: FieldSpec, source: Source, offset: int, recycler: Recycler) -> None:
        self.field = field
        self._source = source
        self._offset = offset
        self._recycler = recycler

    def spans(self, rows: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) row indices -> where each row's bytes begin in the file, and how many they are."""
        item_bytes, lengths = self.field.item_bytes, self.field.lengths
        if lengths is None:
            return self._offset + rows.numpy() * item_bytes, np.full(len(rows), item_bytes, np.int64)
        return self._offset + lengths.starts(rows).numpy() * item_bytes, lengths.of(rows).numpy() * item_bytes

    def expect(self, rows: Tensor) -> None:
        """Rows, in order, that will soon be read."""
        starts, sizes = self.spans(rows)
        for start, stop in stretches(rows.numpy()):
            at = int(starts[start])
            self._source.expect(at, int(starts[stop - 1] + sizes[stop - 1]) - at)

    def pack(self, rows: Tensor, batch: Tensor) -> Packed:
        """(n, *batch_shape) on any device -> the bytes of its rows, without padding."""
        items = batch.detach()
        if self.field.lengths is not None:
            kept = self.field.lengths.mask(rows, batch.shape[1]).flatten().nonzero().flatten()
            items = items.flatten(0, 1).index_select(0, kept.to(batch.device))
        data = items.cpu().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy()
        starts, sizes = self.spans(rows)
        return Packed(data.data, [0, *sizes.cumsum().tolist()], starts.tolist())

    def gathering(self, rows: Tensor) -> Gathering:
        """A fresh batch of ``rows``, still to be copied out of the file."""
        return Gathering(self, self._source, self._offset, rows, self._recycler)

    def each(self, rows: Tensor) -> Iterator[NDArray[np.uint8]]:
        """The bytes of each row, one after another and without a batch."""
        for start, size in zip(*(of.tolist() for of in self.spans(rows)), strict=True):
            yield self._source.at(start, size)


@final
class Gathering:
    """A batch of one field on its way out of the file.

    Args:
        column: Whose rows.
        source: The file.
        offset: Of the dataset.
        rows: (n,) row indices.
        recycler: Where the batch lies.

    Attributes:
        raw: The bytes of each row as the file has them, once they are copied.
    """

    def __init__(self, column: Column, source: Source, offset: int, rows: Tensor, recycler: Recycler) -> None:
        field, shape = column.field, column.field.batch_shape(rows)
        self._source = source
        self._offset = offset
        self._index: NDArray[np.int64] = rows.numpy()
        self._starts: list[int] = []
        self._fresh = recycler.empty(shape, field.dtype)
        row_bytes = field.item_bytes if field.lengths is None else shape[1] * field.item_bytes
        bytes_ = self._fresh.view(-1).view(torch.uint8).numpy().reshape(len(rows), row_bytes)
        self.raw: Sequence[NDArray[np.uint8]] | NDArray[np.uint8] = bytes_
        if field.lengths is not None:
            self._fresh.zero_()
            self._starts, sizes = (of.tolist() for of in column.spans(rows))
            self.raw = [row[:size] for row, size in zip(bytes_, sizes, strict=True)]

    def take(self, start: int, stop: int) -> None:
        """Copy rows start … stop - 1 of the batch."""
        if isinstance(self.raw, np.ndarray):
            self._source.take(self._offset, self._index[start:stop], self.raw[start:stop])
        else:
            for row, at in zip(self.raw[start:stop], self._starts[start:stop], strict=True):
                row[:] = self._source.at(at, len(row))

    def whole(self) -> Tensor:
        """Copy all rows."""
        self.take(0, len(self._index))
        return self.batch()

    def batch(self) -> Tensor:
        """The rows, all of which have been taken."""
        if self._fresh.dtype != torch.bool:
            return self._fresh
        # A bool of any other byte than 0 and 1 is undefined behaviour in torch, and the file may hold one.
        return self._fresh.view(torch.uint8).ne(0)
