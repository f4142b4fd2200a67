"""Freeze the front block once its activations on a probe batch have stopped changing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from cachefreeze.errors import ScheduleError
from cachefreeze.schedules.base import Clock, Ladder, Schedule, in_range, whole


def similarity(activations: Tensor) -> Tensor:
    """The similarities of a batch's samples to each other, each row of unit length.

    Shapes:
        activations: (b, *) -> (b, b), float64, on the CPU.

    Source: https://arxiv.org/abs/1907.09682, equation 1 (similarity-preserving knowledge distillation).
    """
    if activations.dim() < 2 or len(activations) < 2:
        raise ScheduleError(
            f"activations of shape {tuple(activations.shape)}: expected (samples, …), 2 samples or more"
        )
    flat = activations.detach().flatten(1).to("cpu", torch.float64)
    return torch.nn.functional.normalize(flat @ flat.T, dim=1)


def slope(values: list[float]) -> float:
    """Of the least-squares line through equally spaced values."""
    middle = (len(values) - 1) / 2
    mean = sum(values) / len(values)
    spread = sum((index - middle) ** 2 for index in range(len(values)))
    return sum((index - middle) * (value - mean) for index, value in enumerate(values)) / spread


@dataclass(eq=False)
class Plasticity(Schedule):
    """Freeze the front block when what it makes of a fixed probe batch has settled.

    Its plasticity at a check is ``||G - G'||_F ** 2 / b ** 2``, where G is the :func:`similarity` of the front block's
    activations now and G' that at the last check. A block settles when the slope of its plasticity over a window
    stays, for ``patience`` checks, under ``threshold`` times the slope of its first window. Then the next block is in
    front, and starts with an empty window.

    Give every check the same probe batch, in eval mode and without gradients, and space the checks evenly: a
    plasticity is a change per check.

    Args:
        window: Plasticities that a slope is fitted to, 2 or more.
        threshold: Share of the first slope.
        patience: Checks in a row under the threshold before a freeze.
        start: Share of the run before which nothing freezes.
        checks: How often in an epoch the engine makes a check with a probe batch of its own; 0: never, the training
            loop calls :meth:`observe`.
        thaw: Thaw everything when the learning rate falls to this share of what it was at the last freeze: a drop
            sets blocks in motion again. None never thaws.

    Source: https://arxiv.org/abs/2201.06227 (Egeria), section 4, which compares with a quantised reference model of
        its own; here the reference is the block itself at the last check.
    """

    window: int = 5
    threshold: float = 0.2
    patience: int = 2
    start: float = 0.1
    checks: int = 4
    thaw: float | None = None
    planned: ClassVar[bool] = False
    _frozen: int = field(default=0, init=False, repr=False)
    _rate: float | None = field(default=None, init=False, repr=False)
    _last: Tensor | None = field(default=None, init=False, repr=False)
    _history: list[float] = field(default_factory=list, init=False, repr=False)
    _first: float | None = field(default=None, init=False, repr=False)
    _calm: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        whole("window", self.window, 2)
        whole("patience", self.patience, 1)
        in_range("threshold", self.threshold, 0, 1, low_open=True)
        in_range("start", self.start, 0, 1)
        whole("checks", self.checks, 0)
        if self.thaw is not None:
            in_range("thaw", self.thaw, 0, 1, low_open=True)

    def front(self, ladder: Ladder) -> str | None:
        """The block whose activations the next check wants; None when all but the head are frozen."""
        return ladder.names[self._frozen] if self._frozen < ladder.body else None

    def observe(self, clock: Clock, ladder: Ladder, activations: Tensor, rate: float | None = None) -> float | None:
        """Make one check.

        Args:
            clock: Now.
            ladder: The blocks.
            activations: What block ``front(ladder)`` makes of the probe batch, (b, *).
            rate: The learning rate that would thaw; needed where ``thaw`` is given.

        Returns:
            The block's plasticity; None at its first check.
        """
        if self.thaw is not None and rate is None:
            raise ScheduleError(f"thaw={self.thaw} watches the learning rate; pass rate= to observe()")
        if self.front(ladder) is None and self.thaw is None:
            raise ScheduleError("all but the head are frozen: there is nothing left to observe")
        if self._thaws(rate):
            self._frozen, self._rate = 0, None
            self._forget()
            return None
        if self.front(ladder) is None:
            return None
        found, last = similarity(activations), self._last
        self._last = found
        if last is None:
            return None
        if last.shape != found.shape:
            raise ScheduleError(
                f"a probe of {len(found)} samples after one of {len(last)}; use the same one throughout"
            )
        plasticity = float((found - last).square().sum()) / len(found) ** 2
        self._history = [*self._history, plasticity][-self.window :]
        if self._settled() and clock.step >= clock.step_of(self.start):
            self._frozen += 1
            self._rate = rate
            self._forget()
        return plasticity

    def frozen(self, clock: Clock, ladder: Ladder) -> int:
        """The blocks that have settled."""
        return self._frozen

    def state_dict(self) -> dict[str, Any]:
        """What was seen of the block in front, and how many are behind it."""
        return {
            **super().state_dict(),
            "frozen": self._frozen,
            "rate": self._rate,
            "last": self._last,
            "history": list(self._history),
            "first": self._first,
            "calm": self._calm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        self._frozen, self._rate, self._last = state["frozen"], state["rate"], state["last"]
        self._history, self._first, self._calm = list(state["history"]), state["first"], state["calm"]

    def _settled(self) -> bool:
        if len(self._history) < self.window:
            return False
        steep = abs(slope(self._history))
        if self._first is None:
            self._first = steep
            return False
        self._calm = self._calm + 1 if steep <= self.threshold * self._first else 0
        return self._calm >= self.patience

    def _thaws(self, rate: float | None) -> bool:
        if self.thaw is None or rate is None or self._rate is None:
            return False
        return rate <= self.thaw * self._rate

    def _forget(self) -> None:
        self._last, self._first = None, None
        self._history, self._calm = [], 0
