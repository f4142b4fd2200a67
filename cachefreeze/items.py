"""A dataset's item as bytes and back: what a dataset gave, kept so that the user's own collate function can take it.

An item is a tree of tensors, numpy arrays and plain Python values. Its bytes are a JSON list with one entry per leaf
(a plain value itself, an array's shape), a zero byte where arrays follow, and the arrays' bytes one after another.
Nothing of it is code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachefreeze.errors import FieldError
from cachefreeze.fingerprint import tensor_bytes

_END = b"\0"  # JSON escapes it within texts
_PLAIN = (bool, int, float, str, type(None))


class ItemCodec:
    """Items of one dataset, all of the same structure, and their bytes.

    Lists of plain values are leaves as they are, so that they may differ in length. Values come back with their own
    types; what cannot is refused.
    """

    def __init__(self, item: Any) -> None:
        """Read the structure from one item.

        Raises:
            FieldError: A leaf is neither a tensor, an array nor a plain value.
        """
        leaves, self._tree = _flatten(item)
        self._kinds = [_kind(leaf) for leaf in leaves]
        paths, _ = pytree.tree_flatten_with_path(_opened(item), is_leaf=is_plain)
        self._names = [pytree.keystr(path) or "the item" for path, _ in paths]
        self._mapping: Any = type(item) if isinstance(item, Mapping) and type(item) is not dict else None
        for name, leaf, kind in zip(self._names, leaves, self._kinds, strict=True):
            if kind is None:
                raise FieldError(
                    f"{name} of a dataset's item is {type(leaf).__name__}, which cannot be kept as it is given: "
                    "samples of different lengths are kept raw and collated anew for every batch. Have the dataset "
                    "return tensors, numpy arrays, numbers, texts or lists of them"
                )

    def encode(self, item: Any) -> bytes:
        """The bytes of an item.

        Raises:
            FieldError: It has another structure or other types than the first item.
        """
        leaves, tree = _flatten(item)
        kinds = [_kind(leaf) for leaf in leaves]
        if tree != self._tree or kinds != self._kinds:
            found = ", ".join(str(kind) for kind in kinds)
            raise FieldError(
                f"the items of the dataset differ in structure: expected leaves {', '.join(map(str, self._kinds))} as "
                f"in the first item, got {found}; give all items the same keys and types"
            )
        head: list[Any] = []
        blocks: list[bytes] = []
        for leaf in leaves:
            data = _data(leaf)
            head.append(leaf if data is None else list(leaf.shape))
            if data is not None:
                blocks.append(data)
        text = json.dumps(head, separators=(",", ":")).encode()
        return text + _END + b"".join(blocks) if blocks else text

    def decode(self, data: bytes) -> Any:
        """The item of some bytes; zero bytes after them are ignored."""
        text, _, rest = data.partition(_END)
        leaves = json.loads(text)
        start = 0
        for i, kind in enumerate(self._kinds):
            if isinstance(kind, _Array):
                shape = leaves[i]
                end = start + prod(shape) * kind.itemsize
                leaves[i] = kind.rebuild(rest[start:end], shape)
                start = end
        item = pytree.tree_unflatten(leaves, self._tree)
        return item if self._mapping is None else self._mapping(item)


class _Array:
    """A kind of array: a tensor, a numpy array or a numpy number of one dtype."""

    def __init__(self, kind: type, dtype: Any) -> None:
        self.kind = kind
        self.dtype = dtype
        self.itemsize: int = dtype.itemsize

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Array) and (self.kind, self.dtype) == (other.kind, other.dtype)

    def __hash__(self) -> int:
        return hash((self.kind, self.dtype))

    def __str__(self) -> str:
        return f"{self.kind.__name__} of {self.dtype}"

    def rebuild(self, data: bytes, shape: list[int]) -> Any:
        """Writable memory of its own, as a dataset's item has."""
        if self.kind is Tensor:
            flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            return flat.view(self.dtype).reshape(shape)
        array = np.frombuffer(data, self.dtype).reshape(shape).copy()
        return array if self.kind is np.ndarray else array[()]


def _kind(leaf: Any) -> _Array | str | None:
    """What has to be equal between items; None for what cannot be kept."""
    if type(leaf) is Tensor and leaf.layout == torch.strided:
        return _Array(Tensor, leaf.dtype)
    if isinstance(leaf, np.generic) or type(leaf) is np.ndarray:
        plain = leaf.dtype.kind in "biufc" and leaf.dtype.isnative
        return _Array(np.generic if isinstance(leaf, np.generic) else np.ndarray, leaf.dtype) if plain else None
    return "a plain value" if is_plain(leaf) else None


def _data(leaf: Any) -> bytes | None:
    """The bytes of an array; None for a plain value."""
    if isinstance(leaf, Tensor):
        return bytes(tensor_bytes(leaf))
    return leaf.tobytes() if isinstance(leaf, np.generic | np.ndarray) else None


def is_plain(value: Any) -> bool:
    """A number, text or None, or a list of such or of such lists: JSON gives them back as they were."""
    if type(value) is list:
        return all(type(item) in _PLAIN for item in value) or all(is_plain(item) for item in value)
    return type(value) in _PLAIN


def _opened(item: Any) -> Any:
    """A tokenizer's encoding is a mapping that torch's pytrees do not know."""
    return dict(item) if isinstance(item, Mapping) and not isinstance(item, dict) else item


def _flatten(item: Any) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten(_opened(item), is_leaf=is_plain)
