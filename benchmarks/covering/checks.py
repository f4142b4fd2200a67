"""The promises of a split, each checked against the model itself by code that shares nothing with the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from covering.case import Case
from covering.comparing import call, difference, draw, loss_of, pick
from covering.recording import Recorder, Recording
from covering.reference import Reference

_SAME_BATCH = 1e-5  # relative to the largest magnitude compared; bit-equal is counted apart
_OTHER_BATCH = 1e-3  # the kernels of another batch size add in another order
_AFTER_STEPS = 1e-4  # rounding has gone through two updates
_STEPS = 2


class PromiseError(AssertionError):
    """A promise does not hold."""


class WorkError(PromiseError):
    """The suffix is right, but does again what the rows should have saved."""


@dataclass(frozen=True)
class Subject:
    """A split to be checked.

    Attributes:
        model: What was split; its parameters are those of ``parts``.
        batch: Samples that it was split with.
    """

    case: Case
    model: nn.Module
    parts: Any
    reference: Reference
    recording: Recording
    boundary: str
    batch: int

    def rows(self, inputs: Any) -> tuple[Tensor, ...]:
        """Rows as a store would keep them: memory of their own."""
        made = call(self.parts.prefix, inputs)
        return tuple(row.detach().clone() for row in (made if isinstance(made, tuple) else (made,)))

    @property
    def dims(self) -> list[int]:
        """Batch dimension of each tensor of a row."""
        return [spec.batch_dim for spec in self.parts.boundary.tensors]


def check_all(subject: Subject) -> dict[str, Any]:
    """Check every promise.

    Returns:
        Which comparisons were equal bit for bit, and the frozen weights that the suffix and the model itself share.

    Raises:
        PromiseError: The first promise that does not hold.
    """
    frozen = {n for n, p in subject.model.named_parameters() if not p.requires_grad}
    if frozen != subject.reference.frozen():
        names = sorted(frozen ^ subject.reference.frozen())
        raise PromiseError(f"frozen and first used before the boundary are not the same: {names[:4]}")
    exact: dict[str, Any] = {"eval": _check_eval(subject)}
    _check_rows(subject)
    exact["step"] = _check_step(subject)
    exact["steps"] = _check_steps(subject)
    return {**exact, **_check_work(subject)}


def _within(gap: float, allowed: float, what: str) -> bool:
    """Whether two values are equal bit for bit; raises where they are not even close."""
    if not gap <= allowed:
        raise PromiseError(f"{what}: relative difference {gap:.2g}")
    return gap == 0.0


def _check_eval(subject: Subject) -> bool:
    """Outputs in eval mode, at the batch size of the split and at another one, on other values."""
    subject.model.eval()
    reference = subject.reference.model.eval()
    exact = True
    for batch, seed in ((subject.batch, 11), (subject.batch + 2, 12)):
        inputs = draw(subject.case, batch, seed)
        with torch.no_grad():
            wanted = call(reference, inputs)
            rows = subject.rows(inputs)
            _check_shapes(subject, rows, batch)
            got = subject.parts.suffix(*rows)
        exact = _within(difference(wanted, got), _SAME_BATCH, f"eval output at batch {batch}") and exact
    return exact


def _check_shapes(subject: Subject, rows: tuple[Tensor, ...], batch: int) -> None:
    """``boundary.tensors`` says what the prefix makes."""
    for row, spec in zip(rows, subject.parts.boundary.tensors, strict=True):
        sizes = list(row.shape)
        along = sizes.pop(spec.batch_dim)
        if tuple(sizes) != tuple(spec.shape) or row.dtype != spec.dtype or along % batch:
            raise PromiseError(f"boundary.tensors says {spec}, the prefix made {tuple(row.shape)} {row.dtype}")


def _check_rows(subject: Subject) -> None:
    """A sample's row does not depend on the others of its batch; rows from different batches make a batch."""
    subject.model.eval()
    reference = subject.reference.model.eval()
    inputs = draw(subject.case, 4, 13)
    whole = subject.rows(inputs)
    for indices in ([2, 0], [3, 3]):
        some = subject.rows(pick(inputs, indices))
        for at, (dim, row, full) in enumerate(zip(subject.dims, some, whole, strict=True)):
            gap = difference(_samples(full, dim, 4, indices), row)
            _within(gap, _OTHER_BATCH, f"tensor {at} of a row computed beside other samples")
    first, second = subject.rows(pick(inputs, [3, 0])), subject.rows(pick(inputs, [1, 2]))
    mixed = tuple(torch.cat([a, b], dim) for dim, a, b in zip(subject.dims, first, second, strict=True))
    with torch.no_grad():
        gap = difference(call(reference, pick(inputs, [3, 0, 1, 2])), subject.parts.suffix(*mixed))
    _within(gap, _OTHER_BATCH, "output for rows from two batches")


