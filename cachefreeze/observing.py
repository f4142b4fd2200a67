"""What a schedule that decides by observing is shown while a run trains, so that no loop has to do it.

Checks are evenly spaced within an epoch, the last one after its last step: whatever is summed in between is empty when
an epoch ends, so that a checkpoint need not hold it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from cachefreeze.batches import leaves_of
from cachefreeze.errors import ScheduleError
from cachefreeze.isolation import evaluating
from cachefreeze.schedules import Clock, GradientChange, Ladder, Plasticity, Schedule
from cachefreeze.tracing import Example


class Observer(ABC):
    """Shows a schedule what it wants to see, around optimizer steps.

    Args:
        checks: An epoch.
    """

    def __init__(self, checks: int) -> None:
        self._checks = checks

    def before_step(self) -> None:  # noqa: B027
        """The gradients of a step are there."""

    def after_step(self, clock: Clock, rate: float) -> None:
        """A step is done; ``rate`` is the largest learning rate of the user's."""
        length = clock.steps // clock.epochs
        within = (clock.step - 1) % length + 1
        if within in {-(-length * (check + 1) // self._checks) for check in range(self._checks)}:
            self._check(clock, rate)

    @abstractmethod
    def _check(self, clock: Clock, rate: float) -> None: ...


class ProbeObserver(Observer):
    """Activations of the front block on a fixed batch of samples, in eval mode, without a trace in the model."""

    def __init__(self, schedule: Plasticity, model: nn.Module, ladder: Ladder, probe: Callable[[], Example]) -> None:
        super().__init__(schedule.checks)
        self._schedule = schedule
        self._model = model
        self._ladder = ladder
        self._probe = probe
        self._example: Example | None = None

    def _check(self, clock: Clock, rate: float) -> None:
        front = self._schedule.front(self._ladder)
        if front is None and self._schedule.thaw is None:
            return
        # where all are frozen only the rate is looked at, which a thaw waits for
        activations = self._activations(front or self._ladder.names[0])
        self._schedule.observe(clock, self._ladder, activations, rate)

    def _activations(self, block: str) -> Tensor:
        if self._example is None:
            self._example = self._probe()
        found: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: object) -> None:
            found.extend(leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor))
            raise _ReachedError

        handle = self._model.get_submodule(block).register_forward_hook(keep)
        try:
            with evaluating(self._model):
                self._example.fresh().call(self._model)
        except _ReachedError:
            pass  # what follows the block is not looked at
        finally:
            handle.remove()
        if not found:
            raise ScheduleError(
                f"block {block!r} is not called by the model's forward, so its activations cannot be watched; give the "
                "schedule checks=0 and call observe() in the training loop"
            )
        return found[0]


class GradientObserver(Observer):
    """The L1 norm of every block's gradient, summed over the steps between two checks, as the optimizer sees it."""

    def __init__(self, schedule: GradientChange, model: nn.Module, ladder: Ladder, blocks: Mapping[int, int]) -> None:
        super().__init__(schedule.checks)
        self._schedule = schedule
        self._ladder = ladder
        self._parameters = [(parameter, blocks[id(parameter)]) for parameter in model.parameters()]
        self._sums: list[Tensor | None] = [None] * len(self._parameters)

    def before_step(self) -> None:
        """Add the gradients of this step."""
        for index, (parameter, _) in enumerate(self._parameters):
            if parameter.grad is None:
                self._sums[index] = None  # frozen: it counts no more
                continue
            held = self._sums[index]
            if held is None:
                self._sums[index] = parameter.grad.detach().clone()
            else:
                held.add_(parameter.grad)

    def _check(self, clock: Clock, rate: float) -> None:
        norms = [torch.zeros((), dtype=torch.float64)] * len(self._ladder)
        for held, (_, block) in zip(self._sums, self._parameters, strict=True):
            if held is not None:
                norms[block] = norms[block] + held.abs().sum(dtype=torch.float64).to("cpu")
        self._sums = [None] * len(self._parameters)
        self._schedule.observe(clock, self._ladder, [float(norm) for norm in norms])


class _ReachedError(Exception):
    """The watched block has run."""


def observer_of(
    schedule: Schedule, model: nn.Module, ladder: Ladder, blocks: Mapping[int, int], probe: Callable[[], Example]
) -> Observer | None:
    """What shows a schedule what it wants to see; None where it decides by time, or the loop calls ``observe``.

    Args:
        schedule: Of the run.
        model: The user's.
        ladder: Its blocks.
        blocks: For every parameter, by ``id``, the index of its block.
        probe: A few samples, the same ones in every run.
    """
    if isinstance(schedule, Plasticity) and schedule.checks:
        return ProbeObserver(schedule, model, ladder, probe)
    if isinstance(schedule, GradientChange) and schedule.checks:
        return GradientObserver(schedule, model, ladder, blocks)
    return None


# Samples of the probe batch: similarities of 32 are 1,024 numbers, which a check compares.
PROBE_SAMPLES = 32


def probe_rows(count: int) -> Sequence[int]:
    """Evenly spread indices of the probe's samples among ``count`` rows."""
    some = min(PROBE_SAMPLES, count)
    return [index * count // some for index in range(some)]
