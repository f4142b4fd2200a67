"""``prefix="optimized"``: rows made by a rewritten copy of the prefix, chosen by measuring on real samples."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cachefreeze.errors import UsageError
from cachefreeze.frozen_prefix import FrozenPrefix
from cachefreeze.inference import Form, InferenceCopy, Optimized, relative_error
from cachefreeze.isolation import preserved_random_state
from cachefreeze.portions import Portions
from cachefreeze.reporting import prefix_line
from cachefreeze.running import NumericMode
from cachefreeze.splitting import Parts
from cachefreeze.tracing import Example

_LOG = logging.getLogger("cachefreeze")

# Samples that are measured with: so small a share of the rows to be made, but enough to tell an error.
_MEASURED_SHARE = 1 / 64
_MEASURED_SAMPLES = (8, 16)
# Measuring costs what 30 to 40 exact rows do, and may save half of the rest: fewer rows than this cannot pay for it.
_FEWEST_ROWS = 128
# Copying and recording a vision model takes some tenths of a second besides, whatever a row costs.
_SHORTEST_SECONDS = 2.0
# Samples at a time that are tried on a CPU. Activations of a whole batch are mapped and unmapped at every layer, which
# was 57 % of the time at 64 samples; on a GPU the whole batch is best.
_SIZES = (4, 8, 16)
_FIRST_SIZE = 8
# Below this a gain is noise, and exact rows are worth more.
_WORTHWHILE = 1.05
# Compiling a vision model takes about a minute of two cores and saves at most a third of the time: a shorter fill
# cannot pay for it.
_COMPILE_FROM_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How rows are made, and what was measured to decide so: nothing where ``samples`` is 0. Seconds are of one sample.

    Attributes:
        form: Of the copy; None: the exact prefix.
        size: Samples at a time; None: as many as a batch has.
        folded: Batch norms that were folded.
        error: Against the exact prefix, relative to a sample's largest magnitude.
        samples: Real samples that this was measured on.
        declined: What was tried or considered and not taken, and why.
    """

    form: Form | None = None
    size: int | None = None
    folded: int = 0
    seconds: float = 0.0
    exact_seconds: float = 0.0
    error: float = 0.0
    tolerance: float
    samples: int = 0
    declined: tuple[str, ...]

    @property
    def gain(self) -> float:
        """How many times as fast as the exact prefix, which takes all the samples measured at once."""
        return self.exact_seconds / self.seconds

    def facts(self) -> dict[str, Any]:
        """For reports."""
        if not self.samples:
            return {"choice": "exact", "tolerance": self.tolerance, "declined": list(self.declined)}
        return {
            "choice": "exact" if self.form is None else f"{self.folded} batch norms {self.form}",
            **{key: value for key, value in asdict(self).items() if key not in ("form", "declined")},
            "gain": self.gain,
            "declined": list(self.declined),
        }


