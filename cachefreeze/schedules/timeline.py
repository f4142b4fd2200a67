"""A schedule before it runs: which block freezes at which step, learning rates over time, what the field advises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from cachefreeze.errors import ScheduleError
from cachefreeze.schedules.base import Clock, Ladder, Schedule

# Share of training before which freezing costs accuracy: what a block has not learned by then it never will.
TOO_EARLY = 0.1
# Steps looked at in any case: all of a short run, and of a long one enough for a schedule that goes to and fro.
_LOOKED_AT = 4096
_SHOWN_AT = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Timeline:
    """What a schedule will do in a run.

    Attributes:
        ladder: The blocks.
        run: The clock at step 0.
        moves: (step, number of frozen leading blocks), at step 0 and wherever it changes.
        steps: The steps at which ``factors`` were sampled, ascending.
        factors: Per sampled step, per block, what its learning rate is multiplied with.
    """

    ladder: Ladder
    run: Clock
    moves: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    factors: tuple[tuple[float, ...], ...]

    def spans(self, block: int) -> list[tuple[int, int]]:
        """The steps [from, to) during which a block is frozen."""
        ends = [*(step for step, _ in self.moves[1:]), self.run.steps]
        spans: list[tuple[int, int]] = []
        for (step, frozen), end in zip(self.moves, ends, strict=True):
            if block < frozen and spans and spans[-1][1] == step:
                spans[-1] = (spans[-1][0], end)
            elif block < frozen:
                spans.append((step, end))
        return spans

    def table(self, lr: float = 1.0) -> str:
        """One line a block: when it is frozen, in steps and epochs, and its learning rate at quarters of the run.

        Args:
            lr: The optimizer's learning rate.
        """
        shown = [self._nearest(share) for share in _SHOWN_AT]
        header = ["block", "frozen, steps", "epochs", "of the run", *(f"lr at {share:.0%}" for share in _SHOWN_AT)]
        rows = [header]
        for index, name in enumerate(self.ladder.names):
            spans = self.spans(index)
            rates = [f"{lr * self.factors[at][index]:.3g}" for at in shown]
            rows.append([name, *(self._spell(spans, unit) for unit in ("step", "epoch", "share")), *rates])
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )

    def _nearest(self, share: float) -> int:
        step = min(self.run.step_of(share), self.run.steps - 1)
        return min(range(len(self.steps)), key=lambda index: abs(self.steps[index] - step))

    def _spell(self, spans: list[tuple[int, int]], unit: str) -> str:
        def at(step: int) -> str:
            clock = replace(self.run, step=step)
            return {"step": str(step), "epoch": f"{clock.epoch:.2f}", "share": f"{clock.progress:.1%}"}[unit]

        texts = [f"{at(a)}-" if b == self.run.steps else f"{at(a)}-{at(b)}" for a, b in spans]
        return ", ".join(texts) or "never"


def timeline(schedule: Schedule, ladder: Ladder, *, steps: int, epochs: int, samples: int = 400) -> Timeline:
    """Run a schedule's clock without training.

    Args:
        schedule: One that decides by time alone.
        ladder: The model's blocks.
        steps: Optimizer steps of the run.
        epochs: Of the run.
        samples: Steps at which learning rates are noted, beside those of the moves and quarters.

    Raises:
        ScheduleError: The schedule decides from what it observes, or cannot drive this model and run.
    """
    if not schedule.planned:
        raise ScheduleError(f"{schedule!r} decides from what it observes in training; there is nothing to show before")
    run = Clock(step=0, steps=steps, epochs=epochs)
    schedule.check(run, ladder)
    marks = {0, steps - 1, *schedule.turns(run), *(index * steps // _LOOKED_AT for index in range(_LOOKED_AT))}
    moves = _moves(lambda step: schedule.frozen(replace(run, step=step), ladder), sorted(marks))
    sampled = {step for step, _ in moves} | {step - 1 for step, _ in moves[1:]} | {steps - 1}
    sampled |= {min(run.step_of(share), steps - 1) for share in _SHOWN_AT}
    sampled |= {index * steps // samples for index in range(samples)}
    ordered = tuple(sorted(sampled))
    factors = tuple(schedule.factors(replace(run, step=step), ladder) for step in ordered)
    return Timeline(ladder, run, tuple(moves), ordered, factors)


def _moves(frozen: Callable[[int], int], marks: list[int]) -> list[tuple[int, int]]:
    """(step, blocks frozen from then on), at the first mark and at every change, found by bisection between marks."""
    found = [(marks[0], frozen(marks[0]))]
    spans = list(reversed(list(pairwise(marks))))
    while spans:
        begin, end = spans.pop()
        if frozen(end) == found[-1][1]:
            continue
        middle = (begin + end) // 2
        if middle == begin:
            found.append((end, frozen(end)))
        else:
            spans += [(middle, end), (begin, middle)]
    return found


def advice(shown: Timeline) -> list[str]:
    """What the field's experience says against a schedule, a sentence each; warnings, not walls.

    A block that is frozen from the first step is taken for a pretrained one.
    """
    sentences = []
    freezes = [(step, after) for (_, before), (step, after) in pairwise(shown.moves) if after > before]
    if not freezes and shown.moves[0][1] == 0:
        sentences.append("nothing is ever frozen, so there is nothing to cache")
    early = [(step, after) for step, after in freezes if step < TOO_EARLY * shown.run.steps]
    if early:
        step, after = early[0]
        sentences.append(
            f"{shown.ladder.names[after - 1]!r} freezes at step {step} of {shown.run.steps} "
            f"({step / shown.run.steps:.1%}), before a tenth of training: blocks frozen so early cost accuracy"
        )
    return sentences
