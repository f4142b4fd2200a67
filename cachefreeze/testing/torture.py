"""Processes that are killed while they create, fill and read one cache file, alone and together.

Children are forked from a parent that has imported everything, so a kill costs milliseconds and not an interpreter.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cachefreeze.errors import CorruptRowError, StoreError
from cachefreeze.stores.hdf5 import HDF5Store
from cachefreeze.stores.removal import remove_cache
from cachefreeze.testing.judge import Truth, judge, torture_spec

_ROW = struct.Struct("<i")
_PATIENCE_SECONDS = 60.0


def forked(work: Callable[[], None]) -> int:
    """Run ``work`` in a child; returns its process id. Exit status 0 when it returned, 1 when it raised."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the parent's thread pool does not exist here, and waiting for it would hang
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> int:
    """Wait for a child; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(pid: int) -> None:
    """Kill -9 a child that is at work, and wait for it."""
    os.kill(pid, signal.SIGKILL)
    status = ended(pid)
    assert status == -signal.SIGKILL, f"the child had ended by itself, with status {status}"


def kill_fills(folder: Path, kills: int, rng: random.Random) -> Counter[str]:
    """Kill -9 a filler at a random instant, again and again; rows that it reported are there, no row is wrong.

    Raises:
        AssertionError: A file did not open, a reported row was lost, a row was wrong.
    """
    truth = Truth(torture_spec(400), seeds=2)
    path = folder / "killed.h5"
    counts: Counter[str] = Counter()
    window_seconds = 0.02  # follows the machine: kills are to fall within the fill, however long that takes
    allowed: list[set[int | None]] = []
    for turn in range(kills):
        if turn % 5 == 0:  # begin again: a file that is full has no instants left that differ
            with suppress(StoreError):
                remove_cache(path)
            HDF5Store.create(path, truth.spec, fingerprint={}).close()
            allowed = [{None} for _ in range(400)]
        seed = rng.randrange(2)
        runs = torch.arange(400).view(50, 8)[rng.sample(range(50), 50)]
        batches = runs if turn % 2 else torch.tensor(rng.sample(range(400), 400)).view(50, 8)
        reported = _killed_filler(path, truth, batches, seed, rng.uniform(0, window_seconds))
        window_seconds *= 0.7 if len(reported) == 400 else 1.2
        for row in range(400):
            allowed[row] = {seed} if row in reported else allowed[row] | {seed, None}
        store = HDF5Store.open(path)
        assert store.writable
        found = judge(store, truth, allowed)
        store.close()
        counts += found
        counts["kills"] += 1
        counts["reported rows"] += len(reported)
        counts["kills within a fill"] += 0 < len(reported) < 400
    return counts


def _killed_filler(
    path: Path, truth: Truth, batches: Tensor, seed: int, seconds: float, *, in_place: bool = False
) -> set[int]:
    label = truth.spec.fields[-1].name
    receiver, sender = os.pipe()

    def work() -> None:
        store = HDF5Store.open(path, alone=in_place)
        os.write(sender, _ROW.pack(-1))
        for rows in batches:
            whole = truth.batch(rows, seed)
            if in_place:
                store.replace(rows, {label: whole[label]})
            else:
                store.write(rows, whole)
            os.write(sender, b"".join(_ROW.pack(row) for row in rows.tolist()))
        signal.pause()

    pid = forked(work)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        assert pipe.read(4) == _ROW.pack(-1), "the filler did not start"
        time.sleep(seconds)
        killed(pid)
        return {row for (row,) in _ROW.iter_unpack(pipe.read())}


def kill_corrections(folder: Path, kills: int, rng: random.Random) -> Counter[str]:
    """Kill -9 a process that rewrites one field of rows in place, while another one reads all of them.

    Raises:
        AssertionError: A row mixed two states, for the reader or afterwards, or a corrected one that was reported was
            lost.
    """
    truth = Truth(torture_spec(400), corrected=True)
    path, stop = folder / "corrected.h5", folder / "stop"
    counts: Counter[str] = Counter()
    HDF5Store.create(path, truth.spec, fingerprint={}).close()
    reader = forked(partial(_read_changing, path, truth, stop))
    everything = torch.arange(400)
    state: list[set[int | None]] = [{None} for _ in range(400)]
    window_seconds = 0.02
    try:
        for _ in range(kills):
            store = HDF5Store.open(path, alone=True)
            judge(store, truth, state)
            absent = everything[~store.present(everything)]
            store.write(absent, truth.batch(absent))
            store.close()
            wanted = rng.randrange(2)
            batches = torch.tensor(rng.sample(range(400), 400)).view(50, 8)
            reported = _killed_filler(path, truth, batches, wanted, rng.uniform(0, window_seconds), in_place=True)
            window_seconds *= 0.7 if len(reported) == 400 else 1.2
            state = [{wanted} if row in reported else {0, 1, None} for row in range(400)]
            counts["kills"] += 1
            counts["corrected rows"] += len(reported)
        stop.touch()
        status = ended(reader)
        reader = 0
        assert status == 0, "a reader saw a row that mixes two states"
    finally:
        if reader:
            os.kill(reader, signal.SIGKILL)
            ended(reader)
    remove_cache(path)
    stop.unlink()
    return counts


def _read_changing(path: Path, truth: Truth, stop: Path) -> None:
    """Read what is there; a row that changes under the read is told by its checksum."""
    everything = torch.arange(truth.spec.rows)
    while not stop.exists():
        store = HDF5Store.open(path, writable=False, verify="always")
        with suppress(CorruptRowError):
            rows = everything[store.present(everything)]
            assert all(truth.seeds_of(rows, store.read(rows))), "a mixed row"
        store.close()


def kill_creations(folder: Path, kills: int, rng: random.Random) -> Counter[str]:
    """Kill -9 a creator at a random instant: at the final name there is a whole file or none.

    Raises:
        AssertionError: A partial file had the final name, or something was left after the next creation.
    """
    truth = Truth(torture_spec(50))
    path = folder / "created.h5"
    counts: Counter[str] = Counter()
    HDF5Store.create(path, truth.spec, fingerprint={}).close()  # what is imported on first use, before the forks
    remove_cache(path)
    window_seconds = 0.02
    for _ in range(kills):
        receiver, sender = os.pipe()

        def work(sender: int = sender) -> None:
            os.write(sender, b".")
            HDF5Store.create(path, truth.spec, fingerprint={})
            os.write(sender, b".")
            signal.pause()

        pid = forked(work)
        os.close(sender)
        with os.fdopen(receiver, "rb") as pipe:
            pipe.read(1)
            time.sleep(rng.uniform(0, window_seconds))
            killed(pid)
            returned = bool(pipe.read(1))
        window_seconds *= 0.9 if returned else 1.1
        there = path.exists()
        assert there or not returned, "create() had returned, and the file is gone"
        counts["kills"] += 1
        counts["whole files"] += there
        counts["temporaries swept"] += any(found.suffix == ".tmp" for found in folder.iterdir())
        store = HDF5Store.open(path) if there else HDF5Store.create(path, truth.spec, fingerprint={})
        judge(store, truth, [{None}] * 50)
        store.close()
        remove_cache(path)
        left = [found.name for found in folder.iterdir()]
        assert not left, f"left behind: {left}"
    return counts


def fillers_and_readers(
    folder: Path, seconds: float, rng: random.Random, *, fillers: int = 4, readers: int = 16, rows: int = 2000
) -> Counter[str]:
    """Several processes fill and read one file while fillers are killed and replaced; when it is full, another one.

    Raises:
        AssertionError: A row was wrong, was written twice, or never; or nothing moved for a minute.
    """
    truth = Truth(torture_spec(rows))
    counts: Counter[str] = Counter()
    started = time.monotonic()
    # on a machine that fills a file before the first kill, another file says more
    while not counts["fillers killed"] or time.monotonic() - started < seconds:
        _one_file(folder, truth, rng, fillers, readers, counts)
        counts["files"] += 1
    return counts


def _one_file(folder: Path, truth: Truth, rng: random.Random, fillers: int, readers: int, counts: Counter[str]) -> None:
    rows = truth.spec.rows
    path, log, stop = folder / "shared.h5", folder / "written.log", folder / "stop"
    HDF5Store.create(path, truth.spec, fingerprint={}).close()
    log.touch()
    reading = [forked(partial(_read_until, path, truth, stop, at)) for at in range(readers)]
    filling = [forked(partial(_fill, path, truth, log, at)) for at in range(fillers)]
    try:
        _kill_until_full(filling, partial(_fill, path, truth, log), log, rng, counts)
        stop.touch()
        while reading:
            assert ended(reading.pop()) == 0, "a reader saw a wrong row, or could not read"
    finally:
        for pid in (*reading, *filling):
            os.kill(pid, signal.SIGKILL)
            ended(pid)
    written = Counter(row for (row,) in _ROW.iter_unpack(log.read_bytes()))
    assert max(written.values()) == 1, f"row {written.most_common(1)[0][0]} was written twice"
    store = HDF5Store.open(path)
    judge(store, truth, [{0}] * rows)
    store.close()
    counts["rows written"] += rows
    remove_cache(path)
    log.unlink()
    stop.unlink()


def _kill_until_full(
    filling: list[int], fill: Callable[[float], None], log: Path, rng: random.Random, counts: Counter[str]
) -> None:
    """Kill one filler after another, and start new ones, until some have ended by themselves: the file is full."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    kill_at_bytes = 0  # of the log: however slow the machine, some rows are written between two kills
    while filling:
        time.sleep(0.005)
        assert time.monotonic() < deadline, "the fillers wait for each other, or for the dead"
        pid = filling.pop(rng.randrange(len(filling)))
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            assert os.waitstatus_to_exitcode(status) == 0, "a filler failed"
        elif log.stat().st_size > kill_at_bytes:
            os.kill(pid, signal.SIGKILL)
            counts["fillers killed"] += ended(pid) == -signal.SIGKILL
            filling.append(forked(partial(fill, rng.random())))
            kill_at_bytes = log.stat().st_size + _ROW.size * rng.randrange(200)
        else:
            filling.append(pid)