class OptimizedPrefix(FrozenPrefix):
    """A prefix whose rows are made by a rewritten copy. The choice is made on the first batch that it is given.

    Stored rows are compared with those of the exact prefix when a store is opened, so that a full one needs no copy.
    """

    def __init__(self, parts: Parts, mode: NumericMode, dtype: str | torch.dtype | None, wanted: Optimized) -> None:
        if wanted.dtype is not None and mode.autocast is not None:
            raise UsageError(
                f"Optimized(dtype={wanted.dtype}) and autocast={mode.autocast} both say in which precision the prefix "
                "computes: leave one out"
            )
        super().__init__(parts, mode, dtype)
        self.tolerance = wanted.allowed(mode.autocast, self.device)
        self._wanted = wanted
        self._choice: Choice | None = None
        self._copy: InferenceCopy | None = None
        self._own_portions = Portions()

    def run(self, example: Example, count: int) -> list[Tensor]:
        """Activations within the tolerance of the exact ones."""
        example = example.to(self.device)
        choice = self.choose(example, count)
        if choice.form is None and choice.size is None:
            return super().run(example, count)
        if choice.form is None:
            return self._run(self.parts.prefix, example, count, self._own_portions)
        if self._copy is None:  # rows are computed again after all were there
            self._copy = InferenceCopy(self.parts, replace(choice.form, compiled=False), example)
        return self._run(self._copy, example, count, self._own_portions)

    def choose(self, example: Example, count: int) -> Choice:
        """How rows are made from now on, measured on ``count`` samples unless it is decided."""
        if self._choice is None:
            with preserved_random_state(), torch.no_grad():
                self._choose(example, count)
        assert self._choice is not None
        return self._choice

    def identity(self) -> dict[str, str]:
        """Rows of two choices are alike within the tolerance, so it stands for all of them."""
        dtype = "" if self._wanted.dtype is None else f" {str(self._wanted.dtype).removeprefix('torch.')}"
        return {**super().identity(), "prefix": f"optimized{dtype} within {self.tolerance:g}"}

    def facts(self) -> dict[str, Any]:
        """The choice, once there is one."""
        if self._choice is None:
            return {"choice": "optimized", "tolerance": self.tolerance}
        return self._choice.facts()

    def release(self) -> None:
        """Free the copy's weights."""
        self._copy = None

    def _choose(self, example: Example, count: int) -> None:
        if self.rows_ahead < _FEWEST_ROWS:
            few = f"only {self.rows_ahead} rows were to be computed"
            self._take(Choice(tolerance=self.tolerance, declined=(few,)), None)
            return
        samples = count
        if self.device.type == "cpu":
            fewest, most = _MEASURED_SAMPLES
            samples = min(count, max(fewest, min(most, int(self.rows_ahead * _MEASURED_SHARE))))
        trial = _Trial(self, example.take([i % count for i in range(max(samples, 2))]), self._wanted)
        choice = trial.choose()
        self._take(choice, trial.copy)

    def _take(self, choice: Choice, made: InferenceCopy | None) -> None:
        """Make rows this way from now on, and say so."""
        self._choice, self._copy = choice, made
        self._own_portions = Portions(choice.size)
        refused = any(reason.startswith("refused") for reason in choice.declined)
        level = logging.WARNING if refused else logging.INFO
        _LOG.log(level, "%r: %s", self.parts.boundary.name, prefix_line(choice.facts()))


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """One way of making rows that was measured and found within the tolerance."""

    form: Form | None
    size: int | None
    seconds: float
    error: float


