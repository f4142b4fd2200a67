"""The fields of a batch: which parts the model consumes, which tensors are stored beside its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from cachefreeze.errors import FieldError
from cachefreeze.tracing import Example

Inputs = int | str | Sequence[int] | Sequence[str] | None


class BatchLayout:
    """Which parts of a collated batch the model consumes, and which tensors are stored beside its rows.

    A batch is a tensor, or a tuple, list, named tuple or dict of trees of tensors. The consumed elements are
    elements of the outermost container.
    """

    def __init__(self, batch: Any, inputs: Inputs, arguments: Sequence[str]) -> None:
        """Read the layout from one collated batch.

        Args:
            batch: What the collate function returned.
            inputs: Index, key or keys of what the model consumes; None takes the first element of a sequence, or
                the keys that are arguments of the model's forward.
            arguments: Names of the arguments of the model's forward.
        """
        names, elements, self._container = _elements(batch)
        self._names = names
        self.consumed = _consumed(batch, names, inputs, arguments)
        by_keyword = isinstance(batch, dict) and all(name in arguments for name in self.consumed)
        self.keywords = by_keyword and inputs is None
        self._trees: dict[str, Any] = {}
        self.fields: list[tuple[str, Tensor]] = []
        for name, element in zip(names, elements, strict=True):
            if name in self.consumed:
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
            return Example((), dict(zip(self.consumed, picked, strict=True)))
        return Example(tuple(picked), {})

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
                elements.append(pytree.tree_unflatten([next(rest) for _ in range(tree.num_leaves)], tree))
        return self._container(elements)


def _elements(batch: Any) -> tuple[list[Any], list[Any], Callable[[list[Any]], Any]]:
    """Names and values of the outermost elements, and how to put such a batch together again."""
    if isinstance(batch, Tensor):
        return [0], [batch], lambda items: items[0]
    kind: Any = type(batch)
    if isinstance(batch, dict):
        keys = list(batch)
        return keys, list(batch.values()), lambda items: kind(zip(keys, items, strict=True))
    if isinstance(batch, tuple | list):
        if hasattr(batch, "_fields"):
            return [*range(len(batch))], list(batch), lambda items: kind(*items)
        return [*range(len(batch))], list(batch), lambda items: kind(items)
    raise FieldError(
        f"a batch of type {type(batch).__name__} cannot be taken apart; have the collate function return a tensor, "
        "a tuple, a list or a dict of tensors"
    )


def _consumed(batch: Any, names: list[Any], inputs: Inputs, arguments: Sequence[str]) -> tuple[Any, ...]:
    if inputs is None:
        if not isinstance(batch, dict):
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
