"""What the model's forward is called with in a replay: rows, constants, and poison for what is not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachefreeze.errors import SplitError
from cachefreeze.listed import SampleLists, example_of
from cachefreeze.splitting.boundary import BoundaryTensor, Site
from cachefreeze.splitting.lengths import sizes_at
from cachefreeze.splitting.planner import Plan, input_name
from cachefreeze.splitting.replay_prefix import Numbers
from cachefreeze.splitting.values import Place, Value
from cachefreeze.tracing import Example

# (shape, dtype, device, whether glue writes into it) -> what stands for a value that is not kept
Poison = Callable[[tuple[int, ...], torch.dtype, torch.device, bool], Tensor]


class Pass:
    """One forward of the suffix; its outputs keep it alive where a backward may ask for it.

    Attributes:
        rows: What is kept, in the order of the boundary's tensors.
        input_shapes: Of the leaves of the model's inputs, which padded dimensions follow.
        checkpointed: Whether a stub was called under activation checkpointing, which calls it again in the backward.
    """

    def __init__(self, rows: list[Tensor], batch: int, poison: Poison) -> None:
        self.rows = rows
        self.batch = batch
        self.poison = poison
        self.numbers = Numbers()
        self.input_shapes: list[tuple[int, ...]] = []
        self.grad = torch.is_grad_enabled()
        self.checkpointed = False


class Inputs:
    """The model's arguments as the suffix calls it: rows, constants, and poison."""

    def __init__(self, site: Site, planned: Plan, example: Example) -> None:
        self._model, self._leaves = site.model, []
        self.answer: int | None = None
        self._listed = isinstance(example, SampleLists)
        if self._listed:
            return
        leaves, self._tree = pytree.tree_flatten((example.args, example.kwargs))
        values = {v.place[3]: v for v in planned.values if v.place is not None and v.place[0] == "input"}
        first = {id(leaves[at]): at for at in sorted(values, reverse=True)}  # one tensor may be given twice
        self._leaves = [
            _input(at if at in values else first[id(leaf)], values) if isinstance(leaf, Tensor) else (-1, leaf)
            for at, leaf in enumerate(leaves)
        ]
        self._stand_ins = {at: leaves[at].detach().clone() for at in planned.stand_ins}
        for at, value in self._leaves:
            if at >= 0 and value.spec is None and value.shape[:1] == (2,):
                raise SplitError(
                    f"replay: input {input_name(site, example, at)} has two dimensions that look like a batch"
                )

    def _stand_in(self, current: Pass, at: int, value: Value) -> Tensor:
        """The example's first sample, for every row."""
        sample: Tensor = self._stand_ins[at].to(current.rows[0].device)
        if self.answer is not None:
            sample = torch.full_like(sample, self.answer)
        if value.spec is None:
            return sample
        return sample.narrow(value.spec.batch_dim, 0, 1).repeat_interleave(current.batch, value.spec.batch_dim)

    def build(self, current: Pass, places: dict[Place, int], beside: Sequence[Any]) -> Any:
        """Positional and keyword arguments."""
        if len(beside) != self._listed:
            raise TypeError(
                f"a suffix of {type(self._model).__name__} takes {len(current.rows)} activations, and after them "
                f"{'its inputs: suffix(*rows, (images, targets))' if self._listed else 'nothing'}; got {len(beside)}"
            )
        if self._listed:
            (lists,) = example_of(self._model, beside[0]).beside
            return lists.args, lists.kwargs
        given = []
        for at, what in self._leaves:
            if at < 0:
                given.append(what)
                continue
            row = places.get(("input", "", 0, at))
            if row is None and at in self._stand_ins:
                given.append(self._stand_in(current, at, what))
            elif row is None:
                given.append(poisoned(current, what.spec, what.shape, what.dtype, what.written))
            else:
                given.append(current.rows[row])
        current.input_shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else () for leaf in given]
        return pytree.tree_unflatten(given, self._tree)


def _input(at: int, values: dict[int, Value]) -> tuple[int, Value]:
    return at, values[at]


def poisoned(
    current: Pass, spec: BoundaryTensor | None, shape: tuple[int, ...], dtype: torch.dtype, written: bool
) -> Tensor:
    """What stands for a value that is not kept, with the batch of the rows."""
    if spec is not None:
        shape = sizes_at(spec, current.batch, current.input_shapes)
    return current.poison(shape, dtype, current.rows[0].device, written)
