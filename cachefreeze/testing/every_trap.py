"""Every trap of the package in two tables: what must split exactly, and what must be refused."""

from __future__ import annotations

from cachefreeze.testing import (
    traps,
    traps_calls,
    traps_freezing,
    traps_hidden,
    traps_inputs,
    traps_layers,
    traps_random,
    traps_rows,
    traps_state,
    traps_weights,
    traps_writes,
)

_MODULES = (
    traps,
    traps_calls,
    traps_freezing,
    traps_hidden,
    traps_inputs,
    traps_layers,
    traps_random,
    traps_rows,
    traps_state,
    traps_weights,
    traps_writes,
)

TRAPS: dict[str, traps.Trap] = {}
REFUSED: dict[str, traps.Trap] = {}
for _module in _MODULES:
    assert not (TRAPS.keys() | REFUSED.keys()) & (_module.TRAPS.keys() | _module.REFUSED.keys()), _module.__name__
    TRAPS |= _module.TRAPS
    REFUSED |= _module.REFUSED
