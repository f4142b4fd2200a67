"""What a recording holds: the values of one forward, the calls that made them, when each was used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from cachefreeze import trees
from cachefreeze.splitting.boundary import BoundaryTensor

# Where a value can be kept and put back: a raw input, a leaf of what the n-th call of a module returns, an argument
# that it wrote into, or an argument of the boundary's first call. (kind, module name, number of the call, leaf)
Place = tuple[Literal["input", "output", "written", "argument"], str, int, int]


@dataclass
class Value:
    """One tensor of a forward.

    Attributes:
        shape: As recorded.
        dtype: As recorded.
        strides: As recorded; None where its memory has none.
        inputs: Numbers of the values that it is computed from.
        made: When, on the recording's clock.
        place: Where it can be kept, or None.
        opaque: Whether it comes out of a closed call that the suffix cannot run again.
        random: Whether a random draw went into it.
        written: Whether glue writes into it later.
        spec: Its batch dimension and bytes, once the recordings are compared; None when no row can hold it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None
    inputs: frozenset[int]
    made: int
    place: Place | None = None
    opaque: bool = False
    random: bool = False
    written: bool = False
    spec: BoundaryTensor | None = None


@dataclass
class ClosedCall:
    """What a closed call did.

    Attributes:
        name: Of the module.
        number: Which of its calls, from 0; calls inside closed calls do not count.
        structure: Of what it returned.
        leaves: Per leaf a constant, a value's number, the position of the argument leaf that it is, or the number of
            a value that is shared by all samples.
        written: (position of an argument leaf that it wrote into, the value's number afterwards).
    """

    name: str
    number: int
    structure: trees.Structure
    leaves: list[tuple[Literal["constant", "value", "argument", "shared"], Any]]
    written: list[tuple[int, int]]

    @property
    def made(self) -> set[int]:
        """Numbers of the values that it made."""
        return {what for kind, what in self.leaves if kind == "value"} | {number for _, number in self.written}

    @property
    def shared(self) -> set[int]:
        """Numbers of the values that it made of weights and shapes alone."""
        return {what for kind, what in self.leaves if kind == "shared"}


@dataclass
class Recording:
    """One forward.

    Attributes:
        values: All tensors that depend on the inputs, in the order in which they were made.
        closed: Closed calls by module name and number.
        live: Calls of frozen modules whose inputs are random.
        constant: Calls that depend on weights and shapes alone; the suffix makes them as the model does.
        boundaries: Block name -> when it was first called or a parameter of it first used.
        uses: (when, numbers of the values used), the outputs last.
        reads: (when, numbers of the values that were read into Python), by glue.
        glanced: (when, numbers of values made of ids and masks alone that glue asked for a truth value): whatever the
            answer, the model does the same.
        checks: How often, before the last boundary, ids were asked for a truth value.
        operations: Names of what glue did before the last boundary.
        buffers: Name of each buffer that an operation used -> whether all boundaries were reached by then.
        branches: Whether, from the boundary on, values or chance decide in Python what runs.
        settled: (when, number of values, number of operations) when the last closed call before it was done.
    """

    values: list[Value] = field(default_factory=list)
    closed: dict[tuple[str, int], ClosedCall] = field(default_factory=dict)
    live: set[tuple[str, int]] = field(default_factory=set)
    constant: set[tuple[str, int]] = field(default_factory=set)
    boundaries: dict[str, int] = field(default_factory=dict)
    uses: list[tuple[int, frozenset[int]]] = field(default_factory=list)
    reads: list[tuple[int, frozenset[int]]] = field(default_factory=list)
    glanced: list[tuple[int, frozenset[int]]] = field(default_factory=list)
    checks: int = 0
    operations: list[str] = field(default_factory=list)
    buffers: dict[str, bool] = field(default_factory=dict)
    branches: bool = False
    settled: tuple[int, int, int] = (0, 0, 0)

    def count_before(self) -> int:
        """Number of values made before the last boundary: what comes after it may be left to chance."""
        last = max(self.boundaries.values(), default=0)
        return sum(value.made < last for value in self.values)

    def needed(self, block: str) -> set[int]:
        """Values made before a boundary that are used from it on, or that glue before it reads into Python."""
        start = self.boundaries[block]
        late = {n for when, numbers in self.uses if when >= start for n in numbers}
        read = {n for when, numbers in self.reads if when < start for n in numbers}
        return {n for n in late | read if self.values[n].made < start}
