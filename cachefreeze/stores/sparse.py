"""A sparse file in memory, for libhdf5 to lay a cache file out in."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any, final

_PAGE_BYTES = 4096


@final
class SparseFile(io.RawIOBase):
    """A sparse file in memory: libhdf5 lays out terabytes here and writes some kilobytes of metadata.

    Letting it write to the disk instead would put it on the path of a full disk, where it dies by a signal.
    """

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.size = 0
        self._position = 0

    def readable(self) -> bool:
        """True; see io."""
        return True

    def writable(self) -> bool:
        """True; see io."""
        return True

    def seekable(self) -> bool:
        """True; see io."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to ``offset`` from start, position or end."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        """Where the next read or write begins."""
        return self._position

    def truncate(self, size: int | None = None) -> int:
        """Set the size; nothing is allocated."""
        self.size = self._position if size is None else size
        return self.size

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``; what was never written reads as zeros, also beyond the end."""
        view = memoryview(buffer).cast("B")
        view[:] = self.at(self._position, len(view))
        self._position += len(view)
        return len(view)

    def write(self, data: Any) -> int:
        """Keep all of ``data``."""
        view = memoryview(data).cast("B")
        for page, inside, start, size in _page_spans(self._position, len(view)):
            self.pages.setdefault(page, bytearray(_PAGE_BYTES))[inside : inside + size] = view[start : start + size]
        self._position += len(view)
        self.size = max(self.size, self._position)
        return len(view)

    def at(self, offset: int, size: int) -> bytes:
        """The ``size`` bytes from ``offset`` on."""
        data = bytearray(size)
        for page, inside, start, part in _page_spans(offset, size):
            if page in self.pages:
                data[start : start + part] = self.pages[page][inside : inside + part]
        return bytes(data)


def _page_spans(offset: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """(page, offset in the page, offset in the span, bytes) for every page that a span touches."""
    done = 0
    while done < size:
        page, inside = divmod(offset + done, _PAGE_BYTES)
        part = min(_PAGE_BYTES - inside, size - done)
        yield page, inside, done, part
        done += part
