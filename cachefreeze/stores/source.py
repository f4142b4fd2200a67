"""The bytes of a cache file: through a memory map, or by ``pread`` where the file is large or maps are not trusted.

A map is the faster of the two on a local disk while its pages stay mapped, and then they count as memory of the
process. Of a large file they would have to be unmapped again, and to map a page anew costs more than to read a row. On
a network file system, or a file that somebody may shorten, a page that cannot be had kills the process by SIGBUS;
``pread`` raises instead.
"""

from __future__ import annotations

import errno
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from cachefreeze.stores.system import pread_into

IO = Literal["auto", "mmap", "pread"]

# Largest file that "auto" maps: as much as a run's peak may differ by with the rows of a store.
MAPPED_BYTES = 256 << 20

# Of one hint Linux reads no more than a disk's read-ahead window, of which this is the default size: mm/readahead.c
_EXPECTED_BYTES = 128 << 10


class Source(ABC):
    """Where the bytes of an open file come from."""

    @abstractmethod
    def at(self, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        """(size_bytes,) uint8, read-only; valid until :meth:`close`.

        Raises:
            OSError: They cannot be read.
        """

    @abstractmethod
    def take(self, offset: int, index: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy the ``index``-th records of ``out.shape[1]`` bytes each, counted from ``offset``, into ``out``."""

    def expect(self, offset: int, size_bytes: int) -> None:  # noqa: B027
        """Some bytes will soon be read; a hint."""

    @abstractmethod
    def close(self) -> None:
        """Release what is held; the descriptor is the caller's."""


@final
class Mapped(Source):
    """All of the file in the address space."""

    def __init__(self, fd: int, file_bytes: int) -> None:
        try:
            self._mapping = mmap.mmap(fd, file_bytes, access=mmap.ACCESS_READ)
        except ValueError as error:  # as if the caller had asked for too much
            raise OSError(errno.EIO, "the file has become shorter meanwhile") from error
        self._bytes: NDArray[Any] = np.frombuffer(self._mapping, np.uint8)
        self._tables: dict[tuple[int, int], NDArray[Any]] = {}

    def at(self, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        """A view; no copy."""
        return self._bytes[offset : offset + size_bytes]

    def take(self, offset: int, index: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """One gather."""
        record_bytes = out.shape[1]
        table = self._tables.get((offset, record_bytes))
        if table is None:
            records = (len(self._bytes) - offset) // record_bytes
            table = self._bytes[offset : offset + records * record_bytes].reshape(records, record_bytes)
            self._tables[offset, record_bytes] = table
        # "clip" as "raise" gathers into a second buffer first; the caller has checked the indices
        table.take(index, axis=0, out=out, mode="clip")

    def close(self) -> None:
        """Unmap, unless a read in another thread still gathers: then when that ends."""
        self._tables.clear()
        self._bytes = self._bytes[:0].copy()
        with suppress(BufferError):
            self._mapping.close()


@final
class Read(Source):
    """By ``pread``: nothing is mapped, and a file that has become shorter is an error."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)

    def at(self, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        """A copy."""
        made = np.empty(size_bytes, np.uint8)
        self._into(made.data, offset)
        return made

    def take(self, offset: int, index: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """One call per stretch of neighbours."""
        record_bytes = out.shape[1]
        assert out.flags.c_contiguous  # or what is read would go into a copy
        place = out.reshape(-1).data
        starts = (offset + index * record_bytes).tolist()
        for start, stop in stretches(index):
            part = place[start * record_bytes : stop * record_bytes]
            if os.preadv(self._fd, [part], starts[start]) != len(part):
                self._into(part, starts[start])  # it may come in pieces

    def expect(self, offset: int, size_bytes: int) -> None:
        """The system begins to read them into its page cache."""
        if not hasattr(os, "posix_fadvise"):
            return
        for start in range(offset, offset + size_bytes, _EXPECTED_BYTES):
            part_bytes = min(_EXPECTED_BYTES, offset + size_bytes - start)
            with suppress(OSError):  # closed meanwhile, or a file system that takes no hints
                os.posix_fadvise(self._fd, start, part_bytes, os.POSIX_FADV_WILLNEED)

    def _into(self, place: memoryview, offset: int) -> None:
        missing_bytes = len(place) - pread_into(self._fd, place, offset)
        if missing_bytes:
            raise OSError(errno.EIO, f"the file ends {missing_bytes:,} bytes early")

    def close(self) -> None:
        """Close the descriptor's duplicate."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def open_source(io: IO, fd: int, file_bytes: int) -> Source:
    """The source that ``io`` names."""
    mapped = file_bytes <= MAPPED_BYTES if io == "auto" else io == "mmap"
    return Mapped(fd, file_bytes) if mapped else Read(fd)


def stretches(index: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the stretches of ``index`` that count up by one: each is one read, one write, or one lock."""
    edges = [0, *(np.flatnonzero(np.diff(index) != 1) + 1).tolist(), len(index)]
    return pairwise(edges if len(index) else [])
