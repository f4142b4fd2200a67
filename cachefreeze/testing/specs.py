"""What stores are tested with: specs of every kind, what is written into their rows, and equality of batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cachefreeze.stores.base import FieldSpec, StoreSpec

ROWS = 12
DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip


def one_field(shape: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float32, rows: int = ROWS) -> StoreSpec:
    """A spec with a single field ``activation.0``."""
    return StoreSpec(rows=rows, fields=(FieldSpec(name="activation.0", shape=shape, dtype=dtype),))


def every_dtype(rows: int = ROWS) -> StoreSpec:
    """A spec with one field per dtype, of rank 0, 1 and 2 in turn; rows are of no aligned size."""
    shapes = ((), (3,), (2, 5))
    return StoreSpec(
        rows=rows,
        fields=tuple(
            FieldSpec(name=f"field.{at}", shape=shapes[at % 3], dtype=dtype) for at, dtype in enumerate(DTYPES)
        ),
    )


def lengths_of(rows: int = ROWS) -> list[int]:
    """Lengths with neighbours that are equal, longest, and empty; the first and the last row are not the longest."""
    return [(2, 5, 0, 1, 1, 7, 0)[row % 7] for row in range(rows)]


def one_ragged(rest: tuple[int, ...] = (3,), dtype: torch.dtype = torch.float32, rows: int = ROWS) -> StoreSpec:
    """A spec with a single ragged field ``activation.0``, some of whose rows are empty."""
    return StoreSpec(
        rows=rows,
        fields=(FieldSpec.ragged(name="activation.0", lengths=lengths_of(rows), rest=rest, dtype=dtype),),
    )


def every_kind(rows: int = ROWS) -> StoreSpec:
    """The fields of :func:`every_dtype`, and ragged ones: two that share their lengths, one that does not."""
    lengths = lengths_of(rows)
    ragged = (
        FieldSpec.ragged(name="ragged.0", lengths=lengths, rest=(3,), dtype=torch.bfloat16),
        FieldSpec.ragged(name="ragged.1", lengths=lengths, rest=(), dtype=torch.bool),
        FieldSpec.ragged(name="ragged.2", lengths=range(1, rows + 1), rest=(2, 1), dtype=torch.float64),
    )
    return StoreSpec(rows=rows, fields=(*every_dtype(rows).fields, *ragged))


def values(spec: StoreSpec, rows: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """What tests write into ``rows``: depends on row, field and seed, so that no mix-up goes unseen.

    Ragged rows are padded with zeros to the longest of ``rows``: this is also what a read returns.
    """
    batch = {}
    for at, field in enumerate(spec.fields):
        whole = torch.empty((spec.rows, *field.shape), dtype=torch.float64)
        whole.uniform_(-100, 100, generator=torch.Generator().manual_seed(1000 * seed + at))
        whole = whole[rows]
        if field.lengths is not None:
            width = field.lengths.width(rows)
            whole = whole[:, :width]
            whole[~field.lengths.mask(rows, width)] = 0
        if field.dtype == torch.bool:
            batch[field.name] = whole > 0
        elif field.dtype == torch.uint8:
            batch[field.name] = whole.abs().to(torch.uint8)
        else:
            batch[field.name] = whole.to(field.dtype)
    return batch


def with_rubbish(spec: StoreSpec, rows: Tensor, batch: Mapping[str, Tensor], more: int = 2) -> dict[str, Tensor]:
    """``batch`` with ragged fields ``more`` items wider, and ones where they hold padding."""
    result = {}
    for field in spec.fields:
        result[field.name] = batch[field.name]
        if field.lengths is not None:
            narrow = batch[field.name]
            wide = torch.ones((len(rows), narrow.shape[1] + more, *narrow.shape[2:]), dtype=field.dtype)
            inside = field.lengths.mask(rows, wide.shape[1])
            wide[inside] = narrow[field.lengths.mask(rows, narrow.shape[1])]
            result[field.name] = wide
    return result


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal names, shapes, dtypes and bits."""
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        have = got[name].cpu()
        assert have.dtype == want.dtype, name
        assert have.shape == want.shape, name
        # bits and not values: a NaN must come back as the NaN it was
        assert torch.equal(_bits(have), _bits(want)), name


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def rows_of(*rows: int) -> Tensor:
    """Row indices as stores take them."""
    return torch.tensor(rows, dtype=torch.int64)
