"""Epoch timings of one job on one machine: live, frozen without a cache, each tier, and the ceiling.

:func:`measure` returns what a results file holds, and :func:`table` makes it readable.
``cachefreeze bench`` is the command.
"""

from cachefreeze.timings.results import SCHEMA, table
from cachefreeze.timings.rounds import measure, steps
from cachefreeze.timings.variants import Job, evenly

__all__ = ["SCHEMA", "Job", "evenly", "measure", "steps", "table"]
