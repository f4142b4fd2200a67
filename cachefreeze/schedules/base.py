"""What every schedule shares: the clock it reads, the ladder of blocks it climbs, the decision it makes.

A schedule is a pure decision object: it never touches a model, an optimizer or a tensor that trains. Given how much
of the run is done it says how many leading blocks are frozen and what each block's learning rate is multiplied with.
What it learned on the way, if anything, is its ``state_dict``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from cachefreeze.blocks import is_norm, list_blocks
from cachefreeze.errors import ScheduleError
from cachefreeze.tracing import Example, Usage, usage_of

# A point in time that is computed in floating point (0.8 ** 3 of 1000 steps) must not cost a step by its last digit.
_STEP_TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How much of a run is done, counted in its own optimizer steps.

    Attributes:
        step: Optimizer steps done; 0 before the first.
        steps: Of the whole run.
        epochs: Of the whole run; all have the same number of steps.
    """

    step: int
    steps: int
    epochs: int

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.steps < self.epochs or not 0 <= self.step <= self.steps:
            raise ScheduleError(
                f"step={self.step}, steps={self.steps}, epochs={self.epochs}: expected 0 <= step <= steps, and "
                "at least one step an epoch"
            )

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return self.step / self.steps

    @property
    def epoch(self) -> float:
        """Epochs done, with their fraction."""
        return self.step * self.epochs / self.steps

    def step_of(self, progress: float) -> int:
        """The first step at which at least ``progress`` of the run is done."""
        return math.ceil(progress * self.steps - _STEP_TOLERANCE)

    def step_of_epoch(self, epoch: float) -> int:
        """The first step at which at least ``epoch`` epochs are done."""
        return math.ceil(epoch * self.steps / self.epochs - _STEP_TOLERANCE)


@dataclass(frozen=True)
class Ladder:
    """The blocks of a model in order of use, as schedules count them.

    They are those of :func:`cachefreeze.blocks`, but a norm that follows the last residual, dense or transformer block
    is an entry of its own: it belongs to the classifier.

    Attributes:
        names: Of the blocks; each is a boundary at which training can begin.
        head: How many of the last ones never freeze by time: the classifier and the final norm before it.
    """

    names: tuple[str, ...]
    head: int = 1

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names) or not 1 <= self.head <= len(self.names):
            raise ScheduleError(f"names={self.names}, head={self.head}: expected distinct blocks, the head among them")

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any = None) -> Ladder:
        """Read the ladder of a model.

        Args:
            model: Any module; as before afterwards.
            example_inputs: As for :func:`cachefreeze.blocks`; without them the order is read from a symbolic trace.
        """
        return cls.of_usage(model, usage_of(model, None if example_inputs is None else Example.of(example_inputs)))

    @classmethod
    def of_usage(cls, model: nn.Module, usage: Usage) -> Ladder:
        """The ladder of a model whose order of use is known."""
        listed = list_blocks(model, usage)
        names = [block.name for block in listed]
        if not names:
            raise ScheduleError(f"{type(model).__name__} has no block with parameters, so nothing can be scheduled")
        if len(listed) < 2:
            return cls(tuple(names))
        last = listed[-2]
        own = [
            m for m in model.get_submodule(last.name).modules() if next(m.parameters(recurse=False), None) is not None
        ]
        composite = sum(not is_norm(module) for module in own) > 1
        if composite and len(last.members) > 1:
            return cls((*names[:-1], last.members[1], names[-1]), head=2)
        return cls(tuple(names))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def body(self) -> int:
        """L: the blocks before the head."""
        return len(self.names) - self.head

    def boundary(self, frozen: int) -> str | None:
        """Name of the first trainable block when ``frozen`` leading ones are frozen; None when none is."""
        return self.names[frozen] if frozen else None

    def before_last(self, count: int) -> int:
        """How many blocks lie before the last ``count`` of :func:`cachefreeze.blocks`, as ``train_last=count`` does."""
        norm = self.body if self.head > 1 else None  # listed with the block before it
        listed = [index for index in range(len(self.names)) if index != norm]
        if not 1 <= count <= len(listed):
            raise ScheduleError(f"the last {count} blocks: expected 1 to {len(listed)}. {self.sentence()}")
        return listed[-count]

    def before(self, name: str) -> int:
        """How many blocks lie before ``name``: a block, or a module that holds whole blocks.

        Raises:
            ScheduleError: There is no such block.
        """
        for index, block in enumerate(self.names):
            if block == name or block.startswith(f"{name}."):
                return index
        raise ScheduleError(f"{name!r} is no block and holds none. {self.sentence()}")

    def sentence(self) -> str:
        """The sentence that lists the blocks, for messages."""
        names = self.names if len(self.names) <= 40 else (*self.names[:20], "…", *self.names[-20:])
        return f"Blocks, in order: {', '.join(names)}."


@dataclass(frozen=True)
class Decision:
    """What a schedule says at one moment.

    Attributes:
        frozen: How many leading blocks are frozen; the next one is the boundary.
        factors: For each block what its learning rate is multiplied with; 0.0 for the frozen ones.
    """

    frozen: int
    factors: tuple[float, ...]


class Schedule(ABC):
    """A freeze schedule. ``repr()`` is its configuration: two schedules with the same one decide alike.

    Attributes:
        planned: Whether it decides by time alone, so that the whole run can be shown before it begins.
        checks: How often in an epoch the engine shows it what it decides by.
    """

    planned: ClassVar[bool] = True
    checks: int = 0

    @property
    def drives_rates(self) -> bool:
        """Whether it multiplies, or watches, the learning rates of blocks that train."""
        return False

    @abstractmethod
    def frozen(self, clock: Clock, ladder: Ladder) -> int:
        """How many leading blocks are frozen; at least one always trains."""

    def factors(self, clock: Clock, ladder: Ladder) -> tuple[float, ...]:
        """What each block's learning rate is multiplied with."""
        frozen = self.frozen(clock, ladder)
        return tuple(float(index >= frozen) for index in range(len(ladder)))

    def at(self, clock: Clock, ladder: Ladder) -> Decision:
        """The decision before the step that ``clock`` stands at."""
        return Decision(self.frozen(clock, ladder), self.factors(clock, ladder))

    def turns(self, clock: Clock) -> Sequence[int]:
        """Steps between which the number of frozen blocks only grows, or only falls."""
        return ()

    def check(self, clock: Clock, ladder: Ladder) -> None:
        """Refuse a run or a model that this schedule cannot drive; called once, before training.

        Raises:
            ScheduleError: Names a block that does not exist, or a stage that is never reached.
        """
        self.at(clock, ladder)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to decide on as before."""
        return {"schedule": repr(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ScheduleError: The state is of another schedule.
        """
        if state.get("schedule") != repr(self):
            raise ScheduleError(
                f"this state is of {state.get('schedule')}, the schedule is {self!r}; resume with the same schedule"
            )


def in_range(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> float:
    """``value`` as a float between ``low`` and ``high``, or the error that says so."""
    bracket = "above" if low_open else "from"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or (low_open and value == low):
        raise ScheduleError(f"{name}={value!r}: expected a number {bracket} {low:g} to {high:g}")
    return float(value)


def whole(name: str, value: Any, low: int) -> int:
    """``value`` as a whole number of at least ``low``, or the error that says so."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ScheduleError(f"{name}={value!r}: expected a whole number, {low} or more")
    return value
