"""Waiting for rows that other processes have claimed: as long as they write some, and not for ever."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import final

from cachefreeze.errors import StoreError
from cachefreeze.stores import HDF5Store, Store
from cachefreeze.stores.creation import lock_path

_PROCESSES = Path("/proc")
_LOOK_SECONDS = 0.05
# A claim is a batch at most. Whoever has written none for so long is stopped, hangs, or waits for somebody itself.
_PATIENCE_SECONDS = 600.0
_SHOWN = 4
_COMMAND_CHARACTERS = 80


@final
class Waiting:
    """One filler's patience with the others of its store.

    Args:
        store: Which they fill.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._missing = -1
        self._since = time.monotonic()

    def wait(self, missing: Sequence[int]) -> None:
        """Let some time pass before the next look at ``missing`` rows.

        Raises:
            StoreError: As many have been missing for minutes: who has the file open, and what to do.
        """
        if len(missing) != self._missing:
            self._missing, self._since = len(missing), time.monotonic()
        waited_seconds = time.monotonic() - self._since
        if waited_seconds >= _PATIENCE_SECONDS:
            raise StoreError(
                f"{len(missing):,} rows (first: {missing[0]}) are claimed by another process, which has written none "
                f"for {waited_seconds:.0f} s{self._others()}. Let it go on or end it, and fill again: its rows are "
                "computed by others then, and what is written stays"
            )
        time.sleep(_LOOK_SECONDS)

    def _others(self) -> str:
        if not isinstance(self._store, HDF5Store):
            return ""
        found = fillers(self._store.path)
        return f"; {self._store.path} is open in {', '.join(found[:_SHOWN])}" if found else ""


def fillers(path: Path) -> list[str]:
    """Other processes that have a cache file open to fill it: ``process 4711 (python train.py)``.

    Locks of this kind name no process, so the open files of all processes are looked through; those of other users, and
    where there is no ``/proc``, are not seen.

    Source: https://man7.org/linux/man-pages/man5/proc_pid_fd.5.html
    """
    wanted, found = str(lock_path(path)), []
    for process in sorted(_PROCESSES.glob("[0-9]*"), key=lambda one: int(one.name)):
        if int(process.name) == os.getpid():
            continue
        with suppress(OSError):  # another user's, or gone meanwhile
            if any(_leads_to(link, wanted) for link in (process / "fd").iterdir()):
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                command = "".join(c if c.isprintable() else "?" for c in " ".join(words).strip())
                found.append(f"process {process.name} ({command[:_COMMAND_CHARACTERS]})")
    return found


def _leads_to(link: Path, wanted: str) -> bool:
    with suppress(OSError):
        return str(link.readlink()) == wanted
    return False
