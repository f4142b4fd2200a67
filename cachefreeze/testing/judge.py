"""What a damaged, killed or half-written cache file may hold: right, absent and detected rows, and nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cachefreeze.errors import CorruptRowError
from cachefreeze.stores.base import FieldSpec, Store, StoreSpec
from cachefreeze.stores.hdf5 import HDF5Store
from cachefreeze.testing.specs import values


def torture_spec(rows: int) -> StoreSpec:
    """Rows that straddle sectors and pages, of three fields, one of them ragged and sometimes empty."""
    lengths = [(row * 7) % 12 for row in range(rows)]
    return StoreSpec(
        rows=rows,
        fields=(
            FieldSpec(name="activation.0", shape=(173,), dtype=torch.float32),
            FieldSpec.ragged(name="activation.1", lengths=lengths, rest=(5,), dtype=torch.bfloat16),
            FieldSpec(name="field.1", shape=(), dtype=torch.int64),
        ),
    )


class Truth:
    """The values that a test writes: one set of all rows per seed.

    Args:
        spec: Of the store.
        seeds: As many sets as seeds; a row that is rewritten changes its seed.
        corrected: For each seed *s* also a set ``seeds + s``, the same but for its last field.
    """

    def __init__(self, spec: StoreSpec, seeds: int = 1, *, corrected: bool = False) -> None:
        self.spec = spec
        everything = torch.arange(spec.rows)
        self._sets = [values(spec, everything, seed) for seed in range(seeds)]
        if corrected:
            label = spec.fields[-1].name
            self._sets += [{**whole, label: whole[label] ^ 1} for whole in self._sets]

    def batch(self, rows: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """What to write into ``rows``."""
        return {name: tensor[rows] for name, tensor in self._sets[seed].items()}

    def seeds_of(self, rows: Tensor, batch: Mapping[str, Tensor]) -> list[set[int]]:
        """For each row, the seeds whose values it carries in every field; none means that the row is wrong."""
        found: list[set[int]] = [set() for _ in range(len(rows))]
        for seed, whole in enumerate(self._sets):
            same = torch.ones(len(rows), dtype=torch.bool)
            for field in self.spec.fields:
                got, want = batch[field.name], whole[field.name][rows]
                want = want if field.lengths is None else want[:, : got.shape[1]]
                same &= (got == want).reshape(len(rows), math.prod(got.shape[1:])).all(dim=1)
            for at in torch.nonzero(same).flatten().tolist():
                found[at].add(seed)
        return found


def readable(store: Store) -> tuple[Tensor, dict[str, Tensor], set[int]]:
    """(rows that can be read, their batch, rows that were found corrupt)."""
    corrupt: set[int] = set()
    while True:
        rows = torch.nonzero(store.present(torch.arange(store.spec.rows))).flatten()
        try:
            return rows, store.read(rows), corrupt
        except CorruptRowError as error:
            corrupt |= set(error.rows)


def judge(store: Store, truth: Truth, allowed: Sequence[Collection[int | None]]) -> Counter[str]:
    """Read all that can be read, and hold it against what may be there.

    Args:
        store: Just opened.
        truth: What was written.
        allowed: For each row, the seeds whose values it may carry; None stands for absent or detected as corrupt.

    Raises:
        AssertionError: A row is wrong, or lost although it was acknowledged.
    """
    rows, batch, corrupt = readable(store)
    counts = Counter(right=len(rows), corrupt=len(corrupt), absent=store.spec.rows - len(rows) - len(corrupt))
    for row, seeds in zip(rows.tolist(), truth.seeds_of(rows, batch), strict=True):
        assert seeds & set(allowed[row]), f"row {row} carries {seeds or 'what nobody wrote'}, may carry {allowed[row]}"
    there = set(rows.tolist())
    for row, may in enumerate(allowed):
        if row not in there:
            kind = "corrupt" if row in corrupt else "absent"
            assert None in may, f"row {row} is {kind}, although a commit had acknowledged it"
    return counts


def judge_file(path: Path, truth: Truth, allowed: Sequence[Collection[int | None]]) -> Counter[str]:
    """Open ``path`` read-only and :func:`judge` it."""
    store = HDF5Store.open(path, writable=False)
    try:
        return judge(store, truth, allowed)
    finally:
        store.close()
