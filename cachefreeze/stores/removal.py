"""Remove a cache file: one of ours, and one that nobody fills."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from cachefreeze.errors import CorruptStoreError, StoreError
from cachefreeze.stores.creation import lock_path, sweep
from cachefreeze.stores.file import open_regular
from cachefreeze.stores.header import MAGIC
from cachefreeze.stores.locks import FileLock
from cachefreeze.stores.system import failing_as, pread_all, system


def remove_cache(path: str | Path) -> int:
    """Unlink a cache file and its lock; damaged ones too, as long as they begin like one.

    Readers that have it open keep what they have.

    Returns:
        Its size in bytes.

    Raises:
        CorruptStoreError: It does not begin like a cache file, so it is not ours to remove.
        StoreError: Another process has it open to fill it, or it cannot be removed.
    """
    path = Path(path).absolute()
    with failing_as("remove", path):
        nbytes = cache_bytes(path)
        lock = FileLock.take(lock_path(path), os.O_CREAT)
        if lock is None:
            raise StoreError(f"{path} is in use by another process; stop that one first")
        try:
            system.unlink(path)
        finally:
            lock.release(unlink=True)
        sweep(path.parent)
    return nbytes


def in_use(path: str | Path) -> bool:
    """Whether a process has the cache open to fill it; those that only read it leave no trace.

    Raises:
        StoreError: Its lock cannot be looked at.
    """
    path = Path(path).absolute()
    with failing_as("look at the lock of", path), suppress(FileNotFoundError):
        lock = FileLock.take(lock_path(path), 0)
        if lock is None:
            return True
        lock.release()
    return False


def cache_bytes(path: str | Path) -> int:
    """Size of a file that begins like a cache file, damaged or not.

    Raises:
        CorruptStoreError: It does not begin like one.
        StoreError: It cannot be opened.
    """
    path = Path(path).absolute()
    fd, _ = open_regular(path, os.O_RDONLY)
    try:
        nbytes = os.fstat(fd).st_size
        begins = pread_all(fd, min(len(MAGIC), nbytes), 0)
    finally:
        os.close(fd)
    if begins != MAGIC:
        raise CorruptStoreError(f"{path} is no cache file, so it is left alone")
    return nbytes
