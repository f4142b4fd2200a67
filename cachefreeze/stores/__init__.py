"""Where rows live: one contract, three tiers, and stores that mix them."""

from __future__ import annotations

from cachefreeze.stores.base import BadRow, FieldSpec, Store, StoreSpec
from cachefreeze.stores.hdf5 import HDF5Store, Header, read_header
from cachefreeze.stores.memory import DeviceStore, HostStore
from cachefreeze.stores.mixed import MixedStore, part_of, spread
from cachefreeze.stores.ragged import Lengths
from cachefreeze.stores.removal import cache_bytes, in_use, remove_cache

__all__ = [
    "BadRow",
    "DeviceStore",
    "FieldSpec",
    "HDF5Store",
    "Header",
    "HostStore",
    "Lengths",
    "MixedStore",
    "Store",
    "StoreSpec",
    "cache_bytes",
    "in_use",
    "part_of",
    "read_header",
    "remove_cache",
    "spread",
]
