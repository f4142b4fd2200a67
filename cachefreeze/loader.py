"""The batches: the DataLoader's own order, with what the model consumes replaced by rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from cachefreeze.batches import map_tensors
from cachefreeze.errors import CorruptRowError, LoaderError
from cachefreeze.isolation import outside_inference_mode
from cachefreeze.order import BatchOrder, in_sight
from cachefreeze.prefetch import ReadAhead, Telling
from cachefreeze.row_source import PassCounts, RowSource, Source
from cachefreeze.samples import is_map_style


class LoaderProxy:
    """What stays of the user's DataLoader on the outside."""

    def __init__(self, dataloader: DataLoader[Any]) -> None:
        check_loader(dataloader)
        self.dataloader = dataloader
        self.counts = PassCounts()

    def __len__(self) -> int:
        return len(self.dataloader)

    @property
    def dataset(self) -> Any:
        """The user's dataset."""
        return self.dataloader.dataset

    @property
    def sampler(self) -> Any:
        """The user's sampler."""
        return self.dataloader.sampler

    @property
    def batch_sampler(self) -> Any:
        """The user's batch sampler."""
        return self.dataloader.batch_sampler

    @property
    def batch_size(self) -> int | None:
        """Samples per batch; None where a batch sampler of the user's own decides."""
        return self.dataloader.batch_size

    @property
    def source(self) -> Source:
        """Where the last pass came from."""
        return self.counts.source()


class PassingLoader(LoaderProxy):
    """The DataLoader's own raw batches, moved to the model's device: live epochs, and epochs without a cache."""

    def __init__(self, dataloader: DataLoader[Any], device: torch.device, source: Source) -> None:
        super().__init__(dataloader)
        self._device = device
        self._source: Source = source

    @property
    def source(self) -> Source:
        """``live`` or ``frozen``."""
        return self._source

    def __iter__(self) -> Iterator[Any]:
        for batch in self.dataloader:
            yield move(batch, self._device)


class CachedLoader(LoaderProxy):
    """Rows instead of raw inputs: written on the first visit of a sample, read afterwards.

    Args:
        dataloader: The user's.
        source: Of the rows.
        clock: The epoch that runs, which decides on variants; None, also as its answer: every pass is an epoch.
    """

    def __init__(
        self, dataloader: DataLoader[Any], source: RowSource, clock: Callable[[], int | None] | None = None
    ) -> None:
        super().__init__(dataloader)
        self.rows = source
        self._order = BatchOrder(dataloader)
        self._settled = False
        self._clock = clock
        self._epoch = -1
        self._instead: PassingLoader | None = None

    def decline(self, instead: PassingLoader) -> None:
        """Yield from now on what ``instead`` yields: raw batches, no row is made or read."""
        self._instead = instead

    @property
    def source(self) -> Source:
        """Where the last pass came from."""
        return super().source if self._instead is None else self._instead.source

    def __iter__(self) -> Iterator[Any]:
        if self._instead is not None:
            yield from self._instead
            return
        with closing(self._pass()) as batches:
            while True:
                # asked here, since a context that does nothing takes two microseconds
                with outside_inference_mode() if torch.is_inference_mode_enabled() else nullcontext():
                    batch = next(batches, self)
                if batch is self:
                    return
                yield batch
                del batch  # its memory is used again

    def _pass(self) -> Generator[Any, None, None]:
        source = self.rows
        source.check()
        self.counts = counts = PassCounts()
        now = None if self._clock is None else self._clock()
        self._epoch = self._epoch + 1 if now is None else now
        with Telling(partial(source.expect, epoch=self._epoch)) as tell:
            begun = self._order.begin()
            if source.settled and source.on_disk:
                begun = in_sight(begun, self.dataloader.batch_sampler, tell)
            yield from self._batches(source, source.in_turn(begun, self._epoch), counts)

    def _batches(self, source: RowSource, pulled: Iterator[Sequence[int]], counts: PassCounts) -> Iterator[Any]:
        # after one whole pass that computed nothing, workers would only wait; a row that fails is fetched here
        batches: Iterator[_Fetched]
        lane = None
        if self.dataloader.num_workers and not self._settled:
            batches = self._with_workers(pulled)
        else:
            lane = source.lane() if source.settled else None
            batches = ((*pair, (), None) for pair in self._order.ahead(pulled, following=lane is not None))
        with ReadAhead(source.read_ahead, lane) as ahead:
            for rows, following, scheduled, raw in batches:
                stored = _taken(ahead, counts)
                computed = [source.compute(scheduled, raw)] if scheduled else []
                # not scheduled for the workers: this pass has none, or the store keeps nothing that it is given
                known = stored is not None or source.settled
                rest = [] if known else [row for row in source.absent(rows) if row not in scheduled]
                if rest:
                    computed.append(source.compute(rest, source.fetch(rest)))
                batch = source.batch(rows, counts, computed, stored)
                if following is not None and source.settled:
                    ahead.ask(following)
                yield batch
        self._settled = counts.computed == 0

    def _with_workers(self, pulled: Iterator[Sequence[int]]) -> Iterator[_Fetched]:
        """Fetch what is absent in worker processes. One batch of theirs per batch of the user's, maybe empty."""
        feed = _Feed(pulled, self.rows)
        for raw in worker_loader(self.dataloader, self.rows, feed):
            rows, scheduled = feed.order.popleft()
            yield rows, None, scheduled, raw


