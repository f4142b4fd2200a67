"""The fields of a batch: which parts the model consumes, which tensors are stored beside its rows."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachefreeze.errors import FieldError
from cachefreeze.listed import SampleLists
from cachefreeze.tracing import Example

Inputs = int | str | Sequence[int] | Sequence[str] | None


class BatchLayout:
    """Which parts of a collated batch the model consumes, and which tensors are stored beside its rows.

    Attributes:
        consumed: Names of the elements that the model consumes.
        keywords: Whether they are its keyword arguments.
        input_names: Of every leaf of what the model consumes.
        fields: Path and value of every tensor that is stored beside the rows.

    A batch is a tensor, or a tuple, list, named tuple or mapping (a dict, or what a tokenizer returns) of trees of
    tensors. The consumed elements are elements of the outermost container.
    """

    def __init__(
        self, batch: Any, inputs: Inputs, arguments: Sequence[str], *, stored: bool = True, listed: bool = False
    ) -> None:
        """Read the layout from one collated batch.

        Args:
            batch: What the collate function returned.
            inputs: Index, key or keys of what the model consumes; None takes the first element of a sequence, or
                the keys that are arguments of the model's forward.
            arguments: Names of the arguments of the model's forward.
            stored: Whether what is not consumed has to be stored, so that it must be tensors; else it is anything.
            listed: Whether the batch is made of lists with one entry a sample.
        """
        names, elements, self._container = _elements(batch)
        self._names = names
        self._kind = SampleLists if listed else Example
        self.consumed = _consumed(batch, names, inputs, arguments)
        self.keywords = isinstance(batch, Mapping) and all(name in arguments for name in self.consumed)
        given = dict(zip(names, elements, strict=True))
        self.input_names = tuple(
            f"{name}{pytree.keystr(path)}"
            for name in self.consumed
            for path, _ in pytree.tree_flatten_with_path(given[name])[0]
        )
        self._trees: dict[str, Any] = {}
        self.fields: list[tuple[str, Tensor]] = []
        for name, element in zip(names, elements, strict=True):
            if name in self.consumed or not stored:
                continue
            leaves, self._trees[name] = pytree.tree_flatten_with_path(element)
            for path, leaf in leaves:
                where = f"{name}{pytree.keystr(path)}"
                if not isinstance(leaf, Tensor):
                    raise FieldError(
                        f"field {where!r} of the batch is {type(leaf).__name__}, not a tensor, so it cannot be stored "
                        "beside its rows; drop it in the dataset, or turn it into a tensor (an index, say)"
                    )
                self.fields.append((where, leaf))

    @property
    def field_names(self) -> tuple[str, ...]:
        """Paths of the stored fields within a batch."""
        return tuple(name for name, _ in self.fields)

    def example(self, batch: Any) -> Example:
        """The model's inputs within a batch."""
        names, elements, _ = _elements(batch)
        found = dict(zip(names, elements, strict=True))
        picked = [found[name] for name in self.consumed]
        if self.keywords:
            return self._kind((), dict(zip(self.consumed, picked, strict=True)))
        return self._kind(tuple(picked), {})

    def lists(self, batch: Any) -> SampleLists:
        """The model's inputs within a batch of lists."""
        example = self.example(batch)
        assert isinstance(example, SampleLists)
        return example

    def field_tensors(self, batch: Any) -> list[Tensor]:
        """The stored fields within a batch, in the order of :attr:`field_names`."""
        names, elements, _ = _elements(batch)
        others = [element for name, element in zip(names, elements, strict=True) if name not in self.consumed]
        return [leaf for element in others for leaf in pytree.tree_leaves(element)]

    def assemble(self, rows: Any, fields: Sequence[Tensor]) -> Any:
        """The user's batch with ``rows`` in place of what the model consumes."""
        rest = iter(fields)
        elements = []
        for name in self._names:
            if name in self.consumed:
                elements.append(rows)
            else:
                tree = self._trees[name]
                if tree.is_leaf():  # a label, most often: no tree to put together
                    elements.append(next(rest))
                else:
                    elements.append(pytree.tree_unflatten([next(rest) for _ in range(tree.num_leaves)], tree))
        return self._container(elements)

    def replace(self, batch: Any, swap: Callable[[Any], Any]) -> Any:
        """``batch`` with ``swap`` applied to each element that the model consumes, all else as it is."""
        if isinstance(batch, Mapping):
            return _mapping_like(batch, {name: swap(batch[name]) for name in self.consumed})
        names, elements, container = _elements(batch)
        return container([swap(e) if name in self.consumed else e for name, e in zip(names, elements, strict=True)])