def _samples(tensor: Tensor, dim: int, batch: int, indices: list[int]) -> Tensor:
    """A sample may own several rows: k consecutive ones."""
    each = tensor.shape[dim] // batch
    return torch.cat([tensor.narrow(dim, i * each, each) for i in indices], dim)


def _check_step(subject: Subject) -> bool:
    """One training step with a seed: output, random draws, gradients, buffers."""
    inputs = draw(subject.case, 4, 15)
    reference, model = subject.reference.model, subject.model
    model.train()
    rows = subject.rows(inputs)
    subject.reference.train()
    torch.manual_seed(3)
    wanted = call(reference, inputs)
    drawn = torch.get_rng_state()
    loss_of(wanted).backward()
    torch.manual_seed(3)
    got = subject.parts.suffix(*rows)
    exact = _within(difference(wanted, got), _SAME_BATCH, "output of a training step")
    if not torch.equal(drawn, torch.get_rng_state()):
        raise PromiseError("the suffix has drawn other random numbers than the model")
    loss_of(got).backward()
    theirs, ours = ({n: p.grad for n, p in each.named_parameters()} for each in (reference, model))
    frozen = sorted(n for n in subject.reference.frozen() if ours[n] is not None)
    if frozen:
        raise PromiseError(f"frozen {frozen[:3]} got a gradient")
    lost = [name for name in ours if (theirs[name] is None) != (ours[name] is None)]
    if lost:
        raise PromiseError(f"{lost[:3]} got a gradient from one of model and suffix only")
    trained = [name for name, grad in ours.items() if grad is not None]
    gap = difference([theirs[name] for name in trained], [ours[name] for name in trained])
    exact = _within(gap, _SAME_BATCH, "gradients of a training step") and exact
    for (name, a), b in zip(reference.named_buffers(), model.buffers(), strict=True):
        exact = _within(difference(a, b), _SAME_BATCH, f"buffer {name!r} after a training step") and exact
    return exact


def _check_steps(subject: Subject) -> bool:
    """A few steps of SGD with momentum, on a batch of their own each: losses and weights."""
    reference, model = subject.reference.model, subject.model
    optimizers = []
    for each in (reference, model):
        each.zero_grad(set_to_none=True)
        optimizers.append(torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=1e-3, momentum=0.9))
    exact = True
    for step in range(_STEPS):
        inputs = draw(subject.case, 2, 20 + step)
        model.train()
        rows = subject.rows(inputs)
        subject.reference.train()
        losses = []
        for each, optimizer in zip((reference, model), optimizers, strict=True):
            torch.manual_seed(40 + step)
            loss = loss_of(call(reference, inputs) if each is reference else subject.parts.suffix(*rows))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        exact = _within(difference(*losses), _AFTER_STEPS, f"loss of training step {step}") and exact
    gap = difference(list(reference.parameters()), list(model.parameters()))
    return _within(gap, _AFTER_STEPS, f"weights after {_STEPS} steps") and exact


def _check_work(subject: Subject) -> dict[str, list[str]]:
    """The suffix puts no row through a frozen weight that the model itself does not use after the boundary.

    Work on weights alone (a projection of a table of relative positions) cannot be kept in a row; it is listed.
    """
    start = subject.recording.starts[subject.boundary]
    after = {name for time, names, _ in subject.recording.heavy if time > start for name in names}
    recorder = Recorder(subject.model)
    rows = subject.rows(draw(subject.case, 2, 14))
    for row in rows:
        recorder.add(row, frozenset(), recomputable=False, op=-1)
    subject.model.eval()
    with torch.no_grad(), recorder:
        subject.parts.suffix(*rows)
    frozen = subject.reference.frozen()
    done = {name: given for _, names, given in recorder.found.heavy for name in names if name in frozen - after}
    again = sorted(name for name, given in done.items() if given)
    if again:
        raise WorkError(f"the suffix puts rows through frozen {again[:3]} ({len(again)} in all)")
    return {"constant_work": sorted(done)}
