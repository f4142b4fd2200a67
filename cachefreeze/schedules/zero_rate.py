"""Freeze what a learning-rate scheduler has annealed to zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cachefreeze.errors import ScheduleError
from cachefreeze.schedules.base import Clock, Ladder, Schedule


@dataclass(eq=False)
class FreezeAtZeroLR(Schedule):
    """Freeze leading blocks whose learning rate has come down to zero, whatever scheduler did it.

    A rate that starts at zero is a warm-up, not a freeze: only a block whose rate was above zero once can freeze. What
    is frozen stays so when its rate rises again.
    """

    planned: ClassVar[bool] = False
    _warm: set[int] = field(default_factory=set, init=False, repr=False)
    _frozen: int = field(default=0, init=False, repr=False)

    @property
    def drives_rates(self) -> bool:
        """It reads them."""
        return True

    def observe(self, clock: Clock, ladder: Ladder, rates: Sequence[float]) -> None:
        """Take notice of the learning rates before a step.

        Args:
            clock: Now.
            ladder: The blocks.
            rates: The learning rate of every block.
        """
        if len(rates) != len(ladder):
            raise ScheduleError(f"{len(rates)} learning rates for {len(ladder)} blocks; expected one each")
        self._warm |= {index for index, rate in enumerate(rates) if rate > 0}
        while self._frozen < ladder.body and self._frozen in self._warm and rates[self._frozen] <= 0:
            self._frozen += 1

    def frozen(self, clock: Clock, ladder: Ladder) -> int:
        """Leading blocks whose rate has reached zero."""
        return self._frozen

    def factors(self, clock: Clock, ladder: Ladder) -> tuple[float, ...]:
        """1 everywhere: the rates are the scheduler's."""
        return (1.0,) * len(ladder)

    def state_dict(self) -> dict[str, Any]:
        """Which blocks have had a rate, and how many are frozen."""
        return {**super().state_dict(), "warm": sorted(self._warm), "frozen": self._frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        self._warm = set(state["warm"])
        self._frozen = int(state["frozen"])
