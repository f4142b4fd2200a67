"""The rows of the next batch on their way to the device while the step of this one computes.

One thread gathers the next batch's rows into pinned memory, which torch takes up again once the copy out of it has run,
and queues the copy on a stream of its own. The step's stream waits for the copy, the processor for neither.

A look ahead must not show: what it pulls from the batch sampler early may draw from no random state that anybody else
sees. That holds for the orders that :func:`foreseen` knows, and for all others nothing is pulled early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from math import inf
from types import TracebackType
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from cachefreeze.sampling import BlockShuffleSampler

Values = dict[str, Tensor]
Indices = Sequence[int]

# With their first sample these have drawn all that they draw. Subclasses may do anything, so they are not among them.
_DRAWN_AT_FIRST = (SequentialSampler, SubsetRandomSampler, DistributedSampler, BlockShuffleSampler)


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


class Lane(Protocol):
    """How a batch gets from one thread to the other."""

    def open(self) -> None:
        """In the thread that takes, before the first read: what it has queued on the device until now comes first."""
        ...

    def send(self, read: Callable[[Indices], Values], rows: Indices) -> Any:
        """Read in the other thread."""
        ...

    def take(self, sent: Any) -> Values:
        """What was sent, for the thread that takes."""
        ...


@final
class SideStream:
    """A stream for copies beside the one that computes."""  # needs CUDA

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def open(self) -> None:
        """Rows that were written on the current stream are read after that."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def send(self, read: Callable[[Indices], Values], rows: Indices) -> tuple[Values, torch.cuda.Event]:
        """Queue the copies, and an event behind them."""
        with torch.cuda.stream(self._stream):
            values, done = read(rows), torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return values, done

    def take(self, sent: tuple[Values, torch.cuda.Event]) -> Values:
        """The current stream waits for the copies, and their memory is used again only after what that then queues."""
        values, done = sent
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(done)
        for value in values.values():
            if value.is_cuda:
                value.record_stream(stream)
        return values


@final
class ReadAhead:
    """Reads one batch at a time in a thread of its own, which ends with the context.

    Args:
        read: Of the rows of a batch; it calls nothing of the user's and draws from no random state.
        lane: Of the batch; None where nothing is ever asked for.
    """

    def __init__(self, read: Callable[[Indices], Values], lane: Lane | None) -> None:
        self._read = read
        self._lane = lane
        self._thread: ThreadPoolExecutor | None = None
        self._asked: Future[Any] | None = None

    def ask(self, rows: Indices) -> None:
        """Begin to read a batch. What was asked for before has been taken."""
        assert self._lane is not None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "cachefreeze-ahead")
            self._lane.open()
        self._asked = self._thread.submit(self._lane.send, self._read, rows)

    def take(self) -> Values | None:
        """The batch that was asked for; None if none was. What its read raised is raised here."""
        asked, self._asked = self._asked, None
        if asked is None or self._lane is None:
            return None
        return self._lane.take(asked.result())

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown()
