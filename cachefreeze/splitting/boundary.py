"""What crosses from prefix to suffix, and what an executor hands over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cachefreeze.errors import UsageError
from cachefreeze.isolation import preserved_modes
from cachefreeze.tracing import Call, Example, Usage


@dataclass(frozen=True, kw_only=True)
class BoundaryTensor:
    """One tensor of the boundary.

    Attributes:
        shape: Of one sample, the batch dimension removed.
        dtype: As the prefix makes it.
        batch_dim: Where the batch dimension is in the tensor that the suffix takes.
        layout: Dimensions of the batched tensor from the slowest to the fastest in memory, so that channels_last
            comes back as it was made.
        folded: How many neighbouring entries of the batch dimension a sample owns, where the model folds another one
            into it (the frames of a video): the first of ``shape`` from ``batch_dim`` on. 0 where it does not.
        input: Which leaf of the model's inputs it is, if it is one; known where samples have different lengths.
        follows: (dimension of the batched tensor, leaf of the model's inputs, dimension of that leaf) for every
            dimension that is as long as the batch is padded.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    batch_dim: int
    layout: tuple[int, ...]
    folded: int = 0
    input: int | None = None
    follows: tuple[tuple[int, int, int], ...] = ()

    @property
    def bytes_per_sample(self) -> int:
        """Bytes of one sample's part."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor, batch_dim: int) -> BoundaryTensor:
        """Describe one recorded tensor."""
        dims = range(tensor.dim())
        # strides of a dimension of size 1 say nothing: contiguity is asked first
        layout = tuple(dims)
        if not tensor.is_contiguous():
            layout = tuple(sorted(dims, key=lambda d: (-tensor.stride()[d], d)))
        shape = tuple(size for d, size in enumerate(tensor.shape) if d != batch_dim)
        return cls(shape=shape, dtype=tensor.dtype, batch_dim=batch_dim, layout=layout)

    @classmethod
    def at(cls, tensor: Tensor, batch_dim: int, at_two: int, at_three: int) -> BoundaryTensor | None:
        """Describe a tensor of two samples whose size is ``at_three`` for three; None where that is no batch."""
        folded, rest = divmod(at_two, 2)
        if rest or not folded or at_three != 3 * folded:
            return None
        if folded == 1:
            return cls.of(tensor, batch_dim)
        return replace(cls.of(torch.unflatten(tensor, batch_dim, (2, folded)), batch_dim), folded=folded)

    def unfold(self, tensor: Tensor) -> Tensor:
        """A tensor as the model makes it -> one entry of the batch dimension per sample."""
        return torch.unflatten(tensor, self.batch_dim, (-1, self.folded)) if self.folded else tensor

    def fold(self, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`unfold`."""
        return tensor.flatten(self.batch_dim, self.batch_dim + 1) if self.folded else tensor


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """The place of a cut: the first trainable block and the tensors that enter what trains."""

    name: str
    tensors: tuple[BoundaryTensor, ...]

    @property
    def bytes_per_sample(self) -> int:
        """Bytes of one sample's activations, at the padded length of the example; inputs that are kept raw are none."""
        return sum(tensor.bytes_per_sample for tensor in self.tensors if tensor.input is None)


@dataclass(frozen=True)
class Cut:
    """A prefix and a suffix that an executor proposes; nothing is handed out before it is verified."""

    prefix: nn.Module
    suffix: nn.Module
    tensors: tuple[BoundaryTensor, ...]


@dataclass(frozen=True)
class Site:
    """Where a model is to be cut.

    Attributes:
        model: The user's model.
        name: The boundary's module name.
        event: The event at which the boundary is first used.
        usage: What a forward uses, in order.
        before: Modules that run before the boundary.
        frozen: Names of the parameters first used before it.
        by_flags: Whether the boundary was read from ``requires_grad``, rather than asked for.
    """

    model: nn.Module
    name: str
    event: int
    usage: Usage
    before: tuple[str, ...]
    frozen: frozenset[str]
    by_flags: bool = True

    @property
    def first_call(self) -> Call | None:
        """The boundary's first call, or that of what it holds; None where its weights are used without a call."""
        return self.usage.first_call_of(self.model, self.name)

    @property
    def written(self) -> list[nn.Parameter]:
        """Parameters that a forward writes."""
        return [self.model.get_parameter(name) for name in self.usage.writes]

    @property
    def known_as(self) -> str:
        """The name of the module whose call is the boundary's first: a shared module has its first name."""
        first = self.first_call
        return first.name if first is not None else self.name

    def open_before(self, closed: set[str]) -> list[str]:
        """Modules that are called before the boundary, outside every closed one, and run in part."""
        within = {n for n in closed if n}
        return sorted(
            {call.name for call in self.usage.calls if call.start <= self.event}
            - {c.name for c in self.usage.calls if any(c.name == n or c.name.startswith(f"{n}.") for n in within)}
        )

    @contextmanager
    def mode(self, *, train: bool) -> Iterator[None]:
        """The model in train or eval mode, with what lies before the boundary frozen and in eval mode."""
        parameters = dict(self.model.named_parameters())
        thawed = [parameters[name] for name in self.frozen if parameters[name].requires_grad]
        with preserved_modes(self.model):
            self.model.train(train)
            for name in self.before:
                module = self.model.get_submodule(name)
                if module.training:  # and was not put there with what holds it
                    module.eval()
            for parameter in thawed:
                parameter.requires_grad_(False)
            try:
                yield
            finally:
                for parameter in thawed:
                    parameter.requires_grad_(True)


class Uncopied:
    """What belongs to the one model that it was cut from: its stubs and graphs refer to that model's modules."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copy, deepcopy and pickle."""
        raise UsageError(
            f"a {type(self).__name__} of a split cannot be copied or pickled: it runs the modules of the model that it "
            "was cut from. Copy the model, and split the copy"
        )


def as_returned(values: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """What a prefix or a segment returns: one tensor, or a tuple of several."""
    return values[0] if len(values) == 1 else tuple(values)


def as_tuple(returned: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a prefix or a segment returned, as a tuple however many they are."""
    return returned if isinstance(returned, tuple) else (returned,)


def rows_of(prefix: nn.Module, some: Example) -> list[Tensor]:
    """What a prefix makes of some samples, in tensors of its own: a suffix may write into them."""
    return [row.clone() for row in as_tuple(some.call(prefix))]


class Executor(Protocol):
    """A way to cut a model. The first one whose cut passes the verification is taken."""

    name: str

    def cut(self, site: Site, example: Example) -> Cut:
        """Propose a prefix and a suffix.

        Raises:
            SplitError: This executor cannot cut here; the message names the module or op in the way.
        """
        ...
