"""Rows of a deeper boundary made from the rows of a shallower one: no sample is fetched, no block runs twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cachefreeze.errors import CorruptRowError
from cachefreeze.frozen_prefix import FrozenPrefix
from cachefreeze.row_source import Computed, PassCounts
from cachefreeze.rows import FillReport, StoredRows, index_of
from cachefreeze.running import autocast
from cachefreeze.samples import View
from cachefreeze.splitting.boundary import as_tuple
from cachefreeze.stores import Store


class PromotedRows(StoredRows):
    """Rows that are made from those below where these are stored, and from the samples where they are not.

    Args:
        prefix: Of the deeper boundary.
        name: Of the store.
        view: The samples; the same as below.
        where: As for :class:`StoredRows`.
        version: Likewise.
        below: The rows of the shallower boundary.
        segment: One tensor per boundary tensor below -> what the deeper prefix returns.
    """

    def __init__(
        self,
        prefix: FrozenPrefix,
        name: str,
        view: View,
        where: str | Store | StoredRows,
        version: str,
        *,
        below: StoredRows,
        segment: nn.Module,
    ) -> None:
        self._below: StoredRows | None = below
        self._segment = segment
        super().__init__(prefix, name, view, where, version)

    def let_go(self) -> None:
        """Need the rows below no more; those that are absent here are made from the samples."""
        self._below = None

    def check(self) -> None:
        """As for any rows; those below must not be stale either."""
        super().check()
        if self._below is not None:
            self._below.check()

    def absent(self, rows: Sequence[int]) -> list[int]:
        """Which of ``rows`` can be had neither here nor from below, each once, in order."""
        missing = super().absent(rows)
        return missing if self._below is None or not missing else self._below.absent(missing)

    def batch(
        self,
        rows: Sequence[int],
        counts: PassCounts,
        computed: Sequence[Computed],
        stored: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The user's batch for ``rows``; what is only below is promoted first."""
        if stored is not None:
            return super().batch(rows, counts, computed, stored)
        made = list(computed)
        known = {row for part in made for row in part.rows}
        missing = [row for row in super().absent(rows) if row not in known]
        if missing:
            made += self._promote(missing)
            counts.promoted += len(missing)
        return super().batch(rows, counts, made)

    def fill(self, dataloader: DataLoader[Any], progress: Callable[[int], None] | None) -> FillReport:
        """Promote every row that is only below, in order, then compute what is left from the samples."""
        self.check()
        size = dataloader.batch_size or 64
        missing = super().absent(range(self.spec.rows))
        beyond = set(self.absent(missing))
        promoted = [row for row in missing if row not in beyond] if self.store.writable else []
        for at in range(0, len(promoted), size):
            rows = promoted[at : at + size]
            self._promote(rows)
            if progress is not None:
                progress(len(rows))
        below, self._below = self._below, None
        try:
            done = super().fill(dataloader, progress)
        finally:
            self._below = below
        return FillReport(rows=done.rows, computed_rows=done.computed_rows + len(promoted), nbytes=done.nbytes)

    def _promote(self, rows: Sequence[int]) -> list[Computed]:
        """Make ``rows`` from those below and write them; a damaged one below is made from its sample."""
        below = self._below
        if below is None:
            return [self.compute(rows, self.fetch(rows))]
        # kernels for a batch of one round differently from those for more: compute it as two
        index = index_of(rows if len(rows) > 1 else [*rows, *rows])
        try:
            values = below.store.read(index)
        except CorruptRowError as error:
            bad = list(dict.fromkeys(error.rows))
            good = [row for row in rows if row not in bad]
            return [self.compute(bad, self.fetch(bad)), *(self._promote(good) if good else [])]
        tensors, batch = below.format.decode(index, values, self.prefix.device)

        def made() -> Computed:
            with torch.no_grad(), autocast(self.prefix.device, self.prefix.mode.autocast):
                deeper = as_tuple(self._segment(*tensors, *below.format.lists(batch)))
            encoded = self.format.encode_again(index.tolist(), values, batch, deeper)
            return Computed(tuple(rows), {name: value[: len(rows)] for name, value in encoded.items()})

        return [self.make(rows, made)]
