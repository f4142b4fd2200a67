"""How libhdf5 lays out a cache file: in memory, once, so that it never touches the file itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from cachefreeze.errors import StoreError
from cachefreeze.stores.base import StoreSpec
from cachefreeze.stores.layout import (
    ALIGNMENT_BYTES,
    COMMIT,
    CREATED_MAX,
    DTYPE_NAMES,
    HEADER_BYTES,
    LENGTHS,
    Layout,
    data_regions,
    gaps,
    metadata_sha256,
)
from cachefreeze.stores.rows import RECORD
from cachefreeze.stores.sparse import SparseFile

# Superblock 3 and version 2 object headers, the checksummed ones, without what only the newest libhdf5 can read
# ("latest" of HDF5 2.0 writes version 5 datatype messages, which 1.10 to 1.14 do not know).
_LIBVER = ("v110", "v110")


def lay_out(
    spec: StoreSpec, fingerprint: Mapping[str, str], attributes: Mapping[str, str]
) -> tuple[Layout, list[tuple[int, bytes]]]:
    """Have libhdf5 lay out a file in memory.

    Returns:
        The layout, and (offset, bytes) of all that is no data: HDF5's metadata and the lengths of ragged rows.
    """
    import h5py  # here only: reading needs no libhdf5, and importing it costs 0.2 s

    memory = SparseFile()
    offsets = {}
    with h5py.File(
        memory,
        "w",
        libver=_LIBVER,
        userblock_size=HEADER_BYTES,
        alignment_threshold=1,
        alignment_interval=ALIGNMENT_BYTES,
    ) as file:
        placement = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        placement.set_layout(h5py.h5d.CONTIGUOUS)
        placement.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        placement.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        for name, shape, dtype, stands_for in _datasets(spec):
            kind, space = h5py.h5t.py_create(dtype, logical=True), h5py.h5s.create_simple(shape)
            dataset = h5py.h5d.create(file.id, name.encode(), kind, space, placement)
            h5py.Dataset(dataset).attrs["cachefreeze"] = stands_for
            offsets[name] = dataset.get_offset()
        for field in spec.fields:
            if field.lengths is not None:
                file[LENGTHS + field.name][...] = field.lengths.values.numpy()
    if any(offset is None or offset % ALIGNMENT_BYTES for offset in offsets.values()):
        raise StoreError(
            f"libhdf5 placed datasets at {offsets}, expected multiples of {ALIGNMENT_BYTES}: please report"
        )
    commit_offset = offsets[COMMIT]
    spans = gaps(data_regions(spec, offsets, commit_offset), memory.size)
    layout = Layout(
        spec=spec,
        offsets={field.name: offsets[field.name] for field in spec.fields},
        lengths_offsets={f.name: offsets[LENGTHS + f.name] for f in spec.fields if f.lengths is not None},
        commit_offset=commit_offset,
        file_bytes=memory.size,
        metadata_sha256=metadata_sha256(spans, memory.at),
        fingerprint=fingerprint,
        attributes=attributes,
        created=min(max(int(time.time()), 0), CREATED_MAX),  # whatever the clock says
    )
    return layout, [(offset, memory.at(offset, size)) for offset, size in spans]


def _datasets(spec: StoreSpec) -> Iterator[tuple[str, tuple[int, ...], np.dtype[Any], str]]:
    """(name, shape, dtype, what it stands for) of every dataset of the file."""
    yield COMMIT, (spec.rows,), RECORD, "xxh3_64 of the row, row + 1, flags; all zero: absent"
    for field in spec.fields:
        dtype = _disk_dtype(field.dtype)
        if field.lengths is None:
            yield field.name, (spec.rows, *field.shape), dtype, DTYPE_NAMES[field.dtype]
        else:
            yield field.name, (field.lengths.total, *field.shape[1:]), dtype, DTYPE_NAMES[field.dtype]
            yield (
                LENGTHS + field.name,
                (spec.rows,),
                np.dtype("<u4"),
                f"items of each row of {field.name}, in row order",
            )


def _disk_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """What h5py shows: HDF5 has neither bfloat16 nor a bool that every reader knows."""
    name = {torch.bfloat16: "uint16", torch.bool: "uint8"}.get(dtype, DTYPE_NAMES[dtype])
    disk: np.dtype[Any] = np.dtype(name).newbyteorder("<")
    return disk
