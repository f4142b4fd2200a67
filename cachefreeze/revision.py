"""Rows of samples that changed since they were made: a stored file is brought up to date instead of filled anew.

Every row of a file says what it was made from: its sample's key, and a digest of what the model consumed. A row whose
sample's key is another is compared with its sample as it is now. Where the model would consume the same, a label was
corrected, or a file was touched: the fields beside the activations are written, and these stay. Where it would consume
what another row was made from, samples moved: that row's activations do. What is left was edited: it is absent.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from cachefreeze.errors import CorruptRowError, StoreError
from cachefreeze.fingerprint import digest, tensor_bytes
from cachefreeze.padding import input_leaves
from cachefreeze.ragged import evenly
from cachefreeze.samples import View
from cachefreeze.stores import FieldSpec, HDF5Store
from cachefreeze.tracing import Example

_LOG = logging.getLogger("cachefreeze")

# The field of a file's rows: the sample's key, and the digest of what the model consumed (0: not known).
MADE_FROM = FieldSpec(name="made_from", shape=(2,), dtype=torch.int64)
# With more new inputs than this among the rows, a file holds another dataset, such as another fold, and is left alone.
_NEW_SHARE = 1 / 20
_NEW_ROWS = 8
# Samples that did not change, of which it is seen that the model consumes what it did.
_COMPARED = 8
_BATCH_ROWS = 64
# How long to wait for others who have the file open; processes of one job come at the same moment.
_ALONE_SECONDS = 5.0
_LOOK_SECONDS = 0.02
_SHOWN = 8


def input_digests(example: Example, count: int) -> Tensor:
    """(count,) int64: a digest of what the model consumes of each sample of a batch."""
    states = [xxhash.xxh3_64() for _ in range(count)]
    for leaf in input_leaves(example):
        if isinstance(leaf, Tensor):
            rows = np.frombuffer(tensor_bytes(leaf), np.uint8).reshape(count, -1)
            head = str((tuple(leaf.shape[1:]), leaf.dtype)).encode()
            for state, row in zip(states, rows, strict=True):
                state.update(head)
                state.update(row.data)
        else:
            text = digest(leaf).encode()
            for state in states:
                state.update(text)
    return torch.from_numpy(np.array([state.intdigest() for state in states], np.uint64).view(np.int64))


@dataclass
class _Plan:
    """What is to be done.

    Attributes:
        sources: Row -> the row whose activations it takes, itself where only fields are written.
        fetched: Those of them whose fields are written as the sample has them now.
        stale: Rows that are computed again.
    """

    sources: dict[int, int] = field(default_factory=dict)
    fetched: set[int] = field(default_factory=set)
    stale: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.sources or self.stale)


@final
class Revision:
    """Brings files of a view's rows up to date.

    Args:
        view: The samples; their keys are known.
        beside: Names of the fields beside the activations, in the order in which the view's layout gives them.

    Attributes:
        keys: (samples,) int64, of the samples as they are now.
        rewritten: Rows whose fields were written, or that moved.
        stale: Rows that became absent because their sample has other inputs.
    """

    def __init__(self, view: View, beside: Sequence[str]) -> None:
        assert view.made_of is not None
        self._view = view
        self._beside = list(beside)
        self.keys = torch.from_numpy(view.made_of.keys)
        self._consumed = np.zeros(len(self.keys), np.int64)  # digests of samples as they are now; 0: not fetched yet
        self.rewritten = 0
        self.stale: frozenset[int] = frozenset()

    def mismatched(self, store: HDF5Store) -> Tensor:
        """Present rows that were made from another sample, or from what a sample was before."""
        present, made_from = _held(store)
        return torch.from_numpy(np.flatnonzero(present & (made_from[:, 0] != self.keys.numpy())))

    def serves(self, path: Path, *, same: bool) -> bool:
        """Whether a file holds these samples but for a few, and is up to date now, or needs not be.

        Args:
            path: A file whose fingerprint is right but for what single samples change.
            same: That is right as well.

        Raises:
            StoreError: It cannot be read.
        """
        deadline: float | None = None  # of waiting for others, not of comparing samples
        while True:
            with closing(HDF5Store.open(path, writable=False)) as store:
                plan = self._plan(store, compare=not same)
            if not plan:
                return plan is not None  # as it was, or as another process of the same job has just left it
            if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
                _LOG.warning("%s may not be written: %s are computed in every pass", path.name, _shown(plan))
                return True
            try:
                with closing(HDF5Store.open(path, alone=True)) as store:
                    return self._revise(store)
            except StoreError as error:
                deadline = deadline or time.monotonic() + _ALONE_SECONDS
                if time.monotonic() >= deadline:
                    _LOG.warning("%s is not brought up to date: %s", path.name, error)
                    return False
            time.sleep(_LOOK_SECONDS)

    def _revise(self, store: HDF5Store) -> bool:
        plan = self._plan(store, compare=False)  # anew: others may just have done it
        if plan:
            self._apply(store, plan)
            store.commit()
            self._tell(store.path, plan)
        return plan is not None

    def _tell(self, path: Path, plan: _Plan) -> None:
        moved = sum(row != source for row, source in plan.sources.items())
        self.rewritten, self.stale = len(plan.sources), frozenset(plan.stale)
        _LOG.warning(
            "%s is brought up to date: fields of %d rows rewritten, %d rows moved, %d to be computed again (%s)",
            path.name, self.rewritten - moved, moved, len(self.stale), _shown(plan),
        )  # fmt: skip

    def _plan(self, store: HDF5Store, *, compare: bool) -> _Plan | None:
        """None where too much differs."""
        present, made_from = _held(store)
        keys, inputs, wanted = made_from[:, 0], made_from[:, 1], self.keys.numpy()
        if compare and not self._consumes_the_same(inputs, np.flatnonzero(present & (keys == wanted))):
            return None
        plan = _Plan()
        wrong = np.flatnonzero(present & (keys != wanted))
        if not len(wrong):
            return plan
        by_key = {keys[row]: row for row in np.flatnonzero(present).tolist()}
        by_inputs = {inputs[row]: row for row in np.flatnonzero(present & (inputs != 0)).tolist()}
        plan.sources = {row: by_key[wanted[row]] for row in wrong.tolist() if wanted[row] in by_key}
        # a key does not tell what follows from the sample's place, such as an index that goes with its label
        plan.fetched.update(plan.sources)
        # what was made of the same as a sample that changed may have been made from it: a dataset's stopgap
        like = np.isin(inputs, inputs[wrong]) & (inputs != 0) & present & (keys == wanted)
        unknown = [row for row in wrong.tolist() if row not in plan.sources] + np.flatnonzero(like).tolist()
        for start in range(0, len(unknown), _BATCH_ROWS):
            some = unknown[start : start + _BATCH_ROWS]
            for row, found in zip(some, self._inputs(some).tolist(), strict=True):
                if inputs[row] == found or found in by_inputs:
                    plan.sources[row] = row if inputs[row] == found else by_inputs[found]
                    plan.fetched.add(row)
                else:
                    plan.stale.append(row)
            if len(plan.stale) > max(_NEW_ROWS, store.spec.rows * _NEW_SHARE):
                return None
        return plan

    def _consumes_the_same(self, inputs: NDArray[np.int64], unchanged: NDArray[np.int64]) -> bool:
        """Whether a few samples that did not change are still consumed as they were: no other decoder, say."""
        if not len(unchanged):
            return True
        some = unchanged[evenly(len(unchanged), _COMPARED)]
        known = some[inputs[some] != 0]
        return not len(known) or bool((inputs[known] == self._inputs(known.tolist())).all())

    def _inputs(self, rows: list[int]) -> NDArray[np.int64]:
        """Digests of what the model consumes of samples, each fetched once however often a file is looked at."""
        new = [row for row in rows if not self._consumed[row]]
        if new:
            self._consumed[new] = input_digests(self._view.layout.example(self._view.fetch(new)), len(new)).numpy()
        return self._consumed[rows]

    def _apply(self, store: HDF5Store, plan: _Plan) -> None:
        for run, ring in chains({row: source for row, source in plan.sources.items() if row != source}):
            # a ring's last row takes what its first one held
            last = self._taken(store, plan, run[-1:]) if ring else None
            for some in _batches(run[:-1] if ring else run):
                self._put(store, plan, *self._taken(store, plan, some))
            if last is not None:
                self._put(store, plan, *last)
        for some in _batches([row for row, source in plan.sources.items() if row == source]):
            self._put(store, plan, *self._taken(store, plan, some))
        store.discard(torch.tensor(plan.stale, dtype=torch.int64))  # last: what they held may have moved

    def _taken(self, store: HDF5Store, plan: _Plan, rows: list[int]) -> tuple[list[int], dict[str, Tensor]]:
        """Those of ``rows`` whose sources are sound, and what these hold; the others are stale."""
        while True:
            try:
                return rows, store.read(torch.tensor([plan.sources[row] for row in rows], dtype=torch.int64))
            except CorruptRowError as error:
                rows = self._without(plan, rows, {row for row in rows if plan.sources[row] in error.rows})

    def _put(self, store: HDF5Store, plan: _Plan, rows: list[int], values: dict[str, Tensor]) -> None:
        places = [i for i, row in enumerate(rows) if row in plan.fetched]
        if places:
            raw = self._view.fetch([rows[i] for i in places])
            found = input_digests(self._view.layout.example(raw), len(places))
            for name, tensor in zip(self._beside, self._view.layout.field_tensors(raw), strict=True):
                values[name][places] = tensor.cpu()
            same = found == values[MADE_FROM.name][places, 1]  # else it changed since it was planned
            changed = {rows[i] for i, kept in zip(places, same.tolist(), strict=True) if not kept}
            keep = torch.tensor([row not in changed for row in rows])
            values = {name: value[keep] for name, value in values.items()}
            rows = self._without(plan, rows, changed)
        index = torch.tensor(rows, dtype=torch.int64)
        values[MADE_FROM.name][:, 0] = self.keys[index]
        if all(plan.sources[row] == row for row in rows):
            store.replace(index, {name: values[name] for name in (*self._beside, MADE_FROM.name)})
        else:
            store.write(index, values)

    @staticmethod
    def _without(plan: _Plan, rows: list[int], lost: set[int]) -> list[int]:
        for row in lost:
            del plan.sources[row]
        plan.stale.extend(sorted(lost))
        return [row for row in rows if row not in lost]


def _held(store: HDF5Store) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which rows are present, and (rows, 2) of what each was made from.

    In this order: a row that another process writes between the two looks is absent here, and not one without a key.
    """
    rows = torch.arange(store.spec.rows)
    present = store.present(rows).numpy()
    return present, store.unverified(MADE_FROM.name, rows).numpy()


def chains(sources: Mapping[int, int]) -> Iterator[tuple[list[int], bool]]:
    """Rows in an order in which none is written before those that take what it held.

    Args:
        sources: Row -> the other row whose content it takes.

    Yields:
        Rows, and whether they are a ring, in which the last one takes what the first one held.
    """
    takers = Counter(source for source in sources.values() if source in sources)
    done: set[int] = set()
    ready = [row for row in sources if not takers[row]]
    run = []
    while ready:
        row = ready.pop()
        run.append(row)
        source = sources[row]
        takers[source] -= 1
        if source in sources and not takers[source]:
            ready.append(source)
    if run:
        yield run, False
    done.update(run)
    for first in sources:
        ring, row = [], first
        while row not in done:
            done.add(row)
            ring.append(row)
            row = sources[row]
        if ring:
            yield ring, True


def _batches(rows: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(rows), _BATCH_ROWS):
        yield rows[start : start + _BATCH_ROWS]


def _shown(plan: _Plan) -> str:
    rows = sorted([*plan.sources, *plan.stale])
    return "samples " + ", ".join(map(str, rows[:_SHOWN])) + (", …" if len(rows) > _SHOWN else "")
