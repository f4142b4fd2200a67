"""Opening a cache file without trusting it: a regular file, undamaged header and metadata, records that name their row.

No libhdf5 here, no code from the file, no path from the file.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from cachefreeze.errors import StoreError
from cachefreeze.stores.base import FieldSpec
from cachefreeze.stores.header import decode
from cachefreeze.stores.layout import HEADER_BYTES, Layout
from cachefreeze.stores.rows import CommitTable, complete
from cachefreeze.stores.source import Read
from cachefreeze.stores.system import failing_as, pread_all, store_error, system

_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a cache file says about itself.

    Attributes:
        rows: Rows it has room for.
        count: Rows with a commit record; whether their bytes match it only ``verify`` can tell.
        fields: Of every row.
        fingerprint: What must be equal for the rows to be reused.
        attributes: Free strings, written by whoever made the file. Not fit for a terminal without escaping.
        nbytes: Size of the file.
        created: When, in UTC.
    """

    rows: int
    count: int
    fields: tuple[FieldSpec, ...]
    fingerprint: Mapping[str, str]
    attributes: Mapping[str, str]
    nbytes: int
    created: datetime


def read_header(path: str | Path) -> Header:
    """Read what ``info`` shows, without mapping the file or touching its rows.

    Raises:
        StoreError: There is no such file, or it cannot be read.
        CorruptStoreError: It is no cache file, or a damaged one.
    """
    path = Path(path).absolute()
    fd, _ = open_regular(path, os.O_RDONLY)
    try:
        with failing_as("read", path):
            layout, _ = read_layout(fd, path)
            return Header(
                rows=layout.spec.rows,
                count=_count(fd, layout),
                fields=layout.spec.fields,
                fingerprint=layout.fingerprint,
                attributes=layout.attributes,
                nbytes=layout.file_bytes,
                created=datetime.fromtimestamp(layout.created, tz=timezone.utc),
            )
    finally:
        os.close(fd)


def open_regular(path: Path, flags: int) -> tuple[int, bool]:
    """Open an existing file that is neither a link nor a device nor a FIFO.

    Args:
        path: The file.
        flags: O_RDONLY, or O_RDWR, which settles for O_RDONLY where writing is not allowed.

    Returns:
        The descriptor, and whether it may be written to.

    Raises:
        StoreError: It is missing, cannot be opened, or is something else.
    """
    may_write = flags == os.O_RDWR
    try:
        try:
            fd = system.open(path, flags)
        except OSError as error:
            if not may_write or error.errno not in _DENIED:
                raise
            fd, may_write = system.open(path, os.O_RDONLY), False
    except FileNotFoundError:
        raise StoreError(f"there is no cache file {path}; HDF5Store.create makes one") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StoreError(f"{path} is a symbolic link, which is not followed: give the file itself") from error
        if error.errno == errno.EISDIR:
            raise StoreError(f"{path} is no regular file but a folder, so it is no cache file") from error
        raise store_error(error, "open", path) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StoreError(f"{path} is no regular file, so it is no cache file")
    return fd, may_write


def read_layout(fd: int, path: Path) -> tuple[Layout, int]:
    """Check the header and all that it vouches for: HDF5 metadata, lengths, padding.

    Returns:
        The layout, and the header's CRC-32, which tells one file from another at the same path.

    Raises:
        CorruptStoreError: Naming the damaged part.
    """
    block = pread_all(fd, HEADER_BYTES, 0)
    layout = decode(block, os.fstat(fd).st_size, lambda offset, size: pread_all(fd, size, offset), path)
    return layout, zlib.crc32(block[:-4])  # without its own CRC, or the result is a constant


def _count(fd: int, layout: Layout) -> int:
    source = Read(fd)
    try:
        table = CommitTable(source, layout.commit_offset, layout.spec.rows)
        return sum(int(complete(records, rows).sum()) for rows, records in table.chunks())
    finally:
        source.close()
