"""Where everything lies in a cache file, and what of it is data.

Bytes are either *data*, which a row's own checksum covers, or *description* (the header, HDF5's metadata, the lengths
of ragged rows, padding), which the header's CRC and one SHA-256 cover.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from cachefreeze.errors import StoreError
from cachefreeze.stores.base import StoreSpec, check_spec

HEADER_BYTES = 65536  # an HDF5 user block: a power of two from 512 on
ALIGNMENT_BYTES = 4096
RECORD_BYTES = 16
LENGTH_BYTES = 4
COMMIT = "commit"
LENGTHS = "lengths."  # and the field's name: the dataset that holds the lengths of its rows

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    )
}  # fmt: skip
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

NAME = re.compile(r"(?!lengths\.)[A-Za-z][A-Za-z0-9_.-]{0,127}")
ROWS_MAX = 2**32 - 2  # index + 1 is a u32
LENGTH_MAX = 2**32 - 1
DIMENSIONS_MAX = 31  # HDF5 allows 32, and the rows are one of them
FIELDS_MAX = 256
CREATED_MAX = 253_402_300_799  # the last second of year 9999, where datetime ends

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a header says, after every check.

    Attributes:
        spec: Rows and fields.
        offsets: Of each field's dataset, in bytes from the start of the file.
        lengths_offsets: Of the dataset of lengths of each ragged field.
        commit_offset: Of the commit table.
        file_bytes: Size of the file.
        metadata_sha256: Of the bytes in :attr:`gaps`, in hexadecimal.
        fingerprint: What must be equal for the rows to be reused.
        attributes: Free strings for people.
        created: Seconds since 1970 (UTC).
    """

    spec: StoreSpec
    offsets: Mapping[str, int]
    lengths_offsets: Mapping[str, int]
    commit_offset: int
    file_bytes: int
    metadata_sha256: str
    fingerprint: Mapping[str, str]
    attributes: Mapping[str, str]
    created: int

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """(offset, bytes) of what is no data and not the header: HDF5's metadata, lengths and padding."""
        return gaps(data_regions(self.spec, self.offsets, self.commit_offset), self.file_bytes)


def data_regions(spec: StoreSpec, offsets: Mapping[str, int], commit_offset: int) -> list[tuple[int, int]]:
    """(offset, bytes) of the commit table and of every field's dataset."""
    fields = [(offsets[field.name], field.items(spec.rows) * field.item_bytes) for field in spec.fields]
    return [(commit_offset, spec.rows * RECORD_BYTES), *fields]


def gaps(regions: list[tuple[int, int]], file_bytes: int) -> list[tuple[int, int]]:
    """(offset, bytes) of what lies after the header and in none of ``regions``; zero-length gaps are left out."""
    edges = [(HEADER_BYTES, 0), *sorted(regions), (file_bytes, 0)]
    spans = [(start + size, following - start - size) for (start, size), (following, _) in pairwise(edges)]
    return [span for span in spans if span[1]]


def metadata_sha256(spans: list[tuple[int, int]], read: Callable[[int, int], bytes]) -> str:
    """SHA-256 over ``spans`` in file order; ``read(offset, size)`` gives their bytes."""
    digest = hashlib.sha256()
    for offset, size in spans:
        for start in range(offset, offset + size, _CHUNK_BYTES):
            digest.update(read(start, min(_CHUNK_BYTES, offset + size - start)))
    return digest.hexdigest()


def check_storable(spec: StoreSpec, fingerprint: Mapping[str, str], attributes: Mapping[str, str]) -> None:
    """Refuse what the format cannot hold, before anything is computed or created.

    Raises:
        StoreError: Naming the field and what is allowed.
    """
    check_spec(spec)
    if spec.rows > ROWS_MAX:
        raise StoreError(f"rows={spec.rows:,}: a cache file holds at most {ROWS_MAX:,} rows")
    if len(spec.fields) > FIELDS_MAX:
        raise StoreError(f"{len(spec.fields)} fields: a cache file holds at most {FIELDS_MAX}")
    for field in spec.fields:
        if not NAME.fullmatch(field.name) or field.name == COMMIT:
            raise StoreError(
                f"field name {field.name!r} cannot name a dataset: use a letter, then up to 127 letters, digits, "
                f"'_', '.' or '-', not {COMMIT!r}, and nothing that begins with {LENGTHS!r}"
            )
        if field.dtype not in DTYPE_NAMES:
            raise StoreError(f"field {field.name!r} is {field.dtype}; a cache file holds {', '.join(DTYPES)}")
        if len(field.shape) > DIMENSIONS_MAX:
            raise StoreError(f"field {field.name!r} has {len(field.shape)} dimensions, at most {DIMENSIONS_MAX} fit")
        if field.lengths is not None and field.lengths.longest > LENGTH_MAX:
            raise StoreError(f"field {field.name!r} has a row of {field.lengths.longest:,} items, {LENGTH_MAX:,} fit")
    for what, strings in (("fingerprint", fingerprint), ("attributes", attributes)):
        if not are_strings(strings):
            raise StoreError(f"{what} must map strings to strings that UTF-8 can encode, got {strings!r}")


def are_strings(value: object) -> bool:
    """Whether ``value`` maps text to text, all of which can be encoded."""
    if not isinstance(value, Mapping):
        return False
    texts = [*value.keys(), *value.values()]
    if not all(isinstance(text, str) for text in texts):
        return False
    try:
        for text in texts:
            text.encode()  # a lone surrogate is a str that no terminal can print
    except UnicodeEncodeError:
        return False
    return True
