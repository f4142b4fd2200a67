"""A schedule put into effect: its decisions reach the model's flags and locks, and the optimizer's learning rates.

Parameters freeze on the optimizer step at which the schedule says so. They thaw when the next epoch begins: rows that
lie behind a thawed block stand for a model that is no longer there, and within an epoch there are no others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from cachefreeze.errors import CheckpointError, ScheduleError, UsageError
from cachefreeze.freezing import boundary_event, freeze_before, frozen_here
from cachefreeze.observing import Observer, observer_of
from cachefreeze.rates import BlockRates, parameter_blocks
from cachefreeze.schedules import Clock, FreezeAtZeroLR, Ladder, Schedule
from cachefreeze.tracing import Example, Usage, record_usage

# A loss scaler skips steps now and then; an epoch with fewer than this share of its steps accumulates gradients.
_NEARLY_ALL = 0.75


class Staging:
    """One run of a model under a schedule.

    Args:
        model: Nothing of it frozen by :func:`cachefreeze.freeze`: the schedule does that.
        schedule: What decides.

    Attributes:
        schedule: What decides.
        frozen: How many leading blocks are frozen now.
        clock: How much of the run is done; None before its first epoch.
    """

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        if frozen_here(model):
            raise UsageError(
                "the schedule decides what is frozen, and cf.freeze froze some already: cf.unfreeze(model)"
            )
        self.schedule = schedule
        self.frozen = 0
        self.clock: Clock | None = None
        self._model = model
        self._read: tuple[Usage, Ladder] | None = None
        self._rates: BlockRates | None = None
        self._probe: Callable[[], Example] | None = None
        self._observer: Observer | None = None
        self._resumed: dict[str, int] | None = None
        self._end = 0
        self._stepped = 0

    @property
    def ladder(self) -> Ladder:
        """The blocks.

        Raises:
            UsageError: There is no loader yet, and so no sample to read the order of use with.
        """
        return self._reading()[1]

    @property
    def usage(self) -> Usage:
        """What a forward of the model uses, in order.

        Raises:
            UsageError: There is no loader yet.
        """
        return self._reading()[0]

    @property
    def boundary(self) -> str | None:
        """The first block that trains; None while all do."""
        return self.ladder.boundary(self.frozen)

    def read(self, example: Example, probe: Callable[[], Example]) -> None:
        """Take the order of blocks from a forward of the model; ``probe`` gives the samples that checks look at."""
        if self._read is None:
            self._probe = probe
            usage = record_usage(self._model, example)
            self._read = usage, Ladder.of_usage(self._model, usage)

    def attach(self, optimizer: Optimizer) -> None:
        """Split an optimizer's groups by block, count its steps, and let the schedule multiply its learning rates.

        Raises:
            UsageError: It is attached already, has a scheduler, knows no groups, or lacks parameters that train.
        """
        if self._rates is not None:
            raise UsageError("this engine has an optimizer already; one schedule drives one optimizer")
        usage, ladder = self._reading()
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, p in self._model.named_parameters() if p.requires_grad and id(p) not in held]
        if missing:
            raise UsageError(
                f"the optimizer lacks {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}, which train "
                "under this schedule: give it all of model.parameters()"
            )
        assert self._probe is not None  # known since the order of blocks is
        blocks = parameter_blocks(self._model, ladder, usage)
        rates = BlockRates(optimizer, blocks, ladder.names)
        self._observer = observer_of(self.schedule, self._model, ladder, blocks, self._probe)
        # in this order: what freezes before a step is decided from the user's own rates
        optimizer.register_step_pre_hook(self._before_step)
        rates.start()
        optimizer.register_step_post_hook(self._after_step)
        self._rates = rates

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Set the clock to the beginning of an epoch, and freeze or thaw what the schedule says.

        Args:
            epoch: Counted from 0.
            epochs: Of the whole run.
            steps: Optimizer steps of one epoch.
        """
        now = Clock(step=epoch * steps, steps=epochs * steps, epochs=epochs)
        if self.clock is None:
            self._begin(now)
        elif self._stepped and not _NEARLY_ALL * steps <= self._stepped <= steps:
            warnings.warn(
                f"the last epoch had {self._stepped} optimizer steps, and the schedule counts {steps} an epoch: pass "
                f"steps_per_epoch={self._stepped} to engine.epochs()",
                stacklevel=4,
            )
        self.clock, self._end, self._stepped = now, now.step + steps, 0
        self._decide(thaw=True)

    def upcoming(self) -> list[int]:
        """How many blocks are frozen at the beginning of each epoch from this one on.

        What decides by observing is taken to decide no more.
        """
        if self.clock is None:
            return []
        per_epoch = self.clock.steps // self.clock.epochs
        later = range(self.clock.step + per_epoch, self.clock.steps, per_epoch)
        if not self.schedule.planned:
            return [self.frozen] * (1 + len(later))
        return [self.frozen, *(self.schedule.frozen(replace(self.clock, step=at), self.ladder) for at in later)]

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state, and the length of the run that it counts by."""
        length = None if self.clock is None else {"steps": self.clock.steps, "epochs": self.clock.epochs}
        return {"schedule": self.schedule.state_dict(), "length": length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, from the next epoch's beginning."""
        self.schedule.load_state_dict(state["schedule"])
        self._resumed = state["length"]
        self.clock = None

    def _reading(self) -> tuple[Usage, Ladder]:
        if self._read is None:
            raise UsageError(
                "make the loaders first (engine.loader): a sample shows the order in which blocks are used"
            )
        return self._read

    def _begin(self, now: Clock) -> None:
        usage, ladder = self._reading()
        self.schedule.check(replace(now, step=0), ladder)
        if self.schedule.drives_rates and self._rates is None:
            raise UsageError(
                f"{self.schedule!r} drives learning rates: call engine.attach(optimizer) before the epochs"
            )
        if self.schedule.checks and self._rates is None:
            raise UsageError(
                f"{self.schedule!r} looks at what optimizer steps do: call engine.attach(optimizer) before the epochs, "
                "or give it checks=0 and call observe() in the loop"
            )
        length = {"steps": now.steps, "epochs": now.epochs}
        if self._resumed not in (None, length):
            raise CheckpointError(
                f"the schedule was counting {self._resumed}, this run is {length}: resume with the same length, or it "
                "would freeze at other steps"
            )
        moments = [*range(0, now.steps, now.steps // now.epochs), now.steps - 1] if self.schedule.planned else []
        deepest = max((self.schedule.frozen(replace(now, step=at), ladder) for at in moments), default=ladder.body)
        start = boundary_event(self._model, ladder.names[deepest], usage)
        if not any(event >= start for event in usage.parameters.values()):
            raise ScheduleError(
                f"all weights from {ladder.names[deepest]!r} on are tied to earlier blocks and would freeze with them, "
                "and then nothing trains: let the schedule end at an earlier block, or untie them"
            )

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.clock is None or self._rates is None:
            raise UsageError("the optimizer steps outside engine.epochs(), which is the schedule's clock")
        if self._observer is not None:
            self._observer.before_step()
        if isinstance(self.schedule, FreezeAtZeroLR):
            self.schedule.observe(self.clock, self.ladder, self._rates.of_blocks())
            self._decide(thaw=False)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped += 1
        if self.clock is not None and self.clock.step < self._end:
            self.clock = replace(self.clock, step=self.clock.step + 1)
            if self._observer is not None and self._rates is not None:
                self._observer.after_step(self.clock, max(self._rates.of_blocks()))
            # the last step's decision is the next epoch's, or nobody's
            if self.clock.step < self._end:
                self._decide(thaw=False)

    def _decide(self, *, thaw: bool) -> None:
        """Ask the schedule, and put its answer into effect."""
        if self.clock is None:
            return
        usage, ladder = self._reading()
        decision = self.schedule.at(self.clock, ladder)
        if decision.frozen > self.frozen or (thaw and decision.frozen < self.frozen):
            freeze_before(self._model, ladder.boundary(decision.frozen), usage)
            self.frozen = decision.frozen
        if self._rates is not None:
            self._rates.factors = decision.factors
