"""Rows of one store spread over tiers: the first rows where they are read fastest, the rest where there is room.

Row *i* always lies in the same tier. A batch is gathered from each tier that has some of it, into memory of its own on
the device of the fastest tier, so that rows of slower tiers travel while the device still works on the batch before.

Shapes:
    starts: (tiers + 1,) first row of each tier, and the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from cachefreeze.errors import CorruptRowError, StoreError
from cachefreeze.stores.base import BadRow, FieldSpec, Store, StoreSpec
from cachefreeze.stores.hdf5 import HDF5Store
from cachefreeze.stores.memory import sent
from cachefreeze.stores.recycling import Recycler

# Shares of tiers are multiples of one part in so many.
_SHARES = 16


def part_of(spec: StoreSpec, start: int, stop: int) -> StoreSpec:
    """The spec of rows start … stop - 1 alone."""
    return StoreSpec(rows=stop - start, fields=tuple(_part_of_field(field, start, stop) for field in spec.fields))


def spread(spec: StoreSpec, room: Sequence[int]) -> list[int] | None:
    """How many rows each of several tiers takes, in the order of the tiers.

    Shares are whole sixteenths of the rows, so that a few bytes more or less that are free give the same shares, and a
    file that holds a part is found again.

    Args:
        spec: Rows and fields.
        room: Bytes that each tier may take.

    Returns:
        Rows of each tier, maybe 0; None where together they have no room.
    """
    bytes_of = torch.zeros(spec.rows, dtype=torch.int64)
    for field in spec.fields:
        bytes_of += field.item_bytes if field.lengths is None else field.lengths.values * field.item_bytes
    until = bytes_of.cumsum(0)
    step, taken, shares = max(1, spec.rows // _SHARES), 0, []
    for free_bytes in room:
        before = int(until[taken - 1]) if taken else 0
        end = int(torch.searchsorted(until, before + free_bytes, right=True))
        rows = spec.rows - taken if end == spec.rows else max(0, end - taken) // step * step
        shares.append(rows)
        taken += rows
    return shares if taken == spec.rows else None


@final
class MixedStore(Store):
    """One store made of others.

    Args:
        spec: Rows and fields of the whole.
        tiers: Stores of consecutive rows, fastest first, each of :func:`part_of` the spec. They belong to this store
            from here on, which closes them.

    Raises:
        StoreError: The tiers do not make up the spec.
    """

    tier = "mixed"

    def __init__(self, spec: StoreSpec, tiers: Sequence[Store]) -> None:
        self._tiers = tuple(tiers)
        self._starts = [0, *accumulate(store.spec.rows for store in self._tiers)]
        if not self._tiers or self._starts[-1] != spec.rows:
            raise StoreError(
                f"tiers of {[store.spec.rows for store in self._tiers]} rows do not make up {spec.rows:,}: give each "
                "a part of the spec (part_of), together all of it"
            )
        for store, start, stop in self._parts():
            if store.spec != part_of(spec, start, stop):
                raise StoreError(
                    f"the {store.tier} tier holds other fields than rows {start:,} to {stop - 1:,} have: make it with "
                    "part_of(spec, start, stop)"
                )
        super().__init__(spec, self._tiers[0].device)
        self._recycler = Recycler()
        self._inner = torch.tensor(self._starts[1:-1], dtype=torch.int64)
        self.writable = all(store.writable for store in self._tiers)
        for store, start, stop in self._parts():
            if store.count:
                there = store.present(torch.arange(stop - start))
                self._mark(start + there.nonzero().flatten(), present=True)

    @property
    def tiers(self) -> tuple[Store, ...]:
        """The stores that this one is made of, fastest first."""
        return self._tiers

    @property
    def path(self) -> Path | None:
        """The file of the tier on disk, if there is one."""
        return next((store.path for store in self._tiers if isinstance(store, HDF5Store)), None)

    def commit(self) -> None:
        """See :meth:`Store.commit`: only a tier on disk can promise that."""
        self._require_open()
        for store in self._tiers:
            store.commit()

    def verify(self) -> list[BadRow]:
        """Of all tiers; see :meth:`Store.verify`."""
        self._require_open()
        return [replace(bad, row=bad.row + start) for store, start, _ in self._parts() for bad in store.verify()]

    def close(self) -> None:
        """Close all tiers."""
        super().close()
        for store in self._tiers:
            store.close()

    def _parts(self) -> Iterator[tuple[Store, int, int]]:
        """(tier, its first row, the first row of the next)."""
        return zip(self._tiers, self._starts, self._starts[1:], strict=False)

    def _split(self, rows: Tensor) -> Iterator[tuple[Store, int, Tensor]]:
        """(tier, its first row, which of ``rows`` lie there) for each tier that has some."""
        where = torch.bucketize(rows.contiguous(), self._inner, right=True)
        for number, (store, start, _) in enumerate(self._parts()):
            at = (where == number).nonzero().flatten()
            if len(at):
                yield store, start, at

    def _write(self, rows: Tensor, batch: Mapping[str, Tensor]) -> None:
        for store, start, at in self._split(rows):
            whole = len(at) == len(rows)
            values = {n: v if whole else v.index_select(0, at.to(v.device)) for n, v in batch.items()}
            store.write(rows[at] - start, values)

    def _read(self, rows: Tensor) -> dict[str, Tensor]:
        parts = list(self._split(rows))
        if len(parts) == 1:
            store, start, _ = parts[0]
            values = self._from(store, start, rows)
            return {name: self._arriving(value) for name, value in values.items()}
        fresh = {field.name: self._fresh(field, rows) for field in self.spec.fields}
        for store, start, at in parts:
            index = sent(at, self.device)
            values = self._from(store, start, rows[at])
            for field in self.spec.fields:
                there, value = fresh[field.name], values[field.name]
                if field.lengths is not None:  # as wide as the longest of this tier's rows
                    there = there[:, : value.shape[1]]
                there.index_copy_(0, index, self._arriving(value))
        return fresh

    def _fresh(self, field: FieldSpec, rows: Tensor) -> Tensor:
        """Memory for a batch on this store's device; zeros where rows are padded."""
        shape = field.batch_shape(rows)
        if self.device.type == "cpu":
            made = self._recycler.empty(shape, field.dtype)
        else:  # needs CUDA, or another accelerator
            made = torch.empty(shape, dtype=field.dtype, device=self.device)
        return made if field.lengths is None else made.zero_()

    def _arriving(self, value: Tensor) -> Tensor:
        """A tier's batch on this store's device. It is nobody else's, so that one in pinned memory needs no copy."""
        if value.device != self.device and value.is_pinned():  # needs CUDA
            return value.to(self.device, non_blocking=True)
        return sent(value, self.device)

    @staticmethod
    def _from(store: Store, start: int, rows: Tensor) -> dict[str, Tensor]:
        try:
            return store.read(rows - start)
        except CorruptRowError as error:
            raise CorruptRowError(str(error), rows=[row + start for row in error.rows]) from error

    def _look(self, rows: Tensor) -> None:
        for store, start, at in self._split(rows):
            self._mark(rows[at][store.present(rows[at] - start)], present=True)

    def _expect(self, rows: Tensor) -> None:
        for store, start, at in self._split(rows):
            store.expect(rows[at] - start)

    def _forget(self, rows: Tensor) -> None:
        for store, start, at in self._split(rows):
            store.forget(rows[at] - start)

    def _claim(self, rows: Tensor) -> Tensor:
        mine = torch.zeros(len(rows), dtype=torch.bool)
        for store, start, at in self._split(rows):
            mine[at] = store.claim(rows[at] - start)
        return mine

    def _release(self, rows: Tensor) -> None:
        for store, start, at in self._split(rows):
            store.release(rows[at] - start)


def _part_of_field(field: FieldSpec, start: int, stop: int) -> FieldSpec:
    if field.lengths is None:
        return field
    lengths = field.lengths.of(torch.arange(start, stop))
    if not int(lengths.max()):  # a store holds no field without bytes
        raise StoreError(
            f"rows {start:,} to {stop - 1:,} of ragged {field.name!r} are all empty: spread them otherwise"
        )
    return FieldSpec.ragged(name=field.name, lengths=lengths, rest=field.shape[1:], dtype=field.dtype)
