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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachefreeze.errors import CorruptStoreError, StoreError
from cachefreeze.stores.base import FieldSpec
from cachefreeze.stores.header import HEADER_BYTES, RECORD_BYTES, Layout, decode, metadata_sha256
from cachefreeze.stores.system import pread_all, store_error, system

RECORD = np.dtype([("xxh3_64", "<u8"), ("row_plus_1", "<u4"), ("flags", "<u4")])
COMPLETE = 1  # the only flags of format version 1: all fields of the row are in place
CHUNK_ROWS = 1 << 20  # bounds the memory that scanning a commit table takes

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
    fd = open_regular(path, os.O_RDONLY)
    try:
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
    except OSError as error:
        raise error if isinstance(error, StoreError) else store_error(error, "read", path) from error
    finally:
        os.close(fd)


def open_regular(path: Path, flags: int) -> int:
    """Open an existing file that is neither a link nor a device nor a FIFO.

    Asked for O_RDWR, it settles for O_RDONLY where writing is not allowed; the caller asks the descriptor.

    Raises:
        StoreError: It is missing, cannot be opened, or is something else.
    """
    try:
        try:
            fd = system.open(path, flags)
        except OSError as error:
            if flags == os.O_RDONLY or error.errno not in _DENIED:
                raise
            fd = system.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise StoreError(f"there is no cache file {path}; HDF5Store.create makes one") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StoreError(f"{path} is a symbolic link, which is not followed: give the file itself") from error
        raise store_error(error, "open", path) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StoreError(f"{path} is no regular file, so it is no cache file")
    return fd


def read_layout(fd: int, path: Path) -> tuple[Layout, int]:
    """Check header and HDF5 metadata.

    Returns:
        The layout, and the CRC-32 of the header block, which tells one file from another at the same path.

    Raises:
        CorruptStoreError: Naming the damaged part.
    """
    block = pread_all(fd, HEADER_BYTES, 0)
    layout = decode(block, os.fstat(fd).st_size, path)
    if metadata_sha256(layout.gaps, lambda offset, size: pread_all(fd, size, offset)) != layout.metadata_sha256:
        raise CorruptStoreError(f"{path}: the HDF5 metadata is damaged. Remove the file to have it made again")
    return layout, zlib.crc32(block)


def complete(records: NDArray[Any], first_row: int) -> NDArray[np.bool_]:
    """Which of the consecutive ``records`` from ``first_row`` on say that their own row is complete.

    A record that names another row, or has flags this format does not know, says nothing.
    """
    own = np.arange(first_row + 1, first_row + 1 + len(records), dtype=np.uint32)
    return np.asarray((records["row_plus_1"] == own) & (records["flags"] == COMPLETE))


def _count(fd: int, layout: Layout) -> int:
    count = 0
    for start in range(0, layout.spec.rows, CHUNK_ROWS):
        rows = min(CHUNK_ROWS, layout.spec.rows - start)
        table = pread_all(fd, rows * RECORD_BYTES, layout.commit_offset + start * RECORD_BYTES)
        count += int(complete(np.frombuffer(table, RECORD), start).sum())
    return count
