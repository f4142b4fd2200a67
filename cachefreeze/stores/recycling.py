"""Memory for batches, used again once nobody holds it any more.

A fresh batch of some megabytes is memory that the kernel maps, fills with zeros page by page, and takes back after the
step: several times the cost of copying the rows. What is handed out here is just as fresh to its user. A block is used
again only when neither a tensor nor a view, an autograd graph or an array holds it, which its reference count tells:
torch keeps a reference to the array that a storage lies in for as long as the storage lives.
"""

from __future__ import annotations

import sys
from collections import deque
from math import prod
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Below, the allocator has memory at hand, and the look for a block costs as much as it saves.
_LEAST_BYTES = 1 << 20
# One that the step still holds, one for the next batch, one for what holds a batch longer (a graph that is kept).
_BLOCKS = 3
# As torch aligns its own memory: kernels may sum in another order elsewhere.
_ALIGNMENT = 64
# References to a block that nobody else holds: its place in the pool, the local name, the argument of getrefcount.
_ALONE = 3


@final
class Recycler:
    """Uninitialised CPU tensors in memory of earlier ones. Usable from several threads; a copy begins anew.

    Attributes:
        pin: Give pinned memory, for batches that go to a CUDA device. torch uses it again, once what was copied out of
            it without waiting has run.
    """

    def __init__(self) -> None:
        self.pin = False
        # each with where it is aligned
        self._blocks: deque[tuple[NDArray[np.uint8], int]] = deque()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As ``torch.empty``; what it holds is rubbish."""
        if self.pin:  # needs CUDA
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        nbytes = prod(shape) * dtype.itemsize
        if nbytes < _LEAST_BYTES:
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(self._memory(nbytes)).view(dtype).view(shape)

    def _memory(self, nbytes: int) -> NDArray[np.uint8]:
        for _ in range(len(self._blocks)):
            try:
                held = self._blocks.popleft()  # out of the queue no other thread sees it
            except IndexError:
                break
            block, start = held
            fits = nbytes + _ALIGNMENT <= block.nbytes <= 2 * nbytes + _ALIGNMENT
            found = block[start : start + nbytes] if fits and sys.getrefcount(block) == _ALONE else None
            self._blocks.append(held)
            if found is not None:
                return found
        block = np.empty(nbytes + _ALIGNMENT, np.uint8)
        start = -block.ctypes.data % _ALIGNMENT
        self._blocks.append((block, start))
        while len(self._blocks) > _BLOCKS:
            self._blocks.popleft()
        return block[start : start + nbytes]

    def __reduce__(self) -> tuple[type[Recycler], tuple[()]]:
        return Recycler, ()
