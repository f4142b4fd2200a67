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
from cachefreeze.inference import Form, InferenceCopy, Optimized, relative_error
from cachefreeze.isolation import preserved_random_state
from cachefreeze.loader import NumericMode
from cachefreeze.portions import Portions
from cachefreeze.reporting import prefix_line
from cachefreeze.rows import FrozenPrefix
from cachefreeze.splitting import Parts
from cachefreeze.tracing import Example

_LOG = logging.getLogger("cachefreeze")

# Samples that are measured with: so small a share of the rows to be made, but enough to tell an error.
_MEASURED_SHARE = 1 / 64
_MEASURED_SAMPLES = (8, 16)
# Measuring costs what 30 to 40 exact rows do, and may save half of the rest: fewer rows than this cannot pay for it.
_FEWEST_ROWS = 128
# Samples at a time that are tried on a CPU. Activations of a whole batch are mapped and unmapped at every layer, which
# was 57 % of the time at 64 samples; on a GPU the whole batch is best.
_FIRST_SIZE = 8
_OTHER_SIZES = (4, 16)
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
            "choice": "exact" if self.form is None else f"{self.folded} batch norms folded, {self.form}",
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
        self.tolerance = wanted.allowed(mode.autocast)
        self._wanted = wanted
        self._choice: Choice | None = None
        self._copy: InferenceCopy | None = None
        self._own_portions = Portions()

    def run(self, example: Example, count: int) -> list[Tensor]:
        """Activations within the tolerance of the exact ones."""
        example = example.to(self.device)
        if self._choice is None:
            with preserved_random_state(), torch.no_grad():
                self._choose(example, count)
        choice = self._choice
        assert choice is not None
        if choice.form is None:
            return self._run(self.parts.prefix, example, count, self._own_portions)
        if self._copy is None:  # rows are computed again after all were there
            self._copy = InferenceCopy(self.parts, replace(choice.form, compiled=False), example)
        return self._run(self._copy, example, count, self._own_portions)

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
        best = trial.best(self.rows_ahead)
        self._take(best.choice(trial), best.copy)

    def _take(self, choice: Choice, made: InferenceCopy | None) -> None:
        """Make rows this way from now on, and say so."""
        self._choice, self._copy = choice, made
        self._own_portions = Portions(choice.size)
        refused = any(reason.startswith("refused") for reason in choice.declined)
        level = logging.WARNING if refused else logging.INFO
        _LOG.log(level, "%r: %s", self.parts.boundary.name, prefix_line(choice.facts()))


@dataclass(frozen=True)
class _Candidate:
    """One way of making rows that was measured and found within the tolerance."""

    copy: InferenceCopy | None
    size: int | None
    seconds: float
    error: float

    def choice(self, trial: _Trial) -> Choice:
        return Choice(
            form=None if self.copy is None else self.copy.form,
            size=self.size,
            folded=0 if self.copy is None else self.copy.folded,
            seconds=self.seconds,
            exact_seconds=trial.exact.seconds,
            error=self.error,
            tolerance=trial.tolerance,
            samples=trial.count,
            declined=tuple(dict.fromkeys(trial.declined)),
        )


