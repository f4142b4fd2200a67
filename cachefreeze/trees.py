"""Trees of values: what pytree knows, and dataclasses and plain objects that hold tensors besides.

Models return dataclasses, and hand objects that hold tensors from one module to the next; pytree takes those that
nobody registered for leaves.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

CONSTANTS = (int, float, complex, bool, str, bytes, type(None), slice, range, type)


class Structure:
    """What is left of a value when its leaves are taken out.

    Attributes:
        leaf_count: Number of leaves.
    """

    leaf_count: int

    def __init__(
        self, key: Any, children: Sequence[Structure] = (), make: Callable[[list[Any]], Any] | None = None
    ) -> None:
        self._key = key
        self._children = tuple(children)
        self._make = make
        self.leaf_count = 1 if make is None else sum(child.leaf_count for child in self._children)

    def build(self, leaves: Sequence[Any]) -> Any:
        """The value with these leaves, in the order of :func:`flatten`."""
        if self._make is None:
            return leaves[0]
        at, made = 0, []
        for child in self._children:
            made.append(child.build(leaves[at : at + child.leaf_count]))
            at += child.leaf_count
        return self._make(made)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self._key == other._key and self._children == other._children

    def __hash__(self) -> int:
        return hash((len(self._children), self.leaf_count))


_LEAF = Structure(None)


def flatten(value: Any) -> tuple[list[Any], Structure]:
    """Leaves of a value in order, and how to put it together again."""
    found: list[Any] = []
    return found, _flatten(value, found, [])


def leaves(value: Any) -> list[Any]:
    """Leaves of a value in order."""
    return flatten(value)[0]


def tensors(value: Any) -> list[Tensor]:
    """The tensors among a value's leaves."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The same value with every leaf replaced."""
    found, structure = flatten(value)
    return structure.build([function(leaf) for leaf in found])


def is_generation_cache(value: Any) -> bool:
    """Whether a value is the key-value cache that a language model returns for generating the next token.

    It holds what every layer computed, frozen ones included, and training has no use for it. A library that is not
    imported cannot have made one, so none is imported here.
    """
    library = sys.modules.get("transformers.cache_utils")
    return library is not None and isinstance(value, library.Cache)


def without_generation_caches(value: Any) -> Any:
    """The same output with None in place of key-value caches."""
    found, structure = flatten(value)
    if not any(is_generation_cache(leaf) for leaf in found):
        return value
    return structure.build([None if is_generation_cache(leaf) else leaf for leaf in found])


def _flatten(value: Any, found: list[Any], above: list[Any]) -> Structure:
    if isinstance(value, (Tensor, *CONSTANTS)) or any(value is other for other in above):
        found.append(value)
        return _LEAF
    kind = type(value)
    itself = id(value)  # pytree keeps its is_leaf in a cycle, in which value would outlive everything else
    children, spec = pytree.tree_flatten(value, is_leaf=lambda inner: id(inner) != itself)
    if not (len(children) == 1 and children[0] is value):
        inner = [_flatten(child, found, [*above, value]) for child in children]
        return Structure(str(spec), inner, lambda made: pytree.tree_unflatten(made, spec))
    if is_generation_cache(value) or not _holds_tensors(value):
        found.append(value)
        return _LEAF
    names = sorted(vars(value))
    inner = [_flatten(vars(value)[name], found, [*above, value]) for name in names]

    def make(made: list[Any]) -> Any:
        fresh = object.__new__(kind)
        fresh.__dict__.update(zip(names, made, strict=True))
        return fresh

    return Structure((kind, tuple(names)), inner, make)


def _holds_tensors(value: Any) -> bool:
    """Whether an object is a mere holder of tensors: a dataclass, or attributes some of which are or hold tensors."""
    if not hasattr(value, "__dict__") or isinstance(value, nn.Module | type) or callable(value):
        return False
    if dataclasses.is_dataclass(value):
        return True
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(list(vars(value).values())))