def _fill(path: Path, truth: Truth, log: Path, seed: float) -> None:
    """Claim and write until the file is full; what was written is logged, one atomic append a batch."""
    rng = random.Random(seed)
    store = HDF5Store.open(path)
    everything = torch.arange(truth.spec.rows)
    with log.open("ab", buffering=0) as written:
        while len(absent := everything[~store.present(everything)]):
            start = rng.randrange(len(absent))
            batch = absent[start : start + 8] if rng.random() < 0.5 else absent[torch.randperm(len(absent))[:8]]
            mine = batch[store.claim(batch)]
            if len(mine):
                store.write(mine, truth.batch(mine))
                written.write(b"".join(_ROW.pack(row) for row in mine.tolist()))
            else:
                time.sleep(0.001)


def _read_until(path: Path, truth: Truth, stop: Path, seed: int) -> None:
    """Read what is there, in one of the two ways, until told to stop."""
    rng = random.Random(seed)
    store = HDF5Store.open(path, writable=False, verify="always", io="mmap" if seed % 2 else "pread")
    while not stop.exists():
        rows = torch.tensor(rng.sample(range(truth.spec.rows), 64))
        rows = rows[store.present(rows)]
        assert all(truth.seeds_of(rows, store.read(rows))), "a wrong row"
        time.sleep(0.05)  # there are more of us than processors
