"""Between a boundary tensor and the row that is stored: order of dimensions, and the dtype on the way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from math import prod, sqrt

import torch
from torch import Tensor

from cachefreeze.errors import RowValueError, UsageError
from cachefreeze.stores.base import FieldSpec

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# Rows whose rounding is measured; enough for two digits, and next to nothing of a fill.
_MEASURED_ROWS = 1024


@dataclass
class Rounding:
    """What keeping rows in a narrower dtype has changed, over the first rows that were encoded.

    Attributes:
        rows: How many were measured.
    """

    rows: int = 0
    _squares: float = 0.0
    _errors: float = 0.0

    @property
    def relative(self) -> float | None:
        """Norm of the rounding over the norm of the rows; None before any was measured."""
        if not self.rows:
            return None
        return sqrt(self._errors / self._squares) if self._squares else 0.0

    def add(self, rows: Tensor, stored: Tensor) -> None:
        """Measure some rows, as they were and as they are stored, until enough are."""
        rows, stored = rows[: _MEASURED_ROWS - self.rows], stored[: _MEASURED_ROWS - self.rows]
        if not len(rows):
            return
        finite = rows.isfinite()
        exact = torch.where(finite, rows, 0).double()
        self.rows += len(rows)
        self._squares += float(exact.square().sum())
        self._errors += float((exact - torch.where(finite, stored, 0).double()).square().sum())


@dataclass(frozen=True, kw_only=True)
class RowCodec:
    """One tensor's way into the store and back.

    Attributes:
        name: Of the field that holds it.
        shape: Of one sample in the tensor that the suffix takes, without the batch dimension.
        dtype: Of the tensor that the suffix takes.
        stored: As kept; the same dtype is lossless.
        batch_dim: Where the batch dimension is in the tensor.
        layout: Dimensions of the batched tensor from slowest to fastest in memory.
        rounding: What a narrower dtype has changed so far.

    Shapes:
        tensor: ``shape`` with the batch at ``batch_dim`` <-> rows: (batch, *field.shape), contiguous.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype
    batch_dim: int = 0
    layout: tuple[int, ...] = ()
    rounding: Rounding = dataclasses.field(default_factory=Rounding, compare=False)

    @property
    def _order(self) -> tuple[int, ...]:
        """The tensor's dimensions as stored: the batch first, the rest as they lie in memory."""
        layout = self.layout or tuple(range(len(self.shape) + 1))
        return (self.batch_dim, *(d for d in layout if d != self.batch_dim))

    @cached_property
    def _inverse(self) -> list[int] | None:
        """How rows are permuted to the tensor; None where nothing moves."""
        order = self._order
        inverse = [order.index(d) for d in range(len(order))]
        return None if inverse == list(range(len(order))) else inverse

    @property
    def field(self) -> FieldSpec:
        """The field of the store that holds these rows."""
        sizes = list(self.shape)
        sizes.insert(self.batch_dim, 0)
        return FieldSpec(name=self.name, shape=tuple(sizes[d] for d in self._order[1:]), dtype=self.stored)

    def encode(self, tensor: Tensor, samples: Tensor) -> Tensor:
        """Tensor -> rows.

        Raises:
            RowValueError: A value overflows the stored dtype; names the sample.
        """
        rows = tensor.detach().permute(self._order)
        if self.stored != self.dtype:
            narrowed = rows.to(self.stored)
            self._check_overflow(rows, narrowed, samples)
            self.rounding.add(rows, narrowed)
            rows = narrowed
        return rows.contiguous()

    def decode(self, rows: Tensor) -> Tensor:
        """Rows -> tensor, in the memory format in which the prefix makes it."""
        if self.stored != self.dtype:
            rows = rows.to(self.dtype)
        return rows if self._inverse is None else rows.permute(self._inverse)

    def _check_overflow(self, rows: Tensor, narrowed: Tensor, samples: Tensor) -> None:
        lost = rows.isfinite() & ~narrowed.isfinite()
        if not bool(lost.any()):
            return
        per_row = lost.reshape(len(rows), prod(lost.shape[1:])).any(dim=1)
        sample = int(samples[per_row.to(samples.device)][0])
        largest = float(rows.abs().max())
        raise RowValueError(
            f"sample {sample} has an activation of magnitude {largest:.3g}, beyond what {self.stored} holds; keep rows "
            "in bfloat16 or float32"
        )


def stored_dtype(dtype: torch.dtype, wanted: str | torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor is kept: only floating tensors are narrowed, and never widened.

    Raises:
        UsageError: ``wanted`` is no dtype that rows can be kept in.
    """
    if wanted is None or wanted == "auto":
        return dtype
    if isinstance(wanted, str):
        if wanted not in DTYPES:
            raise UsageError(f"dtype={wanted!r}: expected one of auto, {', '.join(DTYPES)}")
        wanted = DTYPES[wanted]
    if wanted not in DTYPES.values():
        raise UsageError(f"dtype={wanted}: expected one of auto, {', '.join(DTYPES)}")
    return wanted if dtype.is_floating_point and wanted.itemsize < dtype.itemsize else dtype
