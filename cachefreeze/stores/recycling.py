"""Memory for batches, used again once nobody holds it any more.

A fresh batch of some megabytes is memory that the kernel maps, fills with zeros page by page, and takes back after the
step: several times the cost of copying the rows. What is handed out here is just as fresh to its user. A block is used
again only when neither a tensor nor a view, an autograd graph or an array holds it: torch keeps the very array that a
storage was made from for as long as the storage lives, and a weak reference tells whether that array is gone. Counts
of references would not do: what they count differs between versions of Python.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
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


@final
class Recycler:
    """Uninitialised CPU tensors in memory of earlier ones. Usable from several threads; a copy begins anew.

    Attributes:
        pin: Give pinned memory, for batches that go to a CUDA device. torch uses it again, once what was copied out of
            it without waiting has run.
    """

    def __init__(self, *, pin: bool = False) -> None:
        self.pin = pin
        # each with where it is aligned, and the array within it that was handed out last
        self._blocks: deque[tuple[NDArray[np.uint8], int, weakref.ref[NDArray[np.uint8]]]] = deque()

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
            block, start, last = held
            if nbytes + _ALIGNMENT <= block.nbytes <= 2 * nbytes + _ALIGNMENT and last() is None:
                return self._handed_out(block, start, nbytes)
            self._blocks.append(held)
        block = np.empty(nbytes + _ALIGNMENT, np.uint8)
        made = self._handed_out(block, -block.ctypes.data % _ALIGNMENT, nbytes)
        while len(self._blocks) > _BLOCKS:
            self._blocks.popleft()
        return made

    def _handed_out(self, block: NDArray[np.uint8], start: int, nbytes: int) -> NDArray[np.uint8]:
        made = block[start : start + nbytes]
        self._blocks.append((block, start, weakref.ref(made)))
        return made

    def __reduce__(self) -> tuple[Callable[..., Recycler], tuple[()]]:
        return partial(Recycler, pin=self.pin), ()
