"""An order of samples that is random and reads a file in long stretches.

Rows in a wholly random order are single small reads, which a disk serves at a fraction of its rate. Blocks of
neighbouring rows in a random order, a few of them mixed, are read at nearly the rate of reading in order. What is lost:
samples of one block meet in the same few batches, in other company every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import final

import torch
from torch.utils.data import Sampler

from cachefreeze.errors import UsageError


@final
class BlockShuffleSampler(Sampler[int]):
    """Every sample once: blocks in random order, the samples of ``mixed`` blocks shuffled together.

    For HDF5 caches that are larger than memory. It draws one seed at the beginning of a pass and nothing after that, so
    that the next batch can be read ahead.

    Args:
        data: The dataset; only its length is asked for.
        block: Samples in a block. Some 16 MiB of rows are enough for a disk.
        mixed: Blocks whose samples are shuffled together; their rows are what memory must hold.
        generator: Gives the seed; None takes torch's own.

    Raises:
        UsageError: ``block`` or ``mixed`` is less than 1.
    """

    def __init__(self, data: Sized, block: int, mixed: int = 4, *, generator: torch.Generator | None = None) -> None:
        if block < 1 or mixed < 1:
            raise UsageError(f"block={block}, mixed={mixed}: expected 1 or more samples in a block, and blocks")
        self.data = data
        self.block = block
        self.mixed = mixed
        self.generator = generator

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))
        draw = torch.Generator().manual_seed(seed)
        count = len(self.data)
        blocks = torch.randperm(-(-count // self.block), generator=draw)
        for start in range(0, len(blocks), self.mixed):
            group = blocks[start : start + self.mixed]
            rows = (group[:, None] * self.block + torch.arange(self.block)).flatten()
            rows = rows[rows < count]
            yield from rows[torch.randperm(len(rows), generator=draw)].tolist()
