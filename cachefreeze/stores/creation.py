"""How a cache file comes into being: whole at its final name, or not at all.

A temporary name -> blocks of the whole file reserved -> contents -> fsync -> ``link()`` to the final name, which fails
when that exists -> the temporary name removed -> fsync of the folder. A kill at any instant leaves either nothing or a
temporary whose lock is free; the next creation in that folder sweeps it.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cachefreeze.errors import StoreError
from cachefreeze.stores.locks import FileLock
from cachefreeze.stores.system import failing_as, free_bytes, pwrite_all, space_error, system

# What link() says where there are none: https://man7.org/linux/man-pages/man2/link.2.html
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
_TEMPORARY = re.compile(r"\.cachefreeze-[0-9a-f]{16}\.tmp")


def lock_path(path: Path) -> Path:
    """The file that ``path`` is locked by."""
    return path.with_name(path.name + ".lock")


def check_target(path: Path, least_bytes: int) -> None:
    """Refuse at once, and without a trace, a path where no new file of that size can come to lie.

    Raises:
        StoreSpaceError: The file system has fewer than ``least_bytes`` free.
        StoreError: Its folder is missing, or something has that name already.
    """
    with failing_as("create", path):
        _check_target(path, least_bytes)


def _check_target(path: Path, least_bytes: int) -> None:
    if path.is_dir():
        raise StoreError(f"{path} is a folder: give the name of a file in it, such as {path / 'rows.h5'}")
    if os.path.lexists(path):
        raise StoreError(f"{path} exists: open it with HDF5Store.open, remove it, or choose another name")
    if not path.parent.is_dir():
        raise StoreError(f"the folder of {path} does not exist: create it first")
    if least_bytes > free_bytes(path.parent):
        raise space_error(path, least_bytes)


def create_file(path: Path, size_bytes: int, contents: Iterable[tuple[int, bytes]]) -> FileLock:
    """Create ``path`` and become one of its fillers.

    Args:
        path: Must not exist; its folder must.
        size_bytes: Of the whole file.
        contents: (offset, bytes) to write; the rest reads as zeros.

    Returns:
        The fillers' lock.

    Raises:
        StoreSpaceError: There is no room for ``size_bytes``.
        StoreError: Anything else went wrong. No file is left behind in either case.
    """
    with failing_as("create", path):
        sweep(path.parent)
        lock = FileLock.take(lock_path(path), os.O_CREAT)
    if lock is None:
        raise StoreError(f"another process is creating or removing {path}: wait for it, or choose another name")
    try:
        with failing_as("create", path, size_bytes):
            _create_locked(path, lock, size_bytes, contents)
    except BaseException:
        # Safe although others may be waiting for it: whoever gets the lock checks that the file still has its name.
        lock.release(unlink=True)
        raise
    return lock


def sweep(folder: Path) -> None:
    """Remove the temporaries of creators that are gone; a living creator holds a lock on its own."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            # Gone meanwhile, or another user's: then it is not ours to remove, and no obstacle either.
            with suppress(OSError):
                if (lock := FileLock.take(path, 0)) is not None:
                    lock.release(unlink=True)


def _create_locked(path: Path, lock: FileLock, size_bytes: int, contents: Iterable[tuple[int, bytes]]) -> None:
    temporary = _temporary(path.parent)
    linked = False
    try:
        assert temporary.fd is not None
        system.fallocate(temporary.fd, size_bytes)
        for offset, data in contents:
            pwrite_all(temporary.fd, data, offset)
        system.fsync(temporary.fd)
        lock.share()  # before anybody can open it: whoever does is to become a filler
        try:
            system.link(temporary.path, path)
        except FileExistsError as error:
            raise StoreError(f"{path} exists: another process has just created it; open it instead") from error
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise StoreError(
                f"cannot create {path}: its file system has no hard links (FAT and exFAT have none), by which a file "
                "gets its name once it is whole; use a folder on another one"
            ) from error
        linked = True
        temporary.release(unlink=True)
        _sync_folder(path.parent)
    except BaseException:
        if linked:
            system.unlink(path)
        raise
    finally:
        temporary.release(unlink=True)


def _temporary(folder: Path) -> FileLock:
    while True:
        path = folder / f".cachefreeze-{secrets.token_hex(8)}.tmp"
        # None: a sweeper found the file between its creation and its lock, and took it for a dead one's.
        if (lock := FileLock.take(path, os.O_CREAT | os.O_EXCL)) is not None:
            return lock


def _sync_folder(folder: Path) -> None:
    fd = system.open(folder.resolve(), os.O_RDONLY | os.O_DIRECTORY)  # the folder itself may be a link
    try:
        system.fsync(fd)
    finally:
        os.close(fd)
