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

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch

from cachefreeze.errors import CorruptStoreError, StoreError
from cachefreeze.stores.base import FieldSpec, StoreSpec, check_spec

HEADER_BYTES = 65536  # an HDF5 user block: a power of two from 512 on
ALIGNMENT_BYTES = 4096
RECORD_BYTES = 16
COMMIT = "commit"

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    )
}  # fmt: skip
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

MAGIC = b"\x89CFRZ\r\n\x1a"  # like PNG's: text-mode transfers and 7-bit channels damage it visibly
_VERSION = 1
_PREFIX = struct.Struct("<8sII")
_CRC = struct.Struct("<I")
_CRC_OFFSET = HEADER_BYTES - _CRC.size
_JSON_MAX_BYTES = _CRC_OFFSET - _PREFIX.size

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ROWS_MAX = 2**32 - 2  # index + 1 is a u32
_DIMENSIONS_MAX = 31  # HDF5 allows 32, and the rows are one of them
_FIELDS_MAX = 256
_SIZE_MAX = 2**63 - 1  # off_t
_CREATED_MAX = 253_402_300_799  # the last second of year 9999, where datetime ends
_METADATA_MAX_BYTES = 4 << 20  # HDF5 needs some 10 KiB a dataset; a hostile file must not make us hash all of it

_KEYS = frozenset(
    {"attributes", "commit_offset", "created", "fields", "file_bytes", "fingerprint", "metadata_sha256", "rows"}
)
_FIELD_KEYS = frozenset({"name", "dtype", "shape", "offset"})


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a header says, after every check.

    Attributes:
        spec: Rows and fields.
        offsets: Of each field's dataset, in bytes from the start of the file.
        commit_offset: Of the commit table.
        file_bytes: Size of the file.
        metadata_sha256: Of the bytes in :attr:`gaps`, in hexadecimal.
        fingerprint: What must be equal for the rows to be reused.
        attributes: Free strings for people.
        created: Seconds since 1970 (UTC).
    """

    spec: StoreSpec
    offsets: Mapping[str, int]
    commit_offset: int
    file_bytes: int
    metadata_sha256: str
    fingerprint: Mapping[str, str]
    attributes: Mapping[str, str]
    created: int

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """(offset, bytes) of what lies in no dataset after the header: HDF5's metadata and padding."""
        return gaps(self.spec, self.offsets, self.commit_offset, self.file_bytes)


def gaps(spec: StoreSpec, offsets: Mapping[str, int], commit_offset: int, file_bytes: int) -> list[tuple[int, int]]:
    """See :attr:`Layout.gaps`; zero-length gaps are left out."""
    regions = sorted(_regions(spec, offsets, commit_offset))
    edges = [(HEADER_BYTES, 0), *regions, (file_bytes, 0)]
    spans = [(start + size, following - start - size) for (start, size), (following, _) in pairwise(edges)]
    return [span for span in spans if span[1]]


def metadata_sha256(spans: list[tuple[int, int]], read: Callable[[int, int], bytes]) -> str:
    """SHA-256 over ``spans`` in file order; ``read(offset, size)`` gives their bytes."""
    digest = hashlib.sha256()
    for offset, size in spans:
        digest.update(read(offset, size))
    return digest.hexdigest()


def check_storable(spec: StoreSpec, fingerprint: Mapping[str, str], attributes: Mapping[str, str]) -> None:
    """Refuse what the format cannot hold, before anything is computed or created.

    Raises:
        StoreError: Naming the field and what is allowed.
    """
    check_spec(spec)
    if spec.rows > _ROWS_MAX:
        raise StoreError(f"rows={spec.rows:,}: a cache file holds at most {_ROWS_MAX:,} rows")
    if len(spec.fields) > _FIELDS_MAX:
        raise StoreError(f"{len(spec.fields)} fields: a cache file holds at most {_FIELDS_MAX}")
    for field in spec.fields:
        if not _NAME.fullmatch(field.name) or field.name == COMMIT:
            raise StoreError(
                f"field name {field.name!r} cannot name a dataset: use a letter, then up to 127 letters, digits, "
                f"'_', '.' or '-', and not {COMMIT!r}"
            )
        if field.dtype not in DTYPE_NAMES:
            raise StoreError(f"field {field.name!r} is {field.dtype}; a cache file holds {', '.join(DTYPES)}")
        if len(field.shape) > _DIMENSIONS_MAX:
            raise StoreError(f"field {field.name!r} has {len(field.shape)} dimensions, at most {_DIMENSIONS_MAX} fit")
    for what, strings in (("fingerprint", fingerprint), ("attributes", attributes)):
        if not _are_strings(strings):
            raise StoreError(f"{what} must map strings to strings that UTF-8 can encode, got {strings!r}")


