"""Schedules with one rule: freeze all but the last blocks, or thaw block after block."""

from __future__ import annotations

from dataclasses import dataclass

from cachefreeze.schedules.base import Clock, Ladder, Schedule, in_range, whole


@dataclass(frozen=True)
class AllButLast(Schedule):
    """Freeze all but the last blocks, at once or after a share of the run.

    Args:
        count: Blocks that train on, counted as ``cf.freeze(train_last=count)`` counts them.
        start: Share of the run during which everything trains, 0 to 1.
    """

    count: int
    start: float = 0.0

    def __post_init__(self) -> None:
        whole("count", self.count, 1)
        in_range("start", self.start, 0, 1)

    def frozen(self, clock: Clock, ladder: Ladder) -> int:
        """Nothing before ``start``, then all but the last blocks."""
        before = ladder.before_last(self.count)
        return before if clock.step >= clock.step_of(self.start) else 0


@dataclass(frozen=True)
class GradualUnfreezing(Schedule):
    """Train the head first and thaw one more block, from the last to the first, after every so many epochs.

    Args:
        every: Epochs, or a fraction of one, between two blocks.
        decay: Each block's learning rate is the next one's divided by this; ULMFiT takes 2.6, and 1 keeps them equal.

    Source: https://arxiv.org/abs/1801.06146, sections 3.2 (discriminative rates) and 3.3 (gradual unfreezing).
    """

    every: float = 1.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        in_range("every", self.every, 0, float("inf"), low_open=True)
        in_range("decay", self.decay, 1, float("inf"))

    @property
    def drives_rates(self) -> bool:
        """Where blocks differ."""
        return self.decay != 1

    def frozen(self, clock: Clock, ladder: Ladder) -> int:
        """All before the head, less those that were thawed."""
        thawed = 0
        while thawed < ladder.body and clock.step >= clock.step_of_epoch((thawed + 1) * self.every):
            thawed += 1
        return ladder.body - thawed

    def factors(self, clock: Clock, ladder: Ladder) -> tuple[float, ...]:
        """1 for the head, and ``decay`` times less with each block before it."""
        frozen = self.frozen(clock, ladder)
        distance = [max(ladder.body - index, 0) for index in range(len(ladder))]
        return tuple(self.decay**-d if index >= frozen else 0.0 for index, d in enumerate(distance))
