"""The rows of the next batch on their way to the device while the step of this one computes.

One thread gathers the next batch's rows into pinned memory, which torch takes up again once the copy out of it has run,
and queues the copy on a stream of its own. The step's stream waits for the copy, the processor for neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from types import TracebackType
from typing import Any, Protocol, final

import torch
from torch import Tensor

Values = dict[str, Tensor]
Indices = Sequence[int]


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


@cache
def side_stream(device: torch.device) -> SideStream:
    """The one of a device, for every pass: torch has 32 streams, which it hands out again, and memory for each."""
    return SideStream(device)  # needs CUDA


@final
class Telling:
    """Says in a thread of its own, which ends with the context, what will be asked for; nobody waits for that.

    Args:
        tell: Takes samples.
    """

    def __init__(self, tell: Callable[[Indices], None]) -> None:
        self._tell = tell
        self._thread: ThreadPoolExecutor | None = None

    def __call__(self, samples: Indices) -> None:
        """Tell in a moment."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "cachefreeze-telling")
        self._thread.submit(self._tell, samples)

    def __enter__(self) -> Telling:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


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
