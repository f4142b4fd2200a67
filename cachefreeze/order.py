"""The order of a pass: what the DataLoader would have drawn, from the same random states and in the same order.

What a DataLoader draws, and when, follows torch.utils.data.dataloader: ``_BaseDataLoaderIter.__init__`` makes one
iterator of the batch sampler and draws a base seed; with workers ``_reset`` makes a second iterator, pulls
``prefetch_factor * num_workers`` batches, and one more before each yield.

A look ahead must not show: what it pulls from the batch sampler early may draw from no random state that anybody else
sees. That holds for the orders that :func:`foreseen` knows, and for all others nothing is pulled early.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice, repeat
from math import inf
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from cachefreeze.sampling import BlockShuffleSampler

Indices = Sequence[int]

# With their first sample these have drawn all that they draw. Subclasses may do anything, so they are not among them.
_DRAWN_AT_FIRST = (SequentialSampler, SubsetRandomSampler, DistributedSampler, BlockShuffleSampler)


class BatchOrder:
    """The index lists of each pass, pulled from the batch sampler as the DataLoader would pull them."""

    def __init__(self, dataloader: DataLoader[Any]) -> None:
        self._loader = dataloader
        self._started = False

    def begin(self) -> Iterator[Indices]:
        """Make the iterators and the draws with which a DataLoader's pass begins."""
        loader = self._loader
        sampler: Any = loader.batch_sampler
        pulled: Iterator[Indices] | None = None
        if not (loader.persistent_workers and self._started):
            pulled = iter(sampler)
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        self._started = True
        if loader.num_workers or pulled is None:
            pulled = iter(sampler)
        return pulled

    def passed(self) -> None:
        """Take notice of a pass that the DataLoader made itself: its persistent workers are there now."""
        self._started = True

    def ahead(self, pulled: Iterator[Indices], *, following: bool) -> Iterator[tuple[Indices, Indices | None]]:
        """Hand the lists on, pulling ahead by as many as the workers' queues would hold.

        Args:
            pulled: From the batch sampler.
            following: Give the next one too, where it has been pulled or may be; else it is None.
        """
        depth = (self._loader.prefetch_factor or 0) * self._loader.num_workers
        if not depth:
            early = foreseen(self._loader.batch_sampler) if following else 0
            yield from with_following(pulled, early) if early else zip(pulled, repeat(None))
            return
        queue = deque(islice(pulled, depth))
        while queue:
            rows = queue.popleft()
            queue.extend(islice(pulled, 1))
            yield rows, queue[0] if following and queue else None


def in_sight(pulled: Iterator[Indices], batch_sampler: Any, tell: Callable[[Indices], None]) -> Iterator[Indices]:
    """The same batches; of blocks that are shuffled the samples are told a group of blocks before they come.

    Args:
        pulled: From the batch sampler.
        batch_sampler: Of a :class:`BlockShuffleSampler`, whose batches may be pulled early; of any other nothing is.
        tell: Takes the samples of a block.
    """
    sampler = batch_sampler.sampler if type(batch_sampler) is BatchSampler else None
    if type(sampler) is not BlockShuffleSampler:
        yield from pulled
        return
    block, samples = sampler.block, len(sampler)
    depth = -(-block * sampler.mixed // batch_sampler.batch_size)
    told: set[int] = set()
    queue: deque[Indices] = deque()
    for batch in pulled:
        for number in dict.fromkeys(sample // block for sample in batch):
            if number not in told:
                told.add(number)
                tell(range(number * block, min((number + 1) * block, samples)))
        queue.append(batch)
        if len(queue) > depth:
            yield queue.popleft()
    yield from queue


def foreseen(batch_sampler: object) -> float:
    """How many of a pass's batches may be pulled one batch early without a difference in what is drawn, and when.

    Source: torch.utils.data.sampler: ``RandomSampler`` draws every permutation when it comes to it, and one more after
    the last, from a generator of its own unless it was given the user's.
    """
    if type(batch_sampler) is not BatchSampler:
        return 0
    sampler: Any = batch_sampler.sampler
    if type(sampler) in _DRAWN_AT_FIRST:
        return inf
    if type(sampler) is not RandomSampler or sampler.replacement:
        return 0
    if sampler.generator is None:
        return inf
    return min(len(sampler.data_source), sampler.num_samples) // batch_sampler.batch_size


def with_following(pulled: Iterator[Indices], early: float) -> Iterator[tuple[Indices, Indices | None]]:
    """Each of a pass's batches, and the one after it; None after the last, and in place of what must not be pulled yet.

    Args:
        pulled: From the batch sampler.
        early: How many of the batches may be pulled early.
    """
    rows = next(pulled, None)
    for number in count(2):
        if rows is None:
            return
        following, error = None, None
        if number <= early:
            try:
                following = next(pulled, None)
            except Exception as raised:  # it belongs to the batch that is asked for next
                error = raised
        yield rows, following
        if error is not None:
            raise error
        rows = following if number <= early else next(pulled, None)
