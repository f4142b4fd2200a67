"""Every system call by which a cache file changes, behind one object that tests can make fail.

Nothing else in the package writes to a cache file, its lock or its folder.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

from cachefreeze.errors import StoreError, StoreSpaceError

try:
    import fcntl
except ImportError:  # Windows; files are refused there before a lock is asked for
    fcntl = None  # type: ignore[assignment]

_HELD_ELSEWHERE = frozenset({errno.EAGAIN, errno.EACCES})
_SPACE_ERRORS = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_FALLOCATE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})
_ZEROS = bytes(1 << 20)


@final
class System:
    """The calls themselves. They raise OSError; the callers say what was being done."""

    def open(self, path: Path, flags: int) -> int:
        """Open without following a link at the end of ``path``; new files are 0600: activations reveal inputs."""
        # O_NONBLOCK: a FIFO of that name must not make us wait; it changes nothing for a regular file
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """Write some of ``data``; return how many bytes."""
        return os.pwrite(fd, data, offset)

    def fallocate(self, fd: int, size_bytes: int) -> None:
        """Reserve the blocks of the whole file and set its size."""
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(fd, 0, size_bytes)
            except OSError as error:
                if error.errno not in _NO_FALLOCATE:
                    raise
            else:
                return
        for start in range(0, size_bytes, len(_ZEROS)):  # the portable way to reserve blocks: write them
            pwrite_all(fd, _ZEROS[: size_bytes - start], start)

    def fsync(self, fd: int) -> None:
        """Make data and metadata durable."""
        os.fsync(fd)

    def fdatasync(self, fd: int) -> None:
        """Make data durable; the size never changes after creation, so that is all there is to lose."""
        getattr(os, "fdatasync", os.fsync)(fd)

    def link(self, source: Path, target: Path) -> None:
        """Give ``source`` a second name; fails when ``target`` exists."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        path.unlink()

    def lock(self, fd: int, start: int, length: int, *, shared: bool = False) -> bool:
        """Lock bytes of an open file without waiting; False when another open file's lock stands against it."""
        kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
        try:
            if self.shares_locks:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(kind, start, length))
            else:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD_ELSEWHERE:
                return False
            raise
        return True

    @property
    def shares_locks(self) -> bool:
        """Whether a lock can be had together with others; ``flock`` is taken alone here, by every filler."""
        return hasattr(fcntl, "F_OFD_SETLK")

    def unlock(self, fd: int, start: int = 0, length: int = 0) -> None:
        """Unlock bytes of an open file; by default all of them, where ``flock`` knows no other way."""
        if self.shares_locks:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, start, length))
        elif not length:
            fcntl.flock(fd, fcntl.LOCK_UN)


system = System()


def _flock(kind: int, start: int, length: int) -> bytes:
    # struct flock {short type, whence; off_t start, len; pid_t pid}; "0q" pads its end as C does
    return struct.pack("@hhqqi0q", kind, os.SEEK_SET, start, length, 0)


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``, however often the kernel takes only a part of it."""
    while True:
        try:
            written = system.pwrite(fd, data, offset)
        except InterruptedError:  # Python retries by itself unless a signal handler raised; an injected fault does not
            continue
        if written == len(data):
            return
        if written <= 0:
            raise OSError(errno.EIO, "the file system took no bytes")
        data = memoryview(data)[written:]
        offset += written


def pread_all(fd: int, size_bytes: int, offset: int) -> bytes:
    """Read ``size_bytes`` at ``offset``; fewer only where the file ends."""
    parts = []
    while size_bytes > 0 and (part := os.pread(fd, size_bytes, offset)):
        parts.append(part)
        size_bytes -= len(part)
        offset += len(part)
    return b"".join(parts)


def pread_into(fd: int, place: memoryview, offset: int) -> int:
    """Read as many bytes as ``place`` has at ``offset``; return how many, fewer only where the file ends."""
    done = 0
    while done < len(place) and (got := os.preadv(fd, [place[done:] if done else place], offset + done)):
        done += got
    return done


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write to the file system of ``folder``."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def space_error(path: Path, needed_bytes: int) -> StoreSpaceError:
    """What to raise when ``path`` does not fit."""
    try:
        free = free_bytes(path.parent)
    except OSError:
        free = 0
    if free < needed_bytes:
        why = f"{free:,} are free: free some space"
    else:
        why = f"{free:,} are free, but a quota or a limit on file sizes forbids it: raise that"
    return StoreSpaceError(
        f"{path} needs {needed_bytes:,} bytes, {why}, or use another folder, a smaller dtype or a later boundary"
    )


@contextmanager
def failing_as(doing: str, path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """What fails in here raises the package's own error; see :func:`store_error`."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise store_error(error, doing, path, needed_bytes) from error


def store_error(error: OSError, doing: str, path: Path, needed_bytes: int = 0) -> StoreError:
    """The package's own error for a failed system call.

    Args:
        error: What the call raised.
        doing: Completes "cannot …".
        path: The cache file.
        needed_bytes: What it needs, for the message when there is no space.
    """
    if error.errno in _SPACE_ERRORS:
        return space_error(path, needed_bytes)
    fix = "; use a folder and a file that you may write to" if error.errno in _DENIED else ""
    other = f" ({error.filename})" if error.filename and Path(error.filename) != path else ""  # its lock, its folder
    return StoreError(f"cannot {doing} {path}: {error.strerror or error}{fix}{other}")