# rows of the user's batch; of the next one, to be read ahead; those that workers fetched; what they fetched
_Fetched = tuple[Sequence[int], Sequence[int] | None, Sequence[int], Any]


def _taken(ahead: ReadAhead, counts: PassCounts) -> Mapping[str, Tensor] | None:
    """What was read ahead. Where a row was damaged nothing was: that row is absent now, and computed like any other."""
    try:
        return ahead.take()
    except CorruptRowError as error:
        counts.repaired += len(set(error.rows))
        return None


class StagedLoader(LoaderProxy):
    """The loader of a run under a schedule: what it yields follows the boundary, from epoch to epoch."""

    def __init__(self, dataloader: DataLoader[Any]) -> None:
        super().__init__(dataloader)
        self._order = BatchOrder(dataloader)
        self._inner: PassingLoader | CachedLoader | None = None

    def follow(self, inner: PassingLoader | CachedLoader) -> None:
        """Yield from now on what ``inner`` yields; both have this loader's DataLoader."""
        if isinstance(inner, CachedLoader):
            inner._order = self._order  # it has begun already: persistent workers draw on their first pass only
        self._inner = inner

    @property
    def inner(self) -> PassingLoader | CachedLoader:
        """What it follows now.

        Raises:
            LoaderError: No epoch has begun.
        """
        if self._inner is None:
            raise LoaderError("this loader follows a schedule: iterate it inside `for epoch in engine.epochs(N)`")
        return self._inner

    @property
    def source(self) -> Source:
        """Where the last pass came from."""
        return self.inner.source

    def __iter__(self) -> Iterator[Any]:
        inner = self.inner
        if isinstance(inner, PassingLoader):
            self._order.passed()
        for batch in inner:
            self.counts = inner.counts
            yield batch


class _Feed:
    """The batch sampler of the worker loader: for each batch of the user's, the rows that are still absent."""

    def __init__(self, pulled: Iterator[Sequence[int]], source: RowSource) -> None:
        self._pulled = pulled
        self._source = source
        self._scheduled: set[int] = set()
        self.order: deque[tuple[Sequence[int], list[int]]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self._pulled:
            # what an earlier batch will bring is there before this one is asked for
            absent = [row for row in self._source.absent(rows) if row not in self._scheduled]
            self._scheduled.update(absent)
            self.order.append((rows, absent))
            yield absent


def worker_loader(dataloader: DataLoader[Any], source: RowSource, lists: Any) -> DataLoader[Any]:
    """A DataLoader like the user's over given index lists, with a private generator so that it draws nothing."""
    return DataLoader(
        source.dataset,
        batch_sampler=lists,
        num_workers=dataloader.num_workers,
        collate_fn=source.collate,
        pin_memory=dataloader.pin_memory,
        timeout=dataloader.timeout,
        worker_init_fn=dataloader.worker_init_fn,
        multiprocessing_context=dataloader.multiprocessing_context,
        prefetch_factor=dataloader.prefetch_factor,
        generator=torch.Generator(),
    )


def move(batch: Any, device: torch.device) -> Any:
    """Every tensor of a batch on ``device``; pinned memory is copied without waiting."""
    return map_tensors(lambda leaf: leaf.to(device, non_blocking=True), batch)


def check_loader(dataloader: Any) -> None:
    """Refuse loaders whose batches are not lists of sample indices.

    Raises:
        LoaderError: Says why, and what to use instead.
    """
    if isinstance(dataloader, LoaderProxy):
        raise LoaderError("this loader already comes from an engine; pass the DataLoader it was made of")
    if not isinstance(dataloader, DataLoader):
        raise LoaderError(
            f"expected a torch.utils.data.DataLoader, got {type(dataloader).__name__}: rows belong to samples, so the "
            "sampler must be known"
        )
    if isinstance(dataloader.dataset, IterableDataset) or not is_map_style(dataloader.dataset):
        raise LoaderError(
            f"{type(dataloader.dataset).__name__} is an iterable dataset: its samples have no indices, so no row can "
            "belong to one; use a map-style dataset (__getitem__ and __len__)"
        )
    inner = dataloader.dataset
    while isinstance(inner, Subset):
        inner = inner.dataset
    if hasattr(inner, "__getitems__") and getattr(type(inner), "__getitem__", None) is Dataset.__getitem__:
        raise LoaderError(
            f"{type(inner).__name__} has __getitems__ and no __getitem__: expected samples that can be had one by one, "
            "since a row is of one; add: def __getitem__(self, index): return self.__getitems__([index])[0]"
        )
    if dataloader.batch_sampler is None:
        raise LoaderError("batch_size=None turns batching off; give the DataLoader a batch_size or a batch_sampler")
    if len(dataloader.dataset) == 0:  # type: ignore[arg-type]
        raise LoaderError("the dataset is empty")
