"""A batch run a few samples at a time: how many is a choice, and what the memory of a GPU allows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachefreeze.splitting.boundary import BoundaryTensor, as_tuple
from cachefreeze.tracing import Example

_LOG = logging.getLogger("cachefreeze")
# kernels for a batch of one round differently from those for more: it is computed as two
_FEWEST = 2


class Portions:
    """Runs a prefix over batches, so many samples at a time.

    Where a GPU's memory does not hold what a portion needs, portions are halved, for good. A row then comes from a
    smaller batch, as it does from the last batch of a loader: equal within what another batch size rounds.

    Attributes:
        size: Samples at a time, 2 or more; None: as many as there are.
    """

    def __init__(self, size: int | None = None) -> None:
        self.size = size

    def run(
        self, prefix: Callable[..., Any], example: Example, count: int, specs: Sequence[BoundaryTensor]
    ) -> list[Tensor]:
        """Activations of the first ``count`` samples of a batch, one tensor per boundary tensor.

        Raises:
            torch.OutOfMemoryError: Two samples are too many, or the prefix had already written into its inputs.
        """
        versions = _versions(example)
        while True:
            size = count if self.size is None else self.size
            try:
                return self._run(prefix, example, count, size, specs)
            except torch.OutOfMemoryError:
                if min(size, count) <= _FEWEST or _versions(example) != versions:
                    raise
            # out of the handler: its traceback holds what was made so far
            self.size = max(_FEWEST, min(size, count) // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # needs CUDA
            _LOG.warning(
                "the prefix ran out of memory on %d samples at once; from now on it runs on %d",
                min(size, count),
                self.size,
            )

    @staticmethod
    def _run(
        prefix: Callable[..., Any], example: Example, count: int, size: int, specs: Sequence[BoundaryTensor]
    ) -> list[Tensor]:
        if count <= size:
            made = as_tuple((example.take([0, 0]) if count == 1 else example).call(prefix))
            return [tensor.narrow(spec.batch_dim, 0, count) for tensor, spec in zip(made, specs, strict=True)]
        portions = []
        for start in range(0, count, size):
            held = min(size, count - start)
            # the last sample alone is computed as two
            taken = example.take([start + min(i, held - 1) for i in range(max(held, _FEWEST))])
            made = as_tuple(taken.call(prefix))
            portions.append([t.narrow(spec.batch_dim, 0, held) for t, spec in zip(made, specs, strict=True)])
        return [
            torch.cat(column, spec.batch_dim) for column, spec in zip(zip(*portions, strict=True), specs, strict=True)
        ]


def _versions(example: Example) -> list[int]:
    leaves = pytree.tree_leaves((example.args, example.kwargs))
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
