"""Which values the memory of a tensor holds, seen below torch functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which values a tensor's memory holds: for tensors that no torch function was seen to make (vmap, raw ops)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._holds: dict[int, frozenset[int]] = {}
        self._kept: list[Any] = []

    def of(self, tensor: Tensor) -> frozenset[int]:
        """Numbers of the values that went into a tensor's memory."""
        return self._holds.get(address_of(tensor), frozenset())

    def note(self, tensor: Tensor, numbers: frozenset[int]) -> None:
        """From now on a tensor's memory holds these values."""
        address = address_of(tensor)
        if address:
            self._holds[address] = numbers
            self._kept.append(tensor.untyped_storage())  # or the address would come back

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        numbers = frozenset[int]().union(*(self.of(leaf) for leaf in given))
        if numbers:
            made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            for leaf in made if not func._schema.is_mutable else (*made, *given[:1]):
                self.note(leaf, self.of(leaf) | numbers)
        return result


def address_of(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 where it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse tensors and functorch's wrappers have no memory of their own
        return 0
