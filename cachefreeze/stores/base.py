"""The contract of a store: row *i* belongs to sample *i*, for ever.

A store is a fixed number of rows of a fixed set of fields. It knows nothing of models, batches or
fingerprints. Public methods own the guards; each store implements the ``_hooks`` that do the work.

Shapes:
    rows: (n,) int64 sample indices, on the CPU.
    batch[field]: (n, *FieldSpec.shape) of FieldSpec.dtype. Of a ragged field: (n, width, *FieldSpec.shape[1:]), each
        row from its first item on. What follows its last item is ignored by a write and zero after a read, whose width
        is the longest of the rows asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from cachefreeze.errors import CorruptRowError, StoreError
from cachefreeze.stores.ragged import Lengths


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One field of every row.

    Attributes:
        name: Unique within the store, e.g. ``activation.0`` or ``field.1``.
        shape: Of one row, without the batch dimension; of the longest row where they differ.
        dtype: As stored.
        lengths: Where the first dimension differs from row to row (the field is *ragged*): its size in each row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    lengths: Lengths | None = None

    @classmethod
    def ragged(
        cls, *, name: str, lengths: Sequence[int] | Tensor | Lengths, rest: tuple[int, ...], dtype: torch.dtype
    ) -> FieldSpec:
        """A field whose row *i* has shape ``(lengths[i], *rest)``; a length may be 0.

        Raises:
            StoreError: ``lengths`` are no integers ≥ 0.
        """
        known = lengths if isinstance(lengths, Lengths) else Lengths(lengths)
        return cls(name=name, shape=(known.longest, *rest), dtype=dtype, lengths=known)

    @property
    def item_bytes(self) -> int:
        """Bytes of what a row is one or many of: the row itself, or one step along the dimension that differs."""
        return prod(self.shape if self.lengths is None else self.shape[1:]) * self.dtype.itemsize

    def items(self, rows: int) -> int:
        """How many items ``rows`` rows, which are all rows of the store, have together."""
        return rows if self.lengths is None else self.lengths.total

    def batch_shape(self, rows: Tensor) -> tuple[int, ...]:
        """Shape of a batch of ``rows``, as wide as the longest of them."""
        return (
            (len(rows), *self.shape) if self.lengths is None else (len(rows), self.lengths.width(rows), *self.shape[1:])
        )

    def __str__(self) -> str:
        sizes = [str(size) for size in self.shape]
        if self.lengths is not None:
            sizes[0] = f"0..{sizes[0]}"
        return f"{self.name} ({', '.join(sizes)}) {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What a store holds: how many rows, of which fields."""

    rows: int
    fields: tuple[FieldSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows at their own lengths."""
        return sum(field.items(self.rows) * field.item_bytes for field in self.fields)


def check_spec(spec: StoreSpec) -> None:
    """Refuse a spec that no store can hold, so that every tier refuses the same.

    Raises:
        StoreError: No rows, no fields, a name twice, a row of no bytes, or lengths that do not fit shape and rows.
    """
    if spec.rows < 1:
        raise StoreError(f"rows={spec.rows}: a store holds at least one row; is the dataset empty?")
    names = [field.name for field in spec.fields]
    if not names:
        raise StoreError("fields=(): a store holds at least one field")
    if len(set(names)) != len(names):
        raise StoreError(f"fields named {names}: every field needs a name of its own")
    for field in spec.fields:
        lengths = field.lengths
        if lengths is not None and (len(lengths) != spec.rows or field.shape[:1] != (lengths.longest,)):
            raise StoreError(
                f"field {field.name!r} has shape {field.shape} and {lengths!r}, expected a length for each of "
                f"{spec.rows:,} rows, and the longest as shape[0]: build it with FieldSpec.ragged"
            )
        if any(size < 1 for size in field.shape):
            raise StoreError(f"field {field.name!r} has shape {field.shape}: a row of no bytes cannot be stored")


@dataclass(frozen=True)
class BadRow:
    """One row that does not carry the bytes that were written.

    Attributes:
        row: Index of the row.
        field: The field that is damaged, or None where only the row as a whole can be judged.
        reason: What was found.
    """

    row: int
    field: str | None
    reason: str


class Store(ABC):
    """Rows of one dataset's samples. Subclasses are final; see ``cachefreeze.testing`` for the conformance suite.

    Attributes:
        tier: ``device``, ``host``, ``hdf5`` or ``mixed``.
        spec: Rows and fields.
        device: Where :meth:`read` puts what it returns.
        writable: Whether :meth:`write` may be called.
    """

    tier: ClassVar[str]

    def __init__(self, spec: StoreSpec, device: torch.device) -> None:
        check_spec(spec)
        self.spec = spec
        self.device = device
        self.writable = True
        self.closed = False
        self._present = torch.zeros(spec.rows, dtype=torch.bool)
        self._count = 0

    @property
    def count(self) -> int:
        """Number of rows that this process knows to be present."""
        return self._count

    @property
    def full(self) -> bool:
        """Whether this process knows every row to be present."""
        return self._count == self.spec.rows

    @property
    def path(self) -> Path | None:
        """The file that holds rows of this store, if one does."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes that the rows of this store take when all are present."""
        return self.spec.nbytes

    @final
    def present(self, rows: Tensor) -> Tensor:
        """Which of ``rows`` can be read: (n,) int64 -> (n,) bool."""
        return self._looked(self._checked(rows))

    @final
    def claim(self, rows: Tensor) -> Tensor:
        """Ask for absent rows to compute and write: (n,) int64 -> (n,) bool, True where they are this process's.

        False says that the row is present, perhaps written by another process a moment ago, or that another process
        has claimed it. Nobody has to claim what it writes; those who do never compute a row twice between them. A claim
        ends when the row is written, when it is released, and with the process, however that ends.

        Raises:
            StoreError: The store is closed or read-only.
        """
        rows = self._checked(rows)
        self._require_writable()
        return self._claim(rows)

    @final
    def release(self, rows: Tensor) -> None:
        """Give up claims on rows that will not be written; harmless for rows that are not claimed."""
        self._release(self._checked(rows))

    @final
    def write(self, rows: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Store one row per index; a row counts as present only once all its fields are in place.

        Raises:
            StoreError: The store is closed or read-only, or ``batch`` does not fit the spec.
        """
        rows = self._checked(rows)
        self._check_write(rows, batch)
        if len(rows):
            self._write(rows, batch)
            self._mark(rows, present=True)

    def _check_write(self, rows: Tensor, batch: Mapping[str, Tensor]) -> None:
        self._require_writable()
        expected = {field.name for field in self.spec.fields}
        if set(batch) != expected:
            raise StoreError(f"write() got fields {sorted(batch)}, expected {sorted(expected)}: a row is written whole")
        for field in self.spec.fields:
            _check_fits(batch[field.name], field, rows)
        if len(set(rows.tolist())) != len(rows):
            raise StoreError("write() got the same row twice in one batch; a row belongs to one sample")

    @final
    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """Gather rows into a fresh batch that the caller may write into.

        Raises:
            StoreError: A row is absent, or the store is closed.
            CorruptRowError: A row failed its checksum; it is absent from now on.
        """
        rows = self._checked(rows)
        if not self.full:
            here = self._looked(rows)
            if not here.all():
                absent = rows[~here]
                raise StoreError(
                    f"row {int(absent[0])} is absent ({len(absent)} of {len(rows)} asked for): fill it first"
                )
        try:
            return self._read(rows)
        except CorruptRowError as error:
            self.forget(torch.tensor(error.rows, dtype=torch.int64))
            raise

    @final
    def forget(self, rows: Tensor) -> None:
        """Mark rows absent for this process, so that they are computed again."""
        rows = self._checked(rows)
        self._mark(rows, present=False)
        self._forget(rows)

    @final
    def expect(self, rows: Tensor) -> None:
        """Say which rows will soon be read, so that a disk begins to read them; a hint, from any thread."""
        self._expect(torch.from_numpy(np.unique(self._checked(rows).numpy())))

    def commit(self) -> None:
        """Return once every row written so far survives a loss of power, where the tier can promise that."""
        self._require_open()

    def verify(self) -> list[BadRow]:
        """Compare every present row with its checksum; stores without checksums have nothing to compare."""
        self._require_open()
        return []

    def close(self) -> None:
        """Release what the store holds. A closed store refuses every call; closing twice is harmless."""
        self.closed = True

    @abstractmethod
    def _write(self, rows: Tensor, batch: Mapping[str, Tensor]) -> None: ...

    @abstractmethod
    def _read(self, rows: Tensor) -> dict[str, Tensor]: ...

    # Hooks that a store needs only where other processes share its rows.

    def _look(self, rows: Tensor) -> None:  # noqa: B027
        """Mark those of ``rows`` present that another process has written; a store in memory has no other."""

    def _expect(self, rows: Tensor) -> None:  # noqa: B027
        """Begin to read rows, each once and in order; memory has nothing to begin with."""

    def _forget(self, rows: Tensor) -> None:  # noqa: B027
        """Do what else is needed for ``rows`` to stay absent."""

    def _claim(self, rows: Tensor) -> Tensor:
        return ~self._present[rows]

    def _release(self, rows: Tensor) -> None:  # noqa: B027
        """Let other processes claim ``rows``."""

    @final
    def _mark(self, rows: Tensor, *, present: bool) -> None:
        """Note that ``rows``, some of them maybe twice, are present or absent."""
        held, index = self._present.numpy(), rows.numpy()
        changed = np.unique(index[held[index] != present])
        held[changed] = present
        self._count += len(changed) if present else -len(changed)

    def _looked(self, rows: Tensor) -> Tensor:
        here = self._present[rows]
        if not here.all():
            self._look(rows[~here])
            here = self._present[rows]
        return here

    def _require_writable(self) -> None:
        if not self.writable:
            raise StoreError(f"this {self.tier} store is read-only: open it where its file may be written")

    def _require_open(self) -> None:
        if self.closed:
            raise StoreError(f"this {self.tier} store is closed; open it again before use")

    def _checked(self, rows: Tensor) -> Tensor:
        self._require_open()
        if rows.dtype != torch.int64 or rows.dim() != 1 or not rows.is_cpu:
            raise StoreError(
                f"rows must be a 1-d int64 tensor on the CPU, got {rows.dim()}-d {rows.dtype} on {rows.device}"
            )
        if len(rows) and beyond(rows, self.spec.rows):
            raise StoreError(f"rows must lie in 0..{self.spec.rows - 1}, got {int(rows.min())}..{int(rows.max())}")
        return rows


def beyond(rows: Tensor, count: int) -> bool:
    """Whether any of (n,) int64, at least one, is not in 0..count - 1: a negative one, unsigned, is larger than all."""
    return int(rows.numpy().view(np.uint64).max()) >= count  # numpy compares with an int of Python's slowly


def _check_fits(got: Tensor, field: FieldSpec, rows: Tensor) -> None:
    wanted = field.batch_shape(rows)
    if field.lengths is None:
        fits, why = got.shape == wanted, "rows of a store have one shape and dtype"
    else:
        fits = (
            got.dim() == len(wanted)
            and got.shape[1] >= wanted[1]
            and (len(got), *got.shape[2:]) == (len(rows), *wanted[2:])
        )
        why = "a ragged field comes padded on the right, at least as wide as the longest of the rows"
    if not fits or got.dtype != field.dtype:
        raise StoreError(
            f"field {field.name!r} got {tuple(got.shape)} {got.dtype}, expected {wanted} {field.dtype}: {why}"
        )
