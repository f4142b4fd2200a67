"""System calls that fail on purpose: each in turn, in every way.

Source: the anomaly and out-of-memory tests of SQLite, https://www.sqlite.org/testing.html#i_o_error_testing
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from cachefreeze.errors import StoreError
from cachefreeze.stores.creation import sweep
from cachefreeze.stores.hdf5 import HDF5Store
from cachefreeze.stores.removal import remove_cache
from cachefreeze.stores.system import System, system
from cachefreeze.testing.judge import Truth, judge, judge_file, torture_spec

CALLS = ("open", "pwrite", "fallocate", "fsync", "fdatasync", "link", "unlink", "lock", "unlock")
FAULTS = ("ENOSPC", "EIO", "EINTR", "short")

Hook = Callable[[str, Callable[[], Any], tuple[Any, ...]], Any]


@contextmanager
def intercepted(hook: Hook) -> Iterator[None]:
    """Have ``hook(name, call, args)`` decide what each system call of a store does; ``call()`` makes it."""

    def route(name: str, *args: Any, **options: Any) -> Any:
        return hook(name, partial(getattr(System, name), system, *args, **options), args)

    for name in CALLS:
        setattr(system, name, partial(route, name))
    try:
        yield
    finally:
        for name in CALLS:
            delattr(system, name)


@final
class FailAt:
    """A hook that fails one call.

    Attributes:
        calls: Names of the calls so far.
    """

    def __init__(self, at: int | None, fault: str = "EIO") -> None:
        self.calls: list[str] = []
        self._at = at
        self._fault = fault

    def __call__(self, name: str, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Make the call, or fail it."""
        self.calls.append(name)
        if len(self.calls) - 1 != self._at:
            return call()
        if self._fault == "short":
            fd, data, offset = args
            return os.pwrite(fd, data[: len(data) // 2 + 1], offset)
        code = getattr(errno, self._fault)
        raise OSError(code, os.strerror(code))


def failing_calls(folder: Path) -> Counter[str]:
    """Create, fill, rewrite, reopen and remove a cache while one system call fails: each in turn, in each way.

    Returns:
        How often each call was failed.

    Raises:
        AssertionError: A failure was no StoreError, left a wrong or partial file, or could not be made up for.
    """
    truth = Truth(torture_spec(6), seeds=2, corrected=True)
    trace = FailAt(None)
    with intercepted(trace):
        _life(folder / "traced", truth, [])
    counts: Counter[str] = Counter()
    for at, name in enumerate(trace.calls):
        for fault in FAULTS:
            if fault == "short" and name != "pwrite":
                continue
            place = folder / f"{at}-{fault}"
            allowed: list[set[int | None]] = [{None} for _ in range(truth.spec.rows)]
            with suppress(StoreError), intercepted(FailAt(at, fault)):
                _life(place, truth, allowed)
                assert fault in ("EINTR", "short") or name in ("unlock", "unlink"), f"{fault} of {name} went unnoticed"
            _check_aftermath(place, truth, allowed)
            shutil.rmtree(place)
            counts[name] += 1
    return counts


def _life(folder: Path, truth: Truth, allowed: list[set[int | None]]) -> None:
    """All that can happen to a cache. Before each step ``allowed`` says what may be found from then on."""
    folder.mkdir()
    path = folder / "rows.h5"
    store = HDF5Store.create(path, truth.spec, fingerprint={"weights": "abc"})
    try:
        _write(store, truth, [0, 1, 2, 5], 0, allowed)
        store.commit()
        _write(store, truth, [1, 2, 3], 1, allowed)
        store.commit()
    finally:
        store.close()
    store = HDF5Store.open(path)
    try:
        store.claim(torch.tensor([3, 4]))
        _write(store, truth, [4], 0, allowed)
        store.release(torch.tensor([0]))
        _correct(store, truth, [0, 4], allowed)
        for may in allowed[5:6]:
            may.add(None)
        store.discard(torch.tensor([5]))
        store.commit()
    finally:
        store.close()
    for may in allowed:
        may.add(None)
    remove_cache(path)


def _write(store: HDF5Store, truth: Truth, rows: list[int], seed: int, allowed: list[set[int | None]]) -> None:
    for row in rows if allowed else ():
        allowed[row] |= {seed, None}
    index = torch.tensor(rows)
    store.write(index, truth.batch(index, seed))
    for row in rows if allowed else ():
        allowed[row] -= {None, 1 - seed}
        allowed[row] |= {seed}


def _correct(store: HDF5Store, truth: Truth, rows: list[int], allowed: list[set[int | None]]) -> None:
    """Rewrite the last field of rows of seed 0."""
    seed, label = 2, truth.spec.fields[-1].name
    for row in rows if allowed else ():
        allowed[row] |= {seed, None}
    index = torch.tensor(rows)
    store.replace(index, {label: truth.batch(index, seed)[label]})
    for row in rows if allowed else ():
        allowed[row] = {seed}


def _check_aftermath(folder: Path, truth: Truth, allowed: list[set[int | None]]) -> None:
    path = folder / "rows.h5"
    sweep(folder)
    names = {found.name for found in folder.iterdir()}
    assert names <= {"rows.h5", "rows.h5.lock"}, f"left behind: {names}"
    if path.exists():
        judge_file(path, truth, allowed)
        store = HDF5Store.open(path)
        assert store.writable, "a lock was left behind"
    else:
        store = HDF5Store.create(path, truth.spec, fingerprint={"weights": "abc"})
    everything = torch.arange(truth.spec.rows)
    assert bool((store.claim(everything) | store.present(everything)).all()), "a row's lock was left behind"
    store.write(everything, truth.batch(everything))
    judge(store, truth, [{0}] * truth.spec.rows)
    store.close()