class _Trial:
    """Measures ways of making rows on one batch of real samples and compares each with the exact prefix.

    Attributes:
        copy: Of the prefix, once the choice is made in the form chosen; None where that is the exact prefix.
    """

    def __init__(self, prefix: OptimizedPrefix, some: Example, wanted: Optimized) -> None:
        self.copy: InferenceCopy | None = None
        self._prefix = prefix
        self._some = some
        self._wanted = wanted
        self._on_cpu = prefix.device.type == "cpu"
        self._first_size = min(_FIRST_SIZE, some.batch) if self._on_cpu else None
        self._declined: list[str] = []
        self._rows = prefix.exact(some.fresh(), some.batch)  # the first call of a shape is slower, and not timed
        self._exact = _Candidate(form=None, size=None, seconds=self._timed(prefix.parts.prefix, None)[0], error=0.0)

    def choose(self) -> Choice:
        """Measure, and leave the copy in the form of the best candidate."""
        best = self._best()
        if best.form is None:
            self.copy = None
        elif self.copy is not None and self.copy.form != best.form:
            self.copy.become(best.form)
        return Choice(
            form=best.form,
            size=best.size,
            folded=0 if self.copy is None else self.copy.folded,
            seconds=best.seconds,
            exact_seconds=self._exact.seconds,
            error=best.error,
            tolerance=self._prefix.tolerance,
            samples=self._some.batch,
            declined=tuple(self._declined),
        )

    def _best(self) -> _Candidate:
        """The fastest candidate within the tolerance."""
        predicted = self._prefix.rows_ahead * self._exact.seconds
        if predicted < _SHORTEST_SECONDS:
            self._declined.append(f"the exact fill is predicted to take {predicted:.1f} s")
            return self._exact
        found: list[_Candidate] = []
        for dtype in dict.fromkeys([self._wanted.dtype, None]):
            found += self._forms(dtype) if not found else []
        best = self._fastest([self._exact, *found])
        if self._on_cpu:
            sizes = {size for size in _SIZES if size <= self._some.batch} - {best.size}
            best = self._fastest([best, *(c for size in sorted(sizes) for c in self._measured(best.form, size))])
        best = self._fastest([best, *self._when_compiled(best)])
        if self._exact.seconds < _WORTHWHILE * best.seconds:
            self._declined.append("no other way was faster by 5 %")
            return self._exact
        return best

    def _forms(self, dtype: torch.dtype | None) -> list[_Candidate]:
        """Of a copy in some dtype; what may be wrong with a copy of somebody's modules is anything."""
        form = Form(dtype=dtype)
        try:
            self.copy = InferenceCopy(self._prefix.parts, form, self._some)
        except Exception as error:
            self._refuse(form, error)
            return []
        changes = self.copy.folded > 0 or dtype is not None
        last = [replace(form, channels_last=True)] if self.copy.has_convolutions else []
        tried = [form, *last] if changes else [None, *last]  # nothing folded: a copy as it is would be the exact prefix
        return [candidate for form in tried for candidate in self._measured(form, self._first_size)]

    def _when_compiled(self, best: _Candidate) -> list[_Candidate]:
        """The best candidate compiled, where that may pay."""
        if best.form is None or self._wanted.compile is False:
            return []
        predicted = self._prefix.rows_ahead * best.seconds
        if self._wanted.compile is None and predicted < _COMPILE_FROM_SECONDS:
            self._declined.append(f"not compiled: the fill is predicted to take {predicted:.0f} s")
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own compiler
            return self._measured(replace(best.form, compiled=True), best.size)

    def _measured(self, form: Form | None, size: int | None) -> list[_Candidate]:
        """One candidate, timed once it is warm and compared; none where it fails or its error is too large."""
        try:
            if form is None or self.copy is None:
                target: Callable[..., Any] = self._prefix.parts.prefix
            else:
                target = self.copy
                if self.copy.form != form:
                    self.copy.become(form)
            warm = self._some.batch if size is None else size
            self._prefix._run(target, self._some.take(list(range(warm))), warm, Portions(size))
            seconds, rows = self._timed(target, size)
        except Exception as error:  # a compiler that is not there, an op that has no kernel for a dtype
            self._refuse(form, error)
            return []
        off = relative_error(self._prefix.parts.boundary.tensors, self._rows, rows)
        if off > self._prefix.tolerance:
            self._refuse(form, f"error {off:.1e} beyond {self._prefix.tolerance:.0e}")
            return []
        return [_Candidate(form=form, size=size, seconds=seconds, error=off)]

    def _timed(self, target: Callable[..., Any], size: int | None) -> tuple[float, list[Tensor]]:
        """Seconds of a sample, and the activations."""
        given = self._some.fresh()
        self._wait()
        began = time.perf_counter()
        rows = self._prefix._run(target, given, self._some.batch, Portions(size))
        self._wait()
        return (time.perf_counter() - began) / self._some.batch, rows

    @staticmethod
    def _fastest(found: list[_Candidate]) -> _Candidate:
        return min(found, key=lambda candidate: candidate.seconds)

    def _refuse(self, form: Form | None, why: Exception | str) -> None:
        first = "".join((why if isinstance(why, str) else f"{type(why).__name__}: {why}").splitlines()[:1])
        self._declined.append(f"refused {'exact' if form is None else form}: {first}")

    def _wait(self) -> None:
        if not self._on_cpu:
            torch.cuda.synchronize(self._prefix.device)  # needs CUDA


def prefix_of(
    parts: Parts, mode: NumericMode, dtype: str | torch.dtype | None, prefix: str | Optimized
) -> FrozenPrefix:
    """The prefix as ``prefix=`` asks for it."""
    wanted = Optimized.of(prefix)
    return FrozenPrefix(parts, mode, dtype) if wanted is None else OptimizedPrefix(parts, mode, dtype, wanted)
