"""Freeze leading blocks whose gradients change least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from cachefreeze.errors import ScheduleError
from cachefreeze.schedules.base import Clock, Ladder, Schedule, in_range, whole


@dataclass(eq=False)
class GradientChange(Schedule):
    """Freeze leading blocks while the change of their gradient is among the smallest.

    At the end of each interval, with g the L1 norm of a block's gradient summed over the interval, its change is
    ``|g' - g| / g'`` against the interval before. Leading blocks freeze while their change is under the percentile of
    all blocks that still train, and never thaw.

    Args:
        percentile: Of the changes of the blocks that train, 0 to 100.
        start: Share of the run before which nothing freezes.
        checks: Intervals of an epoch, whose gradients the engine sums; 0: none, the training loop calls
            :meth:`observe`.

    Source: https://arxiv.org/abs/2102.01386 (AutoFreeze), section 4.1.
    """

    percentile: float = 50.0
    start: float = 0.1
    checks: int = 1
    planned: ClassVar[bool] = False
    _frozen: int = field(default=0, init=False, repr=False)
    _last: list[float] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        in_range("percentile", self.percentile, 0, 100)
        in_range("start", self.start, 0, 1)
        whole("checks", self.checks, 0)

    def observe(self, clock: Clock, ladder: Ladder, norms: Sequence[float]) -> None:
        """End an interval.

        Args:
            clock: Now.
            ladder: The blocks.
            norms: For every block the L1 norm of its gradient, summed over the interval before the norm is taken;
                what it is for frozen blocks does not matter.
        """
        if len(norms) != len(ladder):
            raise ScheduleError(f"{len(norms)} norms for {len(ladder)} blocks; expected one each")
        last, self._last = self._last, [float(norm) for norm in norms]
        if last is None or clock.step < clock.step_of(self.start):
            return
        # a gradient that was zero and is not is as large a change as there can be
        largest = float(np.finfo(np.float64).max)
        changes = [
            abs(before - now) / before if before > 0 else (largest if now > 0 else 0.0)
            for before, now in zip(last[self._frozen :], self._last[self._frozen :], strict=True)
        ]
        limit = float(np.percentile(changes, self.percentile))
        for change in changes:
            if self._frozen >= ladder.body or change >= limit:
                break
            self._frozen += 1

    def frozen(self, clock: Clock, ladder: Ladder) -> int:
        """The blocks whose gradients settled."""
        return self._frozen

    def state_dict(self) -> dict[str, Any]:
        """The last interval's norms, and how many blocks are frozen."""
        return {**super().state_dict(), "frozen": self._frozen, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        self._frozen = int(state["frozen"])
        self._last = None if state["last"] is None else list(state["last"])
