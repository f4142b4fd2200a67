"""How long each block's forward takes, and how many bytes enter it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachefreeze.tracing import Example, Usage


def block_forwards(
    model: nn.Module, usage: Usage, names: Sequence[str], example: Example, repeats: int
) -> tuple[list[float], list[int]]:
    """Seconds of one forward that are spent in each block, and bytes a sample that enter its first call.

    A block's time is from its first call to the next one's: what comes before the first block is its own, and a block
    that is never called takes none. Of ``repeats`` the fastest counts, as that which least else came between; the first
    of a shape is slower and is no one of them.
    """
    marks: dict[str, float] = {}
    entered: dict[str, int] = {}
    device = next((leaf.device for leaf in tensors_of((example.args, example.kwargs))), torch.device("cpu"))

    def note(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        if name not in marks:
            wait(device)
            marks[name] = time.perf_counter()
            entered[name] = sum(tensor.nbytes for tensor in tensors_of((args, kwargs))) // example.batch

    called = called_names(model, usage, names)
    handles = [
        model.get_submodule(called[name]).register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name in names
        if name in called
    ]
    spent: list[list[float]] = []
    try:
        for _ in range(1 + repeats):
            marks.clear()
            given = example.fresh()
            wait(device)
            began = time.perf_counter()
            given.call(model)
            wait(device)
            ended = time.perf_counter()
            starts = in_order([began, *(marks.get(name, 0.0) for name in names[1:]), ended])
            spent.append([after - before for before, after in pairwise(starts)])
    finally:
        for handle in handles:
            handle.remove()
    return min(spent[1:], key=sum), [entered.get(name, 0) for name in names]


@contextmanager
def first_call(modules: Sequence[nn.Module], device: torch.device) -> Iterator[list[float]]:
    """When one of some modules was first called, alone in a list; the list is empty if none was."""
    called: list[float] = []

    def note(*_: Any) -> None:
        if not called:
            wait(device)
            called.append(time.perf_counter())

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def called_names(model: nn.Module, usage: Usage, names: Sequence[str]) -> dict[str, str]:
    """Block -> the module whose first call begins it."""
    return {name: call.name for name in names if (call := usage.first_call_of(model, name)) is not None}


def in_order(starts: list[float]) -> list[float]:
    """Moments with those that are missing, or later than the next one, put at the next one."""
    for index in range(len(starts) - 2, 0, -1):
        starts[index] = starts[index] if starts[0] <= starts[index] <= starts[index + 1] else starts[index + 1]
    return starts


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of a tree."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def wait(device: torch.device) -> None:
    """Wait for the device to have done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
