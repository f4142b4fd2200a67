"""What crosses from prefix to suffix, and what an executor hands over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn

from cachefreeze.isolation import preserved_modes
from cachefreeze.tracing import Example, Usage


@dataclass(frozen=True, kw_only=True)
class BoundaryTensor:
    """One tensor of the boundary.

    Attributes:
        shape: Of one sample, the batch dimension removed.
        dtype: As the prefix makes it.
        batch_dim: Where the batch dimension is in the tensor that the suffix takes.
        layout: Dimensions of the batched tensor from the slowest to the fastest in memory, so that channels_last
            comes back as it was made.
        input: Which leaf of the model's inputs it is, if it is one; known where samples have different lengths.
        follows: (dimension of the batched tensor, leaf of the model's inputs, dimension of that leaf) for every
            dimension that is as long as the batch is padded.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    batch_dim: int
    layout: tuple[int, ...]
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
    """

    model: nn.Module
    name: str
    event: int
    usage: Usage
    before: tuple[str, ...]
    frozen: frozenset[str]

    @property
    def known_as(self) -> str:
        """The boundary's name in a recording, where a shared module has its first name."""
        module = self.model.get_submodule(self.name)
        names: dict[int, str] = {id(other): name for name, other in self.model.named_modules()}
        return names[id(module)]

    @contextmanager
    def mode(self, *, train: bool) -> Iterator[None]:
        """The model in train or eval mode, with what lies before the boundary frozen and in eval mode."""
        parameters = dict(self.model.named_parameters())
        thawed = [parameters[name] for name in self.frozen if parameters[name].requires_grad]
        with preserved_modes(self.model):
            self.model.train(train)
            for name in self.before:
                self.model.get_submodule(name).eval()
            for parameter in thawed:
                parameter.requires_grad_(False)
            try:
                yield
            finally:
                for parameter in thawed:
                    parameter.requires_grad_(True)


class Executor(Protocol):
    """A way to cut a model. The first one whose cut passes the verification is taken."""

    name: str

    def cut(self, site: Site, example: Example) -> Cut:
        """Propose a prefix and a suffix.

        Raises:
            SplitError: This executor cannot cut here; the message names the module or op in the way.
        """
        ...
