"""What an open cache file holds of the operating system: a descriptor, a lock, a map."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import final

from cachefreeze.errors import StoreError
from cachefreeze.stores.creation import lock_path
from cachefreeze.stores.locks import FileLock, still_names
from cachefreeze.stores.source import Source
from cachefreeze.stores.system import store_error


@final
class Handles:
    """What a store holds; outlives it only until its finalizer ran.

    Attributes:
        fd: The file, open for writing; None once closed, and where it is only read.
        lock: The fillers' lock, or None.
        source: Where its bytes are read.
    """

    def __init__(self, fd: int, lock: FileLock | None, source: Source) -> None:
        self.fd: int | None = fd
        self.lock = lock
        self.source = source

    def drop_writer(self) -> None:
        """Close what only a filler needs."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Let go of everything; closing twice is harmless."""
        self.drop_writer()
        if self.lock is not None:
            self.lock.release()
        self.source.close()


def share(path: Path, fd: int) -> FileLock | None:
    """The fillers' lock of an open cache file; None where the folder cannot be written, or the file is being removed.

    Raises:
        StoreError: It cannot be locked, or the file has just been removed.
    """
    try:
        lock = FileLock.take(lock_path(path), os.O_CREAT, shared=True)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise store_error(error, "lock", path) from error
        return None  # reading needs no write permission, neither to the file nor to its folder
    if lock is not None and not still_names(path, fd):
        lock.release(unlink=not path.exists())
        raise StoreError(f"{path} was removed while it was being opened: open or create it again")
    return lock