def lists_samples(batch: Any, count: int) -> bool:
    """Whether a batch of ``count`` samples is nothing but lists with one entry a sample."""
    if not isinstance(batch, Mapping | tuple | list):
        return False
    _, elements, _ = _elements(batch)
    return bool(elements) and all(isinstance(e, list | tuple) and len(e) == count for e in elements)


def map_tensors(fn: Callable[[Tensor], Any], batch: Any) -> Any:
    """``batch`` with ``fn`` applied to every tensor, also within mappings that torch's pytrees do not know."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return fn(leaf)
        if isinstance(leaf, Mapping):
            return _mapping_like(leaf, {key: map_tensors(fn, value) for key, value in leaf.items()})
        return leaf

    return pytree.tree_map(of, batch)


def joined(batches: Sequence[Any]) -> Any:
    """One batch of several: tensors end to end, what else there is as in the first.

    Raises:
        FieldError: They are not made alike, or hold a tensor that does not belong to single samples.
    """
    flat = [pytree.tree_flatten(batch) for batch in batches]
    first, tree = flat[0]
    try:
        leaves = [_joined_leaf(first_leaf, [leaves[i] for leaves, _ in flat]) for i, first_leaf in enumerate(first)]
    except (IndexError, KeyError, TypeError, RuntimeError) as error:
        raise FieldError(
            f"the samples' batches cannot be joined ({error}): the collate function must give every sample the same "
            "fields, each a tensor with one row a sample, of one shape"
        ) from error
    return pytree.tree_unflatten(leaves, tree)


def _joined_leaf(first: Any, parts: list[Any]) -> Any:
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return _mapping_like(first, {key: joined([part[key] for part in parts]) for key in first})
    return first


def leaves_of(batch: Any) -> list[Any]:
    """The leaves of a batch, also of mappings that torch's pytrees do not know."""
    found: list[Any] = []
    for leaf in pytree.tree_leaves(batch):
        found += leaves_of(list(leaf.values())) if isinstance(leaf, Mapping) else [leaf]
    return found


def _mapping_like(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """A copy of a mapping, with its attributes (a tokenizer's encodings), that holds ``values`` instead."""
    made: Any = copy.copy(batch)
    for key, value in values.items():
        made[key] = value
    return made


def _elements(batch: Any) -> tuple[list[Any], list[Any], Callable[[list[Any]], Any]]:
    """Names and values of the outermost elements, and how to put such a batch together again (which can be pickled)."""
    if isinstance(batch, Tensor):
        return [0], [batch], operator.itemgetter(0)
    kind: Any = type(batch)
    if isinstance(batch, Mapping):
        keys = list(batch)
        return keys, list(batch.values()), partial(_filled, kind, keys)
    if isinstance(batch, tuple | list):
        if hasattr(batch, "_fields"):
            return [*range(len(batch))], list(batch), partial(_spread, kind)
        return [*range(len(batch))], list(batch), kind
    raise FieldError(
        f"a batch of type {type(batch).__name__} cannot be taken apart; have the collate function return a tensor, "
        "a tuple, a list or a dict of tensors"
    )


def _filled(kind: Any, keys: list[Any], items: list[Any]) -> Any:
    return kind(dict(zip(keys, items, strict=True)))


def _spread(kind: Any, items: list[Any]) -> Any:
    return kind(*items)


def _consumed(batch: Any, names: list[Any], inputs: Inputs, arguments: Sequence[str]) -> tuple[Any, ...]:
    if inputs is None:
        if not isinstance(batch, Mapping):
            return (names[0],) if names else ()
        found = tuple(name for name in names if name in arguments)
        if not found:
            raise FieldError(
                f"none of the batch's keys {names} is an argument of the model's forward ({', '.join(arguments)}); "
                "say which the model consumes: loader(..., inputs='key')"
            )
        return found
    wanted: tuple[Any, ...] = (inputs,) if isinstance(inputs, int | str) else tuple(inputs)
    missing = [name for name in wanted if name not in names]
    if missing or not wanted:
        raise FieldError(f"inputs={inputs!r} names no element of the batch, which has {names}")
    return wanted
