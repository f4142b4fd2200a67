"""The 16-byte record that says of a row that it is complete, and the table of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np
import xxhash
from numpy.typing import NDArray

from cachefreeze.stores.columns import Packed
from cachefreeze.stores.layout import RECORD_BYTES
from cachefreeze.stores.source import Source

RECORD = np.dtype([("xxh3_64", "<u8"), ("row_plus_1", "<u4"), ("flags", "<u4")])
COMPLETE = 1  # the only flags of format version 1: all fields of the row are in place
CHUNK_ROWS = 1 << 20  # bounds the memory that scanning a commit table takes


def complete(records: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of ``records``, one for each of ``rows``, say that their own row is complete.

    A record that names another row, or has flags this format does not know, says nothing.
    """
    return np.asarray((records["row_plus_1"] == rows + 1) & (records["flags"] == COMPLETE))


def records_of(rows: NDArray[np.int64], digests: Sequence[int]) -> NDArray[Any]:
    """The records of complete rows."""
    records = np.zeros(len(rows), RECORD)
    records["xxh3_64"] = digests
    records["row_plus_1"] = rows + 1
    records["flags"] = COMPLETE
    return records


@final
class CommitTable:
    """The records of a file as they are now, whoever writes them.

    Args:
        source: The file.
        offset: Of the table.
        rows: Of the store.
    """

    def __init__(self, source: Source, offset: int, rows: int) -> None:
        self._source = source
        self.offset = offset
        self._rows = rows

    def position(self, row: int) -> int:
        """Where a row's record lies in the file."""
        return self.offset + int(row) * RECORD_BYTES

    def of(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of the records of ``rows``."""
        records = np.empty(len(rows), RECORD)
        self._source.take(self.offset, rows, records.view(np.uint8).reshape(len(rows), RECORD_BYTES))
        return records

    def pack(self, rows: NDArray[np.int64], records: NDArray[Any]) -> Packed:
        """The records of ``rows`` as they are written."""
        ends = range(0, (len(rows) + 1) * RECORD_BYTES, RECORD_BYTES)
        return Packed(records.view(np.uint8).data, list(ends), (self.offset + rows * RECORD_BYTES).tolist())

    def chunks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """(rows, their records) for all rows, in order."""
        for start in range(0, self._rows, CHUNK_ROWS):
            rows = np.arange(start, min(start + CHUNK_ROWS, self._rows))
            yield rows, self._source.at(self.position(start), len(rows) * RECORD_BYTES).view(RECORD)


def row_digest(parts: Sequence[Any]) -> int:
    """xxh3_64 over the bytes of one row, its fields (arrays or memory views) in header order."""
    if len(parts) == 1:
        return xxhash.xxh3_64_intdigest(parts[0])
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()
