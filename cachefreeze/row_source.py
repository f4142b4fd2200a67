"""What passes between a loader and what makes its rows: the rows themselves, what a pass counts, and what is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor
from torch.utils import _pytree as pytree

from cachefreeze.batches import map_tensors
from cachefreeze.prefetch import Lane
from cachefreeze.running import NumericMode
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

    @property
    def on_disk(self) -> bool:
        """Whether it takes a while until rows come that are asked for."""
        ...

    def expect(self, samples: Sequence[int], epoch: int) -> None:
        """Samples whose rows will soon be asked for; in a thread that nobody waits for."""
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
