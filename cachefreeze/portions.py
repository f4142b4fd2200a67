"""A batch run a few samples at a time: how many is a choice, what memory allows, or what is sooner and the same."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachefreeze.splitting.boundary import BoundaryTensor, as_tuple
from cachefreeze.tracing import Example

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_LOG = logging.getLogger("cachefreeze")
# kernels for a batch of one round differently from those for more: it is computed as two
_FEWEST = 2
# Samples at a time that are tried in place of a whole batch. The trial takes about as long as a batch takes then, so
# there must be some batches in which it can pay, and much to gain.
_FEW = 4
_FEWEST_BATCHES = 3
_WORTHWHILE = 0.7
# At most what a page takes that is mapped anew: 2 us in a virtual machine (MobileNetV2 and ResNet-50, 4 samples against
# 32), less on others. What spends less than what there is to gain on it is not tried.
_PAGE_SECONDS = 3e-6


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


class EqualPortions:
    """Batches on a CPU, a few samples at a time where that makes bit for bit the same rows, and sooner.

    The memory of a whole batch's activations is mapped and unmapped at every layer (half to three quarters of the time
    of a MobileNetV2 at 224 px and 32 samples), that of a few samples is not. Which kernels run, and in which order they
    add, follows from shapes and the number of threads: so the first batch of a size that maps much is made in both ways
    and every row of it compared.
    """

    def __init__(self) -> None:
        self._whole = Portions()
        self._found: dict[tuple[int, int], Portions] = {}  # by samples and threads

    def run(
        self,
        prefix: Callable[..., Any],
        example: Example,
        count: int,
        specs: Sequence[BoundaryTensor],
        ahead: int,
    ) -> list[Tensor]:
        """Activations of the first ``count`` samples of a batch, as :meth:`Portions.run` makes them of all at once.

        Args:
            prefix: Makes them.
            example: Samples of one shape, the same in every call.
            count: Samples.
            specs: Of the activations.
            ahead: Rows that are to be made in all.
        """
        key = count, torch.get_num_threads()
        portions = self._found.get(key)
        if portions is not None:
            return portions.run(prefix, example, count, specs)
        if count < 2 * _FEW or ahead < _FEWEST_BATCHES * count or self._whole.size is not None:
            return self._whole.run(prefix, example, count, specs)
        given = example.fresh()  # a prefix may write into what it is given
        pages, began = _pages_mapped(), time.perf_counter()
        rows = self._whole.run(prefix, example, count, specs)
        seconds, pages = time.perf_counter() - began, _pages_mapped() - pages
        if self._whole.size is None:  # all at once, as it was meant to be
            tried = resource is None or pages * _PAGE_SECONDS > (1 - _WORTHWHILE) * seconds
            self._found[key] = self._chosen(prefix, given, count, specs, rows, seconds) if tried else self._whole
        return rows

    def _chosen(
        self,
        prefix: Callable[..., Any],
        example: Example,
        count: int,
        specs: Sequence[BoundaryTensor],
        rows: list[Tensor],
        seconds: float,
    ) -> Portions:
        """How batches of this size are run from now on."""
        few = Portions(_FEW)
        for start in range(0, count, _FEW):
            held = min(_FEW, count - start)
            taken = example.take(list(range(start, start + held)))
            began = time.perf_counter()
            made = few.run(prefix, taken, held, specs)
            each = (time.perf_counter() - began) / held
            pairs = zip(made, rows, specs, strict=True)
            if not all(torch.equal(one, whole.narrow(spec.batch_dim, start, held)) for one, whole, spec in pairs):
                return self._whole
            if start == _FEW and each * count > _WORTHWHILE * seconds:  # the first call of a shape is slower
                return self._whole
        return few


def _pages_mapped() -> int:
    """Pages of memory that this process was given since it began; 0 where the system does not tell."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _versions(example: Example) -> list[int]:
    leaves = pytree.tree_leaves((example.args, example.kwargs))
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
