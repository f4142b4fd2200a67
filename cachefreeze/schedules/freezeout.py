"""FreezeOut: every block anneals its own learning rate to zero, the first ones sooner, and freezes there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from cachefreeze.errors import ScheduleError
from cachefreeze.schedules.base import Clock, Ladder, Schedule, in_range

_POWERS = {"linear": 1, "squared": 2, "cubic": 3}


@dataclass(frozen=True)
class FreezeOut(Schedule):
    """Freeze blocks one after another, each when its own cosine has reached zero.

    Of L blocks before the head, block i freezes when ``r_i = f(t0 + (1 - t0) * i / L)`` of the run's optimizer steps
    are done. Until then, at progress p, its learning rate is the user's times ``(1 + cos(pi * p / r_i)) / 2``, and
    divided by r_i when scaled, so that every block travels as far. The head (classifier, final norm) has r = 1 and
    never freezes.

    Args:
        t0: Above 0 to 1, taken before the power: with 0.8 and cubic the first block freezes at 0.512 of the run.
        how: f: ``linear``, ``squared`` or ``cubic``.
        scale_lr: Divide by r_i.
        anneal: False leaves learning rates alone and decides only when to freeze.

    Source: https://arxiv.org/abs/1706.04983, and the authors' code at https://github.com/ajbrock/FreezeOut, which
        counts 1,000 steps an epoch whatever the data; here progress is that of the run.
    """

    t0: float = 0.8
    how: Literal["linear", "squared", "cubic"] = "cubic"
    scale_lr: bool = True
    anneal: bool = True

    def __post_init__(self) -> None:
        in_range("t0", self.t0, 0, 1, low_open=True)
        if self.how not in tuple(_POWERS):
            raise ScheduleError(f"how={self.how!r}: expected one of {', '.join(_POWERS)}")
        for name in ("scale_lr", "anneal"):
            if not isinstance(getattr(self, name), bool):
                raise ScheduleError(f"{name}={getattr(self, name)!r}: expected True or False")

    @property
    def drives_rates(self) -> bool:
        """Unless it decides only when."""
        return self.anneal

    def ratios(self, count: int) -> tuple[float, ...]:
        """r_i of ``count`` blocks before the head: the share of the run after which each is frozen."""
        return _ratios(self.t0, _POWERS[self.how], count)

    def frozen(self, clock: Clock, ladder: Ladder) -> int:
        """Blocks whose learning rate has reached zero; r_i grows with i, so they are leading ones."""
        return sum(clock.step >= clock.step_of(ratio) for ratio in self.ratios(ladder.body))

    def factors(self, clock: Clock, ladder: Ladder) -> tuple[float, ...]:
        """The cosine of each block; 0 once it is frozen."""
        if not self.anneal:
            return super().factors(clock, ladder)
        frozen = self.frozen(clock, ladder)
        ratios = (*self.ratios(ladder.body), *(1.0 for _ in range(ladder.head)))
        return tuple(self._cosine(clock.progress, r) if i >= frozen else 0.0 for i, r in enumerate(ratios))

    def _cosine(self, progress: float, ratio: float) -> float:
        scale = 1 / ratio if self.scale_lr else 1.0
        return 0.5 * scale * (1 + math.cos(math.pi * progress / ratio))


@lru_cache
def _ratios(t0: float, power: int, count: int) -> tuple[float, ...]:
    return tuple((t0 + (1 - t0) * i / count) ** power for i in range(count))
