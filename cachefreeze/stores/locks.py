"""One writer per cache file, by a lock that no kill can leave behind.

Open-file-description locks belong to an open file, not to a process: closing another descriptor of the same file does
not drop them (as POSIX locks would be), and they vanish with the last descriptor. Where they do not exist ``flock``
does the same on a local file system.

Source: https://www.gnu.org/software/libc/manual/html_node/Open-File-Description-Locks.html
"""

from __future__ import annotations

import errno
import os
import struct
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Protocol, final

from cachefreeze.stores.system import system

try:
    import fcntl
except ImportError:  # Windows; files are refused there before a lock is asked for
    fcntl = None  # type: ignore[assignment]

_HELD_ELSEWHERE = frozenset({errno.EAGAIN, errno.EACCES})


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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _set_lock(fd: int, kind: int) -> None:
    """Lock (F_WRLCK) or unlock (F_UNLCK) the whole file, without waiting."""
    if hasattr(fcntl, "F_OFD_SETLK"):
        # struct flock {short type, whence; off_t start, len; pid_t pid}; "0q" pads its end as C does
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("@hhqqi0q", kind, os.SEEK_SET, 0, 0, 0))
    else:
        fcntl.flock(fd, fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB)


@final
class FileLock:
    """An open file that this process, and nobody else, has locked.

    Attributes:
        path: The file.
        fd: Its descriptor, or None once released and in forked children.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd: int | None = fd
        drop_in_children(self)

    @classmethod
    def take(cls, path: Path, flags: int) -> FileLock | None:
        """Open ``path`` with ``flags`` and lock it.

        Returns:
            The lock, or None when another holds it (with O_EXCL also: when another removed the file meanwhile).

        Raises:
            OSError: It cannot be opened, or the file system has no locks.
        """
        while True:
            lock = cls(path, fd := system.open(path, flags | os.O_RDWR))
            try:
                _set_lock(fd, fcntl.F_WRLCK)
            except OSError as error:
                lock.release()
                if error.errno in _HELD_ELSEWHERE:
                    return None
                raise
            # A holder may unlink the file before it lets go. Then this locks a file that nobody else can find.
            if lock._still_named():
                return lock
            lock.release()
            if flags & os.O_EXCL:
                return None

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
                _set_lock(fd, fcntl.F_UNLCK)
        finally:
            os.close(fd)

    def after_fork_in_child(self) -> None:
        """Close the child's descriptor. Unlocking would unlock the parent: they share one open file."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def _still_named(self) -> bool:
        assert self.fd is not None
        try:
            named = self.path.lstat()
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self.fd))
