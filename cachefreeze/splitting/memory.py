"""Which values the memory of a tensor holds, seen below torch functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cachefreeze.splitting.contents import contents_read


class Region:
    """Where a tensor's memory is, known until it is freed: then its address comes back with another tensor.

    Attributes:
        address: Where it begins.
    """

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.address = storage.data_ptr()
        self._storage = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        # what torch has not allocated (an array of numpy) may outlive this storage and come back in another one
        self._held = None if storage.resizable() else storage

    @property
    def lives(self) -> bool:
        """Whether the memory is still that of the tensor, or of others that share it."""
        return not self._storage.expired()  # type: ignore[no-untyped-call]


class Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which values a tensor's memory holds: for tensors that no torch function was seen to make (vmap, raw ops)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._holds: dict[int, tuple[Region, frozenset[int]]] = {}

    def of(self, tensor: Tensor) -> frozenset[int]:
        """Numbers of the values that went into a tensor's memory."""
        found = self._holds.get(address_of(tensor))
        return found[1] if found is not None and found[0].lives else frozenset()

    def note(self, tensor: Tensor, numbers: frozenset[int]) -> Region | None:
        """From now on a tensor's memory, which is returned, holds these values; None where it has none of its own."""
        if not address_of(tensor):
            return None
        region = Region(tensor)
        self._holds[region.address] = region, numbers
        return region

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        read = contents_read(func._overloadpacket.__name__, given)
        numbers = frozenset[int]().union(*(self.of(leaf) for leaf in read))
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
