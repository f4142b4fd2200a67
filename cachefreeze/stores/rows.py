"""Rows as bytes, and the 16-byte record that says of a row that it is complete."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

RECORD = np.dtype([("xxh3_64", "<u8"), ("row_plus_1", "<u4"), ("flags", "<u4")])
COMPLETE = 1  # the only flags of format version 1: all fields of the row are in place


def complete(records: NDArray[Any], first_row: int) -> NDArray[np.bool_]:
    """Which of the consecutive ``records`` from ``first_row`` on say that their own row is complete.

    A record that names another row, or has flags this format does not know, says nothing.
    """
    own = np.arange(first_row + 1, first_row + 1 + len(records), dtype=np.uint32)
    return np.asarray((records["row_plus_1"] == own) & (records["flags"] == COMPLETE))


def row_digest(parts: Sequence[NDArray[np.uint8]]) -> int:
    """xxh3_64 over the bytes of one row, its fields in header order."""
    if len(parts) == 1:
        return xxhash.xxh3_64_intdigest(parts[0].data)
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part.data)
    return digest.intdigest()


def stretches(index: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the stretches of ``index`` that count up by one: each is one write."""
    edges = [0, *(np.flatnonzero(np.diff(index) != 1) + 1).tolist(), len(index)]
    return pairwise(edges)
