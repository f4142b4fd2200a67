"""Shipped tests: the store conformance suite (:mod:`.stores`) and models that lay traps for a split (:mod:`.traps`).

What a store promises under kills, power cuts and damage is tried by :mod:`.torture`, :mod:`.powercuts`, :mod:`.faults`
and :mod:`.hostile`, all of them held to one :mod:`.judge`. Nothing of the package imports this one. ``stores`` needs
pytest; ``traps`` needs torch alone.
"""

from cachefreeze.testing.traps import REFUSED, TRAPS, Trap

__all__ = ["REFUSED", "TRAPS", "Trap"]
