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

from cachefreeze.stores.system import pread_all

IO = Literal["mmap", "pread"]


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

    def at(self, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        """A view; no copy."""
        return self._bytes[offset : offset + size_bytes]

    def take(self, offset: int, index: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """One gather."""
        record_bytes = out.shape[1]
        records = (len(self._bytes) - offset) // record_bytes
        table = self._bytes[offset : offset + records * record_bytes].reshape(records, record_bytes)
        # "clip" as "raise" gathers into a second buffer first; the caller has checked the indices
        np.take(table, index, axis=0, out=out, mode="clip")

    def close(self) -> None:
        """Unmap, unless a read in another thread still gathers: then when that ends."""
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
        data = pread_all(self._fd, size_bytes, offset)
        if len(data) < size_bytes:
            raise OSError(errno.EIO, f"the file ends {size_bytes - len(data):,} bytes early")
        return np.frombuffer(data, np.uint8)

    def take(self, offset: int, index: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """One call per record."""
        record_bytes = out.shape[1]
        for row, at in zip(out, index.tolist(), strict=True):
            row[:] = self.at(offset + at * record_bytes, record_bytes)

    def close(self) -> None:
        """Close the descriptor's duplicate."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def open_source(io: IO, fd: int, file_bytes: int) -> Source:
    """The source that ``io`` names."""
    return Mapped(fd, file_bytes) if io == "mmap" else Read(fd)
