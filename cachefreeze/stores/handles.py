"""What an open cache file holds of the operating system: a descriptor, a lock, a map."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import final

from cachefreeze.errors import StoreError
from cachefreeze.stores.creation import lock_path
from cachefreeze.stores.locks import FileLock, still_names
from cachefreeze.stores.source import Source
from cachefreeze.stores.system import store_error, system

# How long to wait for somebody who has a file alone. To change a row in place takes some 0.1 ms.
_OTHERS_SECONDS = 10.0
_LOOK_SECONDS = 0.01


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


def take(path: Path, fd: int, *, alone: bool = False) -> FileLock | None:
    """The fillers' lock of an open cache file.

    Somebody who has the file alone, to change rows in place, is waited for.

    Args:
        path: Of the file.
        fd: Its descriptor.
        alone: Keep other fillers out.

    Returns:
        None where the folder cannot be written, where others stand against it, and where one does for too long.

    Raises:
        StoreError: It cannot be locked, or the file has just been removed.
    """
    deadline = time.monotonic() + _OTHERS_SECONDS
    while True:
        try:
            lock = FileLock.take(lock_path(path), os.O_CREAT, shared=not alone)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise store_error(error, "lock", path) from error
            return None  # reading needs no write permission, neither to the file nor to its folder
        if lock is not None:
            break
        if alone or not system.shares_locks or time.monotonic() > deadline:
            return None  # where locks are not shared, a filler holds this one for as long as it has the file open
        time.sleep(_LOOK_SECONDS)
    if not still_names(path, fd):
        lock.release(unlink=not path.exists())
        raise StoreError(f"{path} was removed while it was being opened: open or create it again")
    return lock