class _Trial:
    """Measures candidates on one batch of real samples and compares each with the exact prefix.

    Attributes:
        exact: The exact prefix on all samples at once.
        declined: Reasons, as they come up.
    """

    def __init__(self, prefix: OptimizedPrefix, some: Example, wanted: Optimized) -> None:
        self.count = some.batch
        self.tolerance = prefix.tolerance
        self.declined: list[str] = []
        self._prefix = prefix
        self._some = some
        self._wanted = wanted
        self._rows = prefix.exact(some.fresh(), self.count)  # the first call of a shape is slower, and not timed
        self.exact = _Candidate(None, None, self._timed(prefix.parts.prefix, None)[0], 0.0)

    def best(self, rows_ahead: int) -> _Candidate:
        """The fastest candidate within the tolerance."""
        on_cpu = self._prefix.device.type == "cpu"
        size = min(_FIRST_SIZE, self.count) if on_cpu else None
        found: list[_Candidate | None] = []
        first = self._form(Form(dtype=self._wanted.dtype), size, found)
        if first is not None and first.has_convolutions:
            self._form(Form(dtype=self._wanted.dtype, channels_last=True), size, found)
        best = self._fastest(found)
        if on_cpu:
            sizes = [other for other in _OTHER_SIZES if other <= self.count]
            sizes += [_FIRST_SIZE] if best is self.exact and self.count > _FIRST_SIZE else []
            best = self._fastest([best, *(self._measured(best.copy, other) for other in sizes)])
        best = self._compiled(best, rows_ahead)
        if self.exact.seconds < _WORTHWHILE * best.seconds:
            self.declined.append("no other way was faster by 5 %")
            return self.exact
        return best

    def _form(self, form: Form, size: int | None, found: list[_Candidate | None]) -> InferenceCopy | None:
        """Try one form; what may be wrong with a copy of somebody's modules is anything."""
        try:
            made = InferenceCopy(self._prefix.parts, form, self._some)
            found.append(self._measured(made, size))
        except Exception as error:
            self._refuse(form, "".join(f"{type(error).__name__}: {error}".splitlines()[:1]))
            return None
        return made

    def _compiled(self, best: _Candidate, rows_ahead: int) -> _Candidate:
        """The best candidate compiled, where that may pay and is faster."""
        if best.copy is None or self._wanted.compile is False:
            return best
        if self._wanted.compile is None and rows_ahead * best.seconds < _COMPILE_FROM_SECONDS:
            self.declined.append(f"not compiled: the fill is predicted to take {rows_ahead * best.seconds:.0f} s")
            return best
        found: list[_Candidate | None] = [best]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own compiler
            # of the best one's size; portions of other sizes are not compiled for
            self._form(replace(best.copy.form, compiled=True), best.size, found)
        return self._fastest(found)

    def _measured(self, made: InferenceCopy | None, size: int | None) -> _Candidate | None:
        """Timed once it is warm, and compared; None where its error is beyond the tolerance."""
        target: Callable[..., Any] = self._prefix.parts.prefix if made is None else made
        warm = self.count if size is None else size
        self._prefix._run(target, self._some.take(list(range(warm))), warm, Portions(size))
        seconds, rows = self._timed(target, size)
        error = relative_error(self._prefix.parts.boundary.tensors, self._rows, rows)
        if error > self.tolerance:
            self._refuse("exact" if made is None else made.form, f"error {error:.1e} beyond {self.tolerance:.0e}")
            return None
        return _Candidate(made, size, seconds, error)

    def _timed(self, target: Callable[..., Any], size: int | None) -> tuple[float, list[Tensor]]:
        """Seconds of a sample, and the activations."""
        given = self._some.fresh()
        self._wait()
        began = time.perf_counter()
        rows = self._prefix._run(target, given, self.count, Portions(size))
        self._wait()
        return (time.perf_counter() - began) / self.count, rows

    def _fastest(self, found: list[_Candidate | None]) -> _Candidate:
        return min((c for c in found if c is not None), key=lambda c: c.seconds, default=self.exact)

    def _refuse(self, form: Form | str, reason: str) -> None:
        self.declined.append(f"refused {form}: {reason}")

    def _wait(self) -> None:
        if self._prefix.device.type == "cuda":
            torch.cuda.synchronize(self._prefix.device)  # needs CUDA


def prefix_of(
    parts: Parts, mode: NumericMode, dtype: str | torch.dtype | None, prefix: str | Optimized
) -> FrozenPrefix:
    """The prefix as ``prefix=`` asks for it."""
    wanted = Optimized.of(prefix)
    return FrozenPrefix(parts, mode, dtype) if wanted is None else OptimizedPrefix(parts, mode, dtype, wanted)
