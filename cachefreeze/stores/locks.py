"""Who may do what to a cache file on one host, by locks that no kill can leave behind.

Byte 0 of the lock file stands for the file's existence: whoever creates or removes the cache holds it alone, fillers
share it. Byte 1 + i stands for row i: the one filler that is computing it holds it. Readers hold nothing.

Open-file-description locks belong to an open file, not to a process: closing another descriptor of the same file does
not drop them (as POSIX locks would be), and they vanish with the last descriptor. Where they do not exist ``flock``
locks the whole file on a local file system: then one filler at a time, for all rows.

Source: https://www.gnu.org/software/libc/manual/html_node/Open-File-Description-Locks.html
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Protocol, final

from cachefreeze.stores.system import system

_EXISTENCE = 0
_FIRST_ROW = 1


class ForkAware(Protocol):
    """Something that a forked child must not share with its parent."""

    def after_fork_in_child(self) -> None:
        """Drop it; runs in the child, before anything else."""


_aware: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def drop_in_children(thing: ForkAware) -> None:
    """Call ``thing.after_fork_in_child()`` in every child forked while ``thing`` lives."""
    _aware.add(thing)


def _after_fork() -> None:
    for thing in list(_aware):
        thing.after_fork_in_child()


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)


@final
class FileLock:
    """An open file whose existence this process has locked, alone or with others.

    Attributes:
        path: The file.
        fd: Its descriptor, or None once released and in forked children.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd: int | None = fd
        drop_in_children(self)

    @classmethod
    def take(cls, path: Path, flags: int, *, shared: bool = False) -> FileLock | None:
        """Open ``path`` with ``flags`` and lock it, alone or ``shared`` with others who do the same.

        Returns:
            The lock, or None when another's stands against it (with O_EXCL also: when another removed the file
            meanwhile).

        Raises:
            OSError: It cannot be opened, or the file system has no locks.
        """
        while True:
            lock = cls(path, fd := system.open(path, flags | os.O_RDWR))
            try:
                taken = system.lock(fd, _EXISTENCE, 1, shared=shared)
            except OSError:
                lock.release()
                raise
            if not taken:
                lock.release()
                return None
            # A holder may unlink the file before it lets go. Then this locks a file that nobody else can find.
            if still_names(path, fd):
                return lock
            lock.release()
            if flags & os.O_EXCL:
                return None

    def share(self) -> None:
        """Let others take the lock ``shared`` too."""
        assert self.fd is not None
        system.lock(self.fd, _EXISTENCE, 1, shared=True)

    def claim(self, row: int, count: int) -> bool:
        """Lock ``count`` rows from ``row`` on for this process; False when another has any of them."""
        assert self.fd is not None
        return system.lock(self.fd, _FIRST_ROW + row, count)

    def unclaim(self, row: int, count: int) -> None:
        """Unlock rows; harmless for rows that are not locked."""
        assert self.fd is not None
        system.unlock(self.fd, _FIRST_ROW + row, count)

    def release(self, *, unlink: bool = False) -> None:
        """Unlock and close; ``unlink`` removes the file first. Releasing twice is harmless."""
        fd, self.fd = self.fd, None
        if fd is None:
            return
        try:
            if unlink:
                with suppress(FileNotFoundError):
                    system.unlink(self.path)
            # Closing alone would not do: a child forked without Python's hooks shares the open file.
            with suppress(OSError):
                system.unlock(fd)
        finally:
            os.close(fd)

    def after_fork_in_child(self) -> None:
        """Close the child's descriptor. Unlocking would unlock the parent: they share one open file."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)


def still_names(path: Path, fd: int) -> bool:
    """Whether ``path`` is the file that is open as ``fd``, not removed and not replaced."""
    try:
        named = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(fd))
