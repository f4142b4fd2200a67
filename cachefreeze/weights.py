"""Whether weights and buffers are what they were, down to the last byte: asked at the start of every pass.

Version counters do not tell: what is written through ``.data``, NumPy or another library's kernel moves none. So every
byte is read. What is saved is all else: the memory of the tensors is found once, and read where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from cachefreeze.fingerprint import tensor_bytes

# Elements of a tensor on a device that are summed at a time, which bounds the memory that the sum takes.
_SUMMED = 1 << 24


class WeightWatch:
    """What the weights and buffers of a module held when this was made.

    On the CPU each is digested (xxh3_64, which reads memory as fast as it comes); elsewhere summed where it lies, so
    that only a number crosses to the CPU.
    """

    def __init__(self, module: nn.Module) -> None:
        self._tensors = held(module)
        self._places = _places(self._tensors)
        here = [(tensor, _view(tensor)) for tensor in self._tensors if tensor.is_cpu]
        self._dense = [view for _, view in here if view is not None]
        self._gapped = [tensor for tensor, view in here if view is None]
        self._elsewhere = [tensor for tensor in self._tensors if not tensor.is_cpu]
        self._sums = self._measure()

    def changed(self, tensors: Sequence[Tensor]) -> bool:
        """Whether what is :func:`held` now are other tensors, lie elsewhere (perhaps with equal values), or changed."""
        if len(tensors) != len(self._tensors) or not all(map(is_, tensors, self._tensors)):
            return True
        return _places(tensors) != self._places or self._measure() != self._sums

    def _measure(self) -> list[int]:
        found = [xxhash.xxh3_64_intdigest(view) for view in self._dense]
        found += [xxhash.xxh3_64_intdigest(tensor_bytes(tensor)) for tensor in self._gapped]
        return found + (torch.stack([*map(position_sum, self._elsewhere)]).tolist() if self._elsewhere else [])


def held(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, without the names that torch would put together for each."""
    found: list[Tensor | None] = []
    waiting: list[nn.Module | None] = [module]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            found += one._parameters.values()
            found += one._buffers.values()
            waiting += one._modules.values()
    return [tensor for tensor in found if tensor is not None]


def position_sum(tensor: Tensor) -> Tensor:
    """() int64, on the tensor's device: the sum of its elements' bits, each times an odd number of its position.

    Modulo 2^64 an odd factor loses nothing, so that any change of one element changes the sum; of several at once,
    a change goes unseen with a probability of about 2^-32 or less.

    Shapes:
        tensor: any shape and dtype.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    step = len(flat) | int(flat.storage_offset())  # a wider view must begin and end where its elements do
    wide = torch.int64 if step % 8 == 0 else torch.int32 if step % 4 == 0 else torch.uint8
    elements = flat.view(wide)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for first in range(0, len(elements), _SUMMED):
        part = elements[first : first + _SUMMED]
        odd = torch.arange(first, first + len(part), device=tensor.device).mul_(2).add_(1)
        # squared, since equal steps up and down the line would cancel under factors that rise evenly
        total += odd.mul_(odd).mul_(part.to(torch.int64)).sum()
    return total


def _places(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Where tensors' values lie."""
    return [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]


def _view(tensor: Tensor) -> memoryview | None:
    """The memory of a dense tensor on the CPU in the order in which it lies; None where it has gaps."""
    if not tensor.numel():
        return None
    detached = tensor.detach()
    order = sorted(range(detached.dim()), key=detached.stride, reverse=True)
    dense = detached.permute(order)
    return tensor_bytes(dense) if dense.is_contiguous() else None
