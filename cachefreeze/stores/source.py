"""The bytes of a cache file: through a memory map, or by ``pread`` where maps are not to be trusted.

A map is the faster of the two on a local disk. On a network file system, or a file that somebody may shorten, a page
that cannot be had kills the process by SIGBUS; ``pread`` raises instead.
"""

from __future__ import annotations

import errno
import mmap
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from cachefreeze.stores.system import pread_into

IO = Literal["mmap", "pread"]

# Pages of one mapped file that a process holds at most: a run's peak does not grow with its rows, and smaller files
# are never unmapped. The pages stay in the page cache, so to take one up again costs a fault and no read.
MAPPED_BYTES = 1 << 30
# With the page that is touched Linux maps others around it.
# Source: fault_around_bytes, https://docs.kernel.org/admin-guide/mm/ (debugfs), 64 KiB unless it is changed
_AROUND_BYTES = 1 << 16


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

    @abstractmethod
    def close(self) -> None:
        """Release what is held; the descriptor is the caller's."""


@final
class Mapped(Source):
    """All of the file in the address space."""

    def __init__(self, fd: int, file_bytes: int) -> None:
        self._mapping = mmap.mmap(fd, file_bytes, access=mmap.ACCESS_READ)
        self._bytes: NDArray[Any] = np.frombuffer(self._mapping, np.uint8)
        self._tables: dict[tuple[int, int], NDArray[Any]] = {}
        self._held_bytes = 0
        self._bounded = file_bytes > MAPPED_BYTES and hasattr(mmap, "MADV_DONTNEED")

    def at(self, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        """A view; no copy."""
        if self._bounded:
            self._hold(size_bytes, 1)
        return self._bytes[offset : offset + size_bytes]

    def take(self, offset: int, index: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """One gather."""
        record_bytes = out.shape[1]
        table = self._tables.get((offset, record_bytes))
        if table is None:
            records = (len(self._bytes) - offset) // record_bytes
            table = self._bytes[offset : offset + records * record_bytes].reshape(records, record_bytes)
            self._tables[offset, record_bytes] = table
        if self._bounded:
            self._hold(out.nbytes, len(index))
        # "clip" as "raise" gathers into a second buffer first; the caller has checked the indices
        table.take(index, axis=0, out=out, mode="clip")

    def _hold(self, size_bytes: int, places: int) -> None:
        """Make room for the pages of a read, at most as many as it may map."""
        more = size_bytes + places * _AROUND_BYTES
        if self._held_bytes + more > MAPPED_BYTES:
            self._mapping.madvise(mmap.MADV_DONTNEED)
            self._held_bytes = 0
        self._held_bytes += more

    def close(self) -> None:
        """Unmap, unless a read in another thread still gathers: then when that ends."""
        self._tables.clear()
        self._bytes = self._bytes[:0].copy()
        self._bounded = False
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
        """One call per record."""
        record_bytes = out.shape[1]
        for row, at in zip(out, index.tolist(), strict=True):
            self._into(row.data, offset + at * record_bytes)

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
    return Mapped(fd, file_bytes) if io == "mmap" else Read(fd)
