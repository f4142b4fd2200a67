"""Run the frozen prefix of a network once per sample; train the rest from its cached activations."""

from cachefreeze._started import STARTED  # noqa: F401 - first, before anything imports torch
from cachefreeze._version import __version__ as __version__
from cachefreeze.blocks import Block
from cachefreeze.engine import Engine
from cachefreeze.errors import CacheFreezeError
from cachefreeze.freezing import freeze, unfreeze
from cachefreeze.inference import Optimized
from cachefreeze.manager import CacheManager
from cachefreeze.planning import BoundaryPlan, Plan, plan
from cachefreeze.row_source import Rows
from cachefreeze.sampling import BlockShuffleSampler
from cachefreeze.schedules import (
    AllButLast,
    FreezeAtZeroLR,
    FreezeOut,
    GradientChange,
    GradualUnfreezing,
    Plasticity,
    Stage,
    Stages,
)
from cachefreeze.splitting import Boundary, BoundaryTensor, Parts, blocks, split
from cachefreeze.stores import DeviceStore, FieldSpec, HDF5Store, HostStore, Store, StoreSpec
from cachefreeze.training import Trainer

__all__ = [
    "AllButLast",
    "Block",
    "BlockShuffleSampler",
    "Boundary",
    "BoundaryPlan",
    "BoundaryTensor",
    "CacheFreezeError",
    "CacheManager",
    "DeviceStore",
    "Engine",
    "FieldSpec",
    "FreezeAtZeroLR",
    "FreezeOut",
    "GradientChange",
    "GradualUnfreezing",
    "HDF5Store",
    "HostStore",
    "Optimized",
    "Parts",
    "Plan",
    "Plasticity",
    "Rows",
    "Stage",
    "Stages",
    "Store",
    "StoreSpec",
    "Trainer",
    "blocks",
    "freeze",
    "plan",
    "split",
    "unfreeze",
]
