"""A disk that loses what was not synced: the power is cut after every system call of a cache's life.

Adversarial where POSIX leaves room. What a power cut can and cannot do to a file is told in
https://www.usenix.org/system/files/conference/osdi14/osdi14-paper-pillai.pdf
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from cachefreeze.stores.hdf5 import HDF5Store
from cachefreeze.testing.faults import intercepted
from cachefreeze.testing.judge import Truth, judge_file, torture_spec

SECTOR_BYTES = 512


@dataclass
class _File:
    """A file as the platter has it, and what the cache above has not written back."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        for offset, data in self.pending:
            _put(self.durable, offset, data)
        self.pending = []

    def after_power_cut(self, rng: random.Random) -> bytes:
        """Every sector written since the last sync is as any of these writes left it, or torn between two of them."""
        versions: dict[int, list[bytes]] = {}
        now = bytearray(self.durable)
        for offset, data in self.pending:
            _put(now, offset, data)
            for sector in range(offset // SECTOR_BYTES, (offset + len(data) - 1) // SECTOR_BYTES + 1):
                span = slice(sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES)
                versions.setdefault(sector, [bytes(self.durable[span])]).append(bytes(now[span]))
        result = bytearray(self.durable.ljust(len(now), b"\0"))
        for sector, found in versions.items():
            kept = rng.choice(found)
            if rng.random() < 0.1:
                cut = rng.randrange(SECTOR_BYTES)
                kept = rng.choice(found)[:cut] + kept[cut:]
            result[sector * SECTOR_BYTES : sector * SECTOR_BYTES + len(kept)] = kept
        return bytes(result)


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset + len(data):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data


@final
class Disk:
    """A hook that makes every call and keeps, beside the real folder, what a power cut would leave of it.

    Adversarial where POSIX leaves room: names are durable once their folder was synced, contents once their file was;
    before that any subset of the changes may have reached the platter, sector by sector.
    """

    def __init__(self) -> None:
        self._open: dict[int, _File | None] = {}
        self._names: dict[str, _File] = {}
        self._durable_names: dict[str, _File] = {}
        self._pending_names: list[tuple[str, _File | None]] = []

    def __call__(self, name: str, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Make the call and remember it."""
        result = call()
        if (remember := self._RULES.get(name)) is not None:
            remember(self, result, *args)
        return result

    def after_power_cut(self, name: str, rng: random.Random) -> bytes | None:
        """The content that may be found under ``name``, or None for no such file."""
        file = self._durable_names.get(name)
        for changed, becomes in self._pending_names:
            if changed == name and rng.random() < 0.5:
                file = becomes
        return None if file is None else file.after_power_cut(rng)

    def _opened(self, fd: int, path: Path, flags: int) -> None:
        if flags & os.O_DIRECTORY:
            self._open[fd] = None
            return
        if path.name not in self._names:
            self._rename(path.name, _File())
        self._open[fd] = self._names[path.name]

    def _rename(self, name: str, file: _File | None) -> None:
        self._pending_names.append((name, file))
        if file is None:
            self._names.pop(name, None)
        else:
            self._names[name] = file

    def _pwrite(self, written: int, fd: int, data: memoryview, offset: int) -> None:
        file = self._open[fd]
        assert file is not None
        file.pending.append((offset, bytes(data[:written])))

    def _fallocate(self, _: None, fd: int, size_bytes: int) -> None:
        file = self._open[fd]
        assert file is not None
        file.pending.append((size_bytes - 1, b"\0"))

    def _fsync(self, _: None, fd: int) -> None:
        file = self._open[fd]
        if file is not None:
            file.sync()
            return
        self._durable_names = dict(self._names)
        self._pending_names = []

    def _link(self, _: None, source: Path, target: Path) -> None:
        self._rename(target.name, self._names[source.name])

    def _unlink(self, _: None, path: Path) -> None:
        self._rename(path.name, None)

    _RULES: ClassVar[dict[str, Callable[..., None]]] = {
        "open": _opened,
        "pwrite": _pwrite,
        "fallocate": _fallocate,
        "fsync": _fsync,
        "fdatasync": _fsync,
        "link": _link,
        "unlink": _unlink,
    }


def power_cuts(folder: Path, states: int, rng: random.Random) -> Counter[str]:
    """Cut the power after every system call of a cache's life, and open what each cut may leave.

    Args:
        folder: For the real files; on a memory file system this is about twice as fast.
        states: How many folders to open.
        rng: Draws what reached the platter.

    Raises:
        AssertionError: A file is not whole, a row wrong, or one lost that a commit had acknowledged.
    """
    truth = Truth(torture_spec(24), seeds=3, corrected=True)
    counts: Counter[str] = Counter()
    life = 0
    while counts["states"] < states:
        place, after = folder / f"life-{life}", folder / f"after-{life}.h5"
        place.mkdir()
        _PowerCutLife(truth, place / "rows.h5", after, states - counts["states"], rng, counts).run()
        shutil.rmtree(place)
        life += 1
    return counts


class _PowerCutLife:
    """Create, fill and rewrite a cache, with power cuts after every call."""

    def __init__(
        self, truth: Truth, path: Path, after: Path, states: int, rng: random.Random, counts: Counter[str]
    ) -> None:
        self._truth, self._path, self._after, self._rng, self._counts = truth, path, after, rng, counts
        self._left = states
        self._disk = Disk()
        self._allowed: list[set[int | None]] = [{None} for _ in range(truth.spec.rows)]
        self._created = False
        self._looking = False  # at what a cut left, which is no part of the cache's life

    def run(self) -> None:
        with intercepted(self._hook):
            store = HDF5Store.create(self._path, self._truth.spec, fingerprint={"weights": "abc"})
            self._created = True
            try:
                self._fill(store)
            finally:
                store.close()

    def _fill(self, store: HDF5Store) -> None:
        latest: list[int | None] = [None] * self._truth.spec.rows
        for _ in range(12):
            rows = self._rng.sample(range(self._truth.spec.rows), self._rng.randint(1, 9))
            if self._rng.random() < 0.5:  # a run, which is written in one call
                rows = list(range(rows[0], min(rows[0] + len(rows), self._truth.spec.rows)))
            seed = self._rng.randrange(3)
            for row in rows:
                self._allowed[row] |= {seed, None}
                latest[row] = seed
            index = torch.tensor(rows)
            store.write(index, self._truth.batch(index, seed))
            if self._rng.random() < 0.3:
                self._correct(store, rows, latest)
            if self._rng.random() < 0.4:
                store.commit()
                self._allowed = [{seed} for seed in latest]

    def _correct(self, store: HDF5Store, rows: list[int], latest: list[int | None]) -> None:
        """Rewrite one field of rows that have just been written, which are all of one seed."""
        seed = (latest[rows[0]] or 0) + 3
        for row in rows:
            self._allowed[row] |= {seed, None}
            latest[row] = seed
        index = torch.tensor(rows)
        label = self._truth.spec.fields[-1].name
        store.replace(index, {label: self._truth.batch(index, seed)[label]})
        self._counts["corrected rows"] += len(rows)

    def _hook(self, name: str, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if self._looking:
            return call()
        result = self._disk(name, call, args)
        if name not in ("lock", "unlock"):
            self._looking = True
            self._cut()
            self._looking = False
        return result

    def _cut(self) -> None:
        for _ in range(min(4, self._left)):
            self._left -= 1
            self._counts["states"] += 1
            left = self._disk.after_power_cut(self._path.name, self._rng)
            if left is None:
                assert not self._created, "the file is gone, although create() had returned"
                self._counts["no file yet"] += 1
                continue
            self._after.write_bytes(left)
            self._counts += judge_file(self._after, self._truth, self._allowed)
            self._after.unlink()
