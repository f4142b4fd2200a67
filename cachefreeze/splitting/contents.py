"""What is in the tensors of a forward: ids and masks alone, or as much as values of the batch decide."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

# What makes tensors whose size follows from what is in another, and what reads a size.
_SIZED = frozenset({"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"})
SIZES = frozenset({"shape", "size", "__len__", "numel", "nelement"})
# What makes a Python value of a tensor's contents: control flow may follow from a whole batch.
READS = frozenset({
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__",
    "__contains__", "equal", "allclose", "is_nonzero",
})  # fmt: skip
# What takes nothing but shape, type and device of its first tensor, and of all but its first.
_SHAPE_ONLY = frozenset({
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
})  # fmt: skip
_SHAPED_AS_OTHERS = frozenset({"type_as", "expand_as", "view_as", "reshape_as", "to"})


def contents_read(name: str, given: list[Tensor]) -> list[Tensor]:
    """Those of an operation's tensors of which it takes more than shape, type and device."""
    if name in _SHAPE_ONLY:
        return given[1:]
    return given[:1] if name in _SHAPED_AS_OTHERS else given


class Contents:
    """Follows from operation to operation what the contents of tensors come from; holds none of them."""

    def __init__(self) -> None:
        self._pure = _Tensors()  # what comes from ids and masks alone
        self._masks = _Tensors()  # what comes from masks (zeros and ones) alone
        self._sized = _Tensors()  # what has a size that follows from what is in it

    def take_input(self, leaf: Tensor, *, mask: bool) -> None:
        """Know an input of the model: integers are ids, or a mask."""
        if not leaf.is_floating_point() and not leaf.is_complex():
            self._pure.add([leaf])
            if mask:
                self._masks.add([leaf])

    def is_pure(self, tensor: Tensor) -> bool:
        """Whether a tensor comes from ids and masks alone."""
        return tensor in self._pure

    def has_sized(self, tensors: list[Tensor]) -> bool:
        """Whether the size of one of some tensors follows from values of the batch."""
        return any(leaf in self._sized for leaf in tensors)

    def follow_sizes(self, name: str, given: list[Tensor], depend: list[Tensor], made: list[Tensor]) -> None:
        """Know tensors whose size follows from values of the batch; what masks alone decide is checked by its rows.

        Args:
            name: Of the operation.
            given: Its tensors.
            depend: Those of them that depend on the model's inputs.
            made: What it returned.
        """
        deciding = given[:1] if name in _SIZED else []
        if name == "__getitem__":
            deciding = [leaf for leaf in given[1:] if leaf.dtype == torch.bool]
        of_values = {id(leaf) for leaf in depend if leaf not in self._masks}
        if any(id(leaf) in of_values for leaf in deciding) or self.has_sized(given):
            self._sized.add(made)

    def follow(self, name: str, given: list[Tensor], depend: list[Tensor], results: list[Tensor]) -> bool:
        """Know what an operation made or wrote; whether it saw masks alone."""
        pure, masks = (
            bool(depend) and (name in _SHAPE_ONLY or all(leaf in known for leaf in depend))
            for known in (self._pure, self._masks)
        )
        if not any(isinstance(leaf, nn.Parameter) for leaf in given):
            self._pure.add(results if pure else [])
            self._masks.add(results if masks else [])
        return masks


def is_mask(leaf: Tensor) -> bool:
    """Whether all is zero or one."""
    return bool(((leaf == 0) | (leaf == 1)).all())


class _Tensors:
    """A set of tensors by identity, for as long as they live."""

    def __init__(self) -> None:
        self._held: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()

    def add(self, tensors: Iterable[Tensor]) -> None:
        self._held.update((tensor, True) for tensor in tensors)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._held
