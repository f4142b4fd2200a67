"""Shipped tests: the store conformance suite (:mod:`.stores`) and models that lay traps for a split (:mod:`.traps`).

Nothing of the package imports this one. ``stores`` needs pytest; ``traps`` needs torch alone.
"""

from cachefreeze.testing.traps import REFUSED, TRAPS, Trap

__all__ = ["REFUSED", "TRAPS", "Trap"]
