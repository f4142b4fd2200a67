"""The first 64 KiB of a cache file: what it holds and where. Written once, believed only after every check.

Byte offsets, little-endian:
    0: magic, 8 bytes
    8: u32 format version
    12: u32 length of the JSON
    16: the JSON, ASCII; zeros up to
    65532: u32 CRC-32 (zlib) of the 65532 bytes before it

The file is somebody else's until proven otherwise: every value is checked against what the format allows, nothing is
taken on trust, and no size named here is allocated before the file was found to be that large.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cachefreeze.errors import CorruptStoreError, StoreError
from cachefreeze.stores.base import FieldSpec, StoreSpec
from cachefreeze.stores.layout import (
    ALIGNMENT_BYTES,
    COMMIT,
    CREATED_MAX,
    DIMENSIONS_MAX,
    DTYPE_NAMES,
    DTYPES,
    FIELDS_MAX,
    HEADER_BYTES,
    LENGTH_BYTES,
    NAME,
    RECORD_BYTES,
    ROWS_MAX,
    Layout,
    are_strings,
    gaps,
    metadata_sha256,
)
from cachefreeze.stores.ragged import Lengths

Read = Callable[[int, int], bytes]  # (offset, size) -> bytes of the file

MAGIC = b"\x89CFRZ\r\n\x1a"  # like PNG's: text-mode transfers and 7-bit channels damage it visibly
_VERSION = 1
_PREFIX = struct.Struct("<8sII")
_CRC = struct.Struct("<I")
_CRC_OFFSET = HEADER_BYTES - _CRC.size
_JSON_MAX_BYTES = _CRC_OFFSET - _PREFIX.size

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SIZE_MAX = 2**63 - 1  # off_t
_METADATA_MAX_BYTES = 8 << 20  # HDF5 needs some 10 KiB a dataset; a hostile file must not make us hash all of it

_KEYS = frozenset(
    {"attributes", "commit_offset", "created", "fields", "file_bytes", "fingerprint", "metadata_sha256", "rows"}
)
_FIELD_KEYS = frozenset({"name", "dtype", "shape", "offset"})
_RAGGED_KEYS = _FIELD_KEYS | {"items", "lengths_offset"}


@dataclass(frozen=True, kw_only=True)
class _Claim:
    """What the header says of one field, before its lengths are known."""

    field: FieldSpec
    offset: int
    items: int
    lengths_offset: int | None

    @property
    def region(self) -> tuple[int, int]:
        row = replace(self.field, shape=self.field.shape[1:]) if self.lengths_offset is not None else self.field
        return self.offset, self.items * row.item_bytes


def encode(layout: Layout) -> bytes:
    """The 64 KiB block that :func:`decode` reads.

    Raises:
        StoreError: The strings are too long for it.
    """
    tree = {
        "attributes": dict(layout.attributes),
        "commit_offset": layout.commit_offset,
        "created": layout.created,
        "fields": [_field_tree(field, layout) for field in layout.spec.fields],
        "file_bytes": layout.file_bytes,
        "fingerprint": dict(layout.fingerprint),
        "metadata_sha256": layout.metadata_sha256,
        "rows": layout.spec.rows,
    }
    text = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode("ascii")
    if len(text) > _JSON_MAX_BYTES:
        raise StoreError(
            f"fingerprint and attributes make a header of {len(text):,} bytes, {_JSON_MAX_BYTES:,} fit: "
            "shorten them, for example by storing a digest of the longest"
        )
    block = (_PREFIX.pack(MAGIC, _VERSION, len(text)) + text).ljust(_CRC_OFFSET, b"\0")
    return block + _CRC.pack(zlib.crc32(block))


def _field_tree(field: FieldSpec, layout: Layout) -> dict[str, Any]:
    tree = {
        "name": field.name,
        "dtype": DTYPE_NAMES[field.dtype],
        "shape": list(field.shape),
        "offset": layout.offsets[field.name],
    }
    if field.lengths is None:
        return tree
    return {**tree, "items": field.lengths.total, "lengths_offset": layout.lengths_offsets[field.name]}


def decode(block: bytes, file_bytes: int, read: Read, path: Path) -> Layout:
    """Check and read a header, and all of the file that it vouches for.

    Args:
        block: The first 64 KiB of the file.
        file_bytes: Size that the file really has.
        read: Reads the file.
        path: For messages.

    Raises:
        CorruptStoreError: Naming what is wrong.
    """
    try:
        return _decode(block, file_bytes, read)
    except CorruptStoreError as error:
        ours = block[: len(MAGIC)] == MAGIC
        fix = "Remove the file to have it made again" if ours else "It may be somebody else's: name another file"
        raise CorruptStoreError(f"{path}: {error}. {fix}") from None


def _decode(block: bytes, file_bytes: int, read: Read) -> Layout:
    tree = _tree(block, file_bytes)
    rows = _integer(tree["rows"], "rows", 1, ROWS_MAX)
    fields = tree["fields"]
    _require(type(fields) is list and 1 <= len(fields) <= FIELDS_MAX, f"fields is no list of 1 to {FIELDS_MAX}")
    claims = [_claim(field, rows) for field in fields]
    _require(len({claim.field.name for claim in claims}) == len(claims), "two fields have the same name")
    digest = tree["metadata_sha256"]
    _require(type(digest) is str and _SHA256.fullmatch(digest) is not None, "metadata_sha256 is no SHA-256")
    for key in ("fingerprint", "attributes"):
        _require(are_strings(tree[key]), f"{key} does not map strings to strings")
    created = _integer(tree["created"], "created", 0, CREATED_MAX)
    commit_offset = _integer(tree["commit_offset"], "commit_offset", HEADER_BYTES, _SIZE_MAX)
    claimed_bytes = _integer(tree["file_bytes"], "file_bytes", HEADER_BYTES, _SIZE_MAX)
    _require(
        claimed_bytes == file_bytes,
        f"the file has {file_bytes:,} bytes, its header says {claimed_bytes:,}: it was cut or grew",
    )
    lengths_offsets = {c.field.name: c.lengths_offset for c in claims if c.lengths_offset is not None}
    data = [(commit_offset, rows * RECORD_BYTES), *(claim.region for claim in claims)]
    _check_regions([*data, *((offset, rows * LENGTH_BYTES) for offset in lengths_offsets.values())], file_bytes)
    _require(metadata_sha256(gaps(data, file_bytes), read) == digest, "the HDF5 metadata is damaged")
    return Layout(
        spec=StoreSpec(rows=rows, fields=tuple(_with_lengths(claim, rows, read) for claim in claims)),
        offsets={claim.field.name: claim.offset for claim in claims},
        lengths_offsets=lengths_offsets,
        commit_offset=commit_offset,
        file_bytes=file_bytes,
        metadata_sha256=digest,
        fingerprint=tree["fingerprint"],
        attributes=tree["attributes"],
        created=created,
    )


def _tree(block: bytes, file_bytes: int) -> dict[str, Any]:
    """The JSON of an undamaged block; of its values nothing is known yet."""
    _require(len(block) == HEADER_BYTES, f"{file_bytes} bytes are too few for a cache file")
    magic, version, length = _PREFIX.unpack_from(block)
    _require(magic == MAGIC, "this is not a cachefreeze file (wrong magic)")
    _require(version == _VERSION, f"format version {version}, this release reads {_VERSION}")
    (crc,) = _CRC.unpack_from(block, _CRC_OFFSET)
    _require(zlib.crc32(block[:_CRC_OFFSET]) == crc, "the header is damaged (wrong CRC)")
    _require(length <= _JSON_MAX_BYTES, f"the header's JSON claims {length} bytes")
    try:
        tree = json.loads(
            block[_PREFIX.size : _PREFIX.size + length].decode("ascii"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"the header is no JSON ({error})") from None
    _require(type(tree) is dict and tree.keys() == _KEYS, f"the header's keys are not {sorted(_KEYS)}")
    return dict(tree)


def _check_regions(regions: list[tuple[int, int]], file_bytes: int) -> None:
    regions = sorted(regions)
    _require(all(offset % ALIGNMENT_BYTES == 0 for offset, _ in regions), "a dataset is not aligned")
    _require(regions[-1][0] + regions[-1][1] <= file_bytes, "a dataset reaches beyond the end of the file")
    _require(all(a + size <= b for (a, size), (b, _) in pairwise(regions)), "two datasets overlap")
    metadata_bytes = file_bytes - HEADER_BYTES - sum(size for _, size in regions)
    _require(metadata_bytes <= _METADATA_MAX_BYTES, f"{metadata_bytes:,} bytes lie in no dataset")


def _claim(tree: Any, rows: int) -> _Claim:
    _require(
        type(tree) is dict and tree.keys() in (_FIELD_KEYS, _RAGGED_KEYS),
        f"a field's keys are neither {sorted(_FIELD_KEYS)} nor {sorted(_RAGGED_KEYS)}",
    )
    name, dtype, shape = tree["name"], tree["dtype"], tree["shape"]
    _require(type(name) is str and NAME.fullmatch(name) is not None and name != COMMIT, "a field's name is not allowed")
    _require(type(dtype) is str and dtype in DTYPES, f"field {name} has a dtype that is none of {', '.join(DTYPES)}")
    _require(type(shape) is list and len(shape) <= DIMENSIONS_MAX, f"the shape of field {name} is no short list")
    sizes = tuple(_integer(size, f"the shape of field {name}", 1, _SIZE_MAX) for size in shape)
    items, lengths_offset = rows, None
    if "items" in tree:
        _require(len(sizes) > 0, f"ragged field {name} has no dimension")
        items = _integer(tree["items"], f"the items of field {name}", sizes[0], min(rows * sizes[0], _SIZE_MAX))
        lengths_offset = _integer(
            tree["lengths_offset"], f"the lengths_offset of field {name}", HEADER_BYTES, _SIZE_MAX
        )
    return _Claim(
        field=FieldSpec(name=name, shape=sizes, dtype=DTYPES[dtype]),
        offset=_integer(tree["offset"], f"the offset of field {name}", HEADER_BYTES, _SIZE_MAX),
        items=items,
        lengths_offset=lengths_offset,
    )


def _with_lengths(claim: _Claim, rows: int, read: Read) -> FieldSpec:
    if claim.lengths_offset is None:
        return claim.field
    lengths = np.frombuffer(read(claim.lengths_offset, rows * LENGTH_BYTES), "<u4")
    longest, items = int(lengths.max()), int(lengths.sum(dtype=np.uint64))  # u32 times u32 rows: cannot overflow
    _require(
        (longest, items) == (claim.field.shape[0], claim.items),
        f"the lengths of field {claim.field.name} are at most {longest:,} and {items:,} in all, the header says "
        f"{claim.field.shape[0]:,} and {claim.items:,}",
    )
    return replace(claim.field, lengths=Lengths(lengths))


def _integer(value: Any, what: str, least: int, most: int) -> int:
    # type() and not isinstance(): True is an int too
    _require(type(value) is int and least <= value <= most, f"{what} is no integer from {least} to {most}")
    return int(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    _require(len(tree) == len(pairs), "the header's JSON has a key twice")
    return tree


def _no_constant(name: str) -> float:
    raise CorruptStoreError(f"the header's JSON holds {name}")


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise CorruptStoreError(reason)