def encode(layout: Layout) -> bytes:
    """The 64 KiB block that :func:`decode` reads.

    Raises:
        StoreError: The strings are too long for it.
    """
    tree = {
        "attributes": dict(layout.attributes),
        "commit_offset": layout.commit_offset,
        "created": layout.created,
        "fields": [
            {
                "name": field.name,
                "dtype": DTYPE_NAMES[field.dtype],
                "shape": list(field.shape),
                "offset": layout.offsets[field.name],
            }
            for field in layout.spec.fields
        ],
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


def decode(block: bytes, file_bytes: int, path: Path) -> Layout:
    """Check and read a header.

    Args:
        block: The first 64 KiB of the file.
        file_bytes: Size that the file really has.
        path: For messages.

    Raises:
        CorruptStoreError: Naming what is wrong.
    """
    try:
        return _decode(block, file_bytes)
    except CorruptStoreError as error:
        ours = block[: len(MAGIC)] == MAGIC
        fix = "Remove the file to have it made again" if ours else "It may be somebody else's: name another file"
        raise CorruptStoreError(f"{path}: {error}. {fix}") from None


def _decode(block: bytes, file_bytes: int) -> Layout:
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

    rows = _integer(tree["rows"], "rows", 1, _ROWS_MAX)
    fields = tree["fields"]
    _require(type(fields) is list and 1 <= len(fields) <= _FIELDS_MAX, f"fields is no list of 1 to {_FIELDS_MAX}")
    specs = tuple(_field(field) for field in fields)
    _require(len({spec.name for spec in specs}) == len(specs), "two fields have the same name")
    _require(
        type(tree["metadata_sha256"]) is str and _SHA256.fullmatch(tree["metadata_sha256"]) is not None,
        "metadata_sha256 is no SHA-256",
    )
    for key in ("fingerprint", "attributes"):
        _require(_are_strings(tree[key]), f"{key} does not map strings to strings")
    layout = Layout(
        spec=StoreSpec(rows=rows, fields=specs),
        offsets={spec.name: field["offset"] for spec, field in zip(specs, fields, strict=True)},
        commit_offset=_integer(tree["commit_offset"], "commit_offset", HEADER_BYTES, _SIZE_MAX),
        file_bytes=_integer(tree["file_bytes"], "file_bytes", HEADER_BYTES, _SIZE_MAX),
        metadata_sha256=tree["metadata_sha256"],
        fingerprint=tree["fingerprint"],
        attributes=tree["attributes"],
        created=_integer(tree["created"], "created", 0, _CREATED_MAX),
    )
    _require(
        layout.file_bytes == file_bytes,
        f"the file has {file_bytes:,} bytes, its header says {layout.file_bytes:,}: it was cut or grew",
    )
    _check_regions(layout)
    return layout


def _check_regions(layout: Layout) -> None:
    regions = sorted(_regions(layout.spec, layout.offsets, layout.commit_offset))
    _require(all(offset % ALIGNMENT_BYTES == 0 for offset, _ in regions), "a dataset is not aligned")
    ends = [offset + size for offset, size in regions]
    _require(ends[-1] <= layout.file_bytes, "a dataset reaches beyond the end of the file")
    starts = [offset for offset, _ in regions[1:]]
    _require(all(end <= start for end, start in zip(ends, starts, strict=False)), "two datasets overlap")
    metadata_bytes = layout.file_bytes - HEADER_BYTES - sum(size for _, size in regions)
    _require(metadata_bytes <= _METADATA_MAX_BYTES, f"{metadata_bytes:,} bytes lie in no dataset")


def _field(tree: Any) -> FieldSpec:
    _require(type(tree) is dict and tree.keys() == _FIELD_KEYS, f"a field's keys are not {sorted(_FIELD_KEYS)}")
    name, dtype, shape = tree["name"], tree["dtype"], tree["shape"]
    _require(
        type(name) is str and _NAME.fullmatch(name) is not None and name != COMMIT, "a field's name is not allowed"
    )
    _require(type(dtype) is str and dtype in DTYPES, f"field {name} has a dtype that is none of {', '.join(DTYPES)}")
    _require(type(shape) is list and len(shape) <= _DIMENSIONS_MAX, f"the shape of field {name} is no short list")
    _integer(tree["offset"], f"the offset of field {name}", HEADER_BYTES, _SIZE_MAX)
    sizes = tuple(_integer(size, f"the shape of field {name}", 1, _SIZE_MAX) for size in shape)
    return FieldSpec(name=name, shape=sizes, dtype=DTYPES[dtype])


def _regions(spec: StoreSpec, offsets: Mapping[str, int], commit_offset: int) -> list[tuple[int, int]]:
    fields = [(offsets[field.name], spec.rows * prod(field.shape) * field.dtype.itemsize) for field in spec.fields]
    return [(commit_offset, spec.rows * RECORD_BYTES), *fields]


def _integer(value: Any, what: str, least: int, most: int) -> int:
    # type() and not isinstance(): True is an int too
    _require(type(value) is int and least <= value <= most, f"{what} is no integer from {least} to {most}")
    return int(value)


def _are_strings(value: Any) -> bool:
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    _require(len(tree) == len(pairs), "the header's JSON has a key twice")
    return tree


def _no_constant(name: str) -> float:
    raise CorruptStoreError(f"the header's JSON holds {name}")


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise CorruptStoreError(reason)
