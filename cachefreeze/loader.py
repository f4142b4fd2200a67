"""The batches: the DataLoader's own order, with what the model consumes replaced by rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from cachefreeze.batches import map_tensors
from cachefreeze.errors import CorruptRowError, LoaderError
from cachefreeze.order import BatchOrder
from cachefreeze.prefetch import Lane, ReadAhead
from cachefreeze.running import NumericMode
from cachefreeze.samples import is_map_style
from cachefreeze.tracing import Example

Source = Literal["live", "frozen", "fill", "cached"]


class Rows:
    """Boundary activations of one batch: what the trainable part eats in place of raw inputs.

    A pytree; opaque to the training loop, which only hands it to the engine.

    Attributes:
        tensors: In the order of ``boundary.tensors``.
        mode: The autocast state that they were made for.
        owner: The split that made them.
        raw: What the collate function gave in this place, where batches are collated anew each time (samples of
            different lengths): the labels that a model consumes, for one. Else None.
        lists: A detector's inputs beside its activations, alone in a tuple; empty for all other models.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        mode: NumericMode,
        owner: object,
        batch_dim: int = 0,
        raw: Any = None,
        lists: tuple[Example, ...] = (),
    ) -> None:
        self.tensors = tuple(tensors)
        self.mode = mode
        self.owner = owner
        self.raw = raw
        self.lists = lists
        self._batch_dim = batch_dim

    def __len__(self) -> int:
        return int(self.tensors[0].shape[self._batch_dim])

    def __repr__(self) -> str:
        return f"Rows({', '.join(f'{tuple(t.shape)} {t.dtype}' for t in self.tensors)})"

    def to(self, *args: Any, **kwargs: Any) -> Rows:
        """As ``Tensor.to``, for every tensor."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Rows:
        """As ``Tensor.pin_memory``, for every tensor."""
        return self._map(lambda tensor: tensor.pin_memory())

    def beside(self, raw: Any) -> Rows:
        """The same rows in the place of ``raw``."""
        return Rows(self.tensors, self.mode, self.owner, self._batch_dim, raw, self.lists)

    def with_lists(self, lists: Example) -> Rows:
        """The same rows with what the suffix takes after them."""
        return Rows(self.tensors, self.mode, self.owner, self._batch_dim, self.raw, (lists,))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        raw = map_tensors(change, self.raw)
        lists = tuple(example.map(change) for example in self.lists)
        return Rows([change(tensor) for tensor in self.tensors], self.mode, self.owner, self._batch_dim, raw, lists)


def _rebuilt(children: Any, context: Any) -> Rows:
    tensors, *rest = children
    mode, owner, batch_dim = context
    return Rows(tensors, mode, owner, batch_dim, rest[0] if rest else None, tuple(rest[1:]))


pytree.register_pytree_node(
    Rows,
    lambda rows: (
        [rows.tensors] if rows.raw is None else [rows.tensors, rows.raw, *rows.lists],
        (rows.mode, rows.owner, rows._batch_dim),
    ),
    _rebuilt,
)


@dataclass
class PassCounts:
    """Where the rows of one pass came from, counted as they were handed out.

    Attributes:
        cached: Read from the store.
        computed: Computed in this pass.
        repaired: Computed because the stored row failed its checksum, or its sample was edited; part of ``computed``.
        rewritten: Stored rows that moved when the store was opened, or whose fields were written then.
        promoted: Made from the rows of a shallower boundary; part of ``computed``.
        kept: Whether computed rows were written.
    """

    cached: int = 0
    computed: int = 0
    repaired: int = 0
    rewritten: int = 0
    promoted: int = 0
    kept: bool = True

    def source(self) -> Source:
        """How the report calls such a pass."""
        if self.computed == 0:
            return "cached"
        return "fill" if self.kept else "frozen"


@dataclass(frozen=True)
class Computed:
    """Rows that were just computed.

    Attributes:
        rows: Sample indices, each once.
        values: Per field of the store, one row per index, as it would be stored.
    """

    rows: tuple[int, ...]
    values: dict[str, Tensor]


class RowSource(Protocol):
    """Where a loader's rows come from. The loader needs nothing else of a manager."""

    dataset: Any

    @property
    def settled(self) -> bool:
        """Whether no row is absent."""
        ...

    def check(self) -> None:
        """Raise if stored rows would be stale."""
        ...

    def in_turn(self, batches: Iterator[Sequence[int]], epoch: int) -> Iterator[Sequence[int]]:
        """The rows that stand for batches of samples in an epoch."""
        ...

    def absent(self, rows: Sequence[int]) -> list[int]:
        """Which of ``rows`` are not stored, each once, in order."""
        ...

    def compute(self, rows: Sequence[int], raw: Any) -> Computed:
        """Run the prefix over the collated raw batch of ``rows`` and write them where the store can be written."""
        ...

    def batch(
        self,
        rows: Sequence[int],
        counts: PassCounts,
        computed: Sequence[Computed],
        stored: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The user's batch for ``rows``: some were just computed, or all of them were read ahead as ``stored``."""
        ...

    def lane(self) -> Lane | None:
        """How rows that are read ahead get to the device; None where reading ahead gains nothing."""
        ...

    def read_ahead(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Stored rows, on their way to the device; in a thread that nobody waits for."""
        ...

    def fetch(self, rows: Sequence[int]) -> Any:
        """The collated raw batch of ``rows``, in this process."""
        ...

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """The user's collate function, for a worker; an empty list gives None."""
        ...

    def progress(self) -> str:
        """How far the store is filled, in words; empty once it is full."""
        ...


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
        source = self.rows
        source.check()
        self.counts = counts = PassCounts()
        now = None if self._clock is None else self._clock()
        self._epoch = self._epoch + 1 if now is None else now
        pulled = source.in_turn(self._order.begin(), self._epoch)
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
    if dataloader.batch_sampler is None:
        raise LoaderError("batch_size=None turns batching off; give the DataLoader a batch_size or a batch_sampler")
    if len(dataloader.dataset) == 0:  # type: ignore[arg-type]
        raise LoaderError("the dataset is empty")
