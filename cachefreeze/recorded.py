"""A training step, recorded once and replayed: static inputs, the CUDA graph, the proof that it is the eager step.

A CUDA graph repeats kernels on the memory that it was recorded with, and nothing of what Python did around them. So
inputs are copied into buffers of the recording, learning rates that change are tensors while it is made, and a
recording is only used once its first replay has done what the eager step does from the same state.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from cachefreeze.isolation import RandomState

# How far the first replay may be from the eager step, as a share of the norm of what the step changes. The kernels are
# the same; the optimizer's own arithmetic is in tensors rather than in Python's doubles, sums by atomic additions come
# in any order, and Adam makes whole steps of gradients that are zero but for rounding. What a wrong recording does,
# such as training on the batch before, is off by about 1.
TOLERANCE = 0.05

_NOTHING = torch.zeros(0, dtype=torch.float64)

# Their learning rate may be a tensor on the device, which a recording reads anew each time.
_TENSOR_RATES = (SGD, Adam, AdamW)


class UnfitError(Exception):
    """A step cannot be recorded; the message says why. Never leaves the package.

    Attributes:
        loss: Of the batch that was trained on, eagerly, before that was found out; None where none was.
    """

    def __init__(self, why: str, loss: Tensor | None = None) -> None:
        super().__init__(why)
        self.loss = loss


class Tape(Protocol):
    """What was recorded."""

    loss: Tensor

    def replay(self) -> None:
        """Do it again, on the same memory."""
        ...


class Recorder(Protocol):
    """How a step is recorded: CUDA graphs, or a stand-in that tests the rest without CUDA."""

    def warm(self, run: Callable[[], Tensor]) -> Tensor:
        """Run a step where it will be recorded, so that libraries set themselves up before."""
        ...

    def record(self, run: Callable[[], Tensor]) -> Tape:
        """Record a step without running it."""
        ...


class CudaRecorder:
    """CUDA graphs, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:  # needs CUDA
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm(self, run: Callable[[], Tensor]) -> Tensor:  # needs CUDA
        """Run a step on the stream that records; what was queued before runs before, what follows runs after."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = run()
        current.wait_stream(self._stream)
        return loss

    def record(self, run: Callable[[], Tensor]) -> Tape:  # needs CUDA
        """Record a step. Other threads, such as one that pins batches, may go on using CUDA meanwhile."""
        # where a recording fails torch leaves its stream the current one
        with torch.cuda.stream(torch.cuda.current_stream(self._device)):
            try:
                return self._record(run)
            except Exception:
                # CUDA's generator, up to torch 2.6 at least, then takes itself for recording and refuses every draw
                # until a recording has ended well
                self._record(lambda: torch.zeros((), device=self._device))
                raise

    def _record(self, run: Callable[[], Tensor]) -> Tape:  # needs CUDA
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            loss = run()
        return _CudaTape(graph, loss)


class _CudaTape:
    def __init__(self, graph: torch.cuda.CUDAGraph, loss: Tensor) -> None:  # needs CUDA
        self.loss = loss
        self._graph = graph

    def replay(self) -> None:  # needs CUDA
        self._graph.replay()


class Rates:
    """The learning rates of an optimizer's groups as a recording sees them: tensors that follow the user's numbers."""

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._known: list[float | None] = []
        self._tensors: list[Tensor] = []
        for group in optimizer.param_groups:
            rate = group["lr"]
            follows = type(optimizer) in _TENSOR_RATES and not _on(rate, device)
            self._known.append(float(rate) if follows else None)
            self._tensors.append(torch.full((), float(rate), device=device) if follows else rate)

    def refresh(self) -> None:
        """Take over the numbers that the groups have now, in time for a replay."""
        for i, (group, known) in enumerate(zip(self._optimizer.param_groups, self._known, strict=True)):
            if known is not None and known != group["lr"]:
                rate = float(group["lr"])
                self._known[i] = rate
                self._tensors[i].fill_(rate)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While a step is recorded, groups have these tensors; SGD then runs fused, the one form that reads them."""
        kept = [dict(group) for group in self._optimizer.param_groups]
        try:
            for group, known, tensor in zip(self._optimizer.param_groups, self._known, self._tensors, strict=True):
                if known is not None:
                    group["lr"] = tensor
                    if type(self._optimizer) is SGD:
                        group.update(fused=True, foreach=False)
            yield
        finally:
            for group, before in zip(self._optimizer.param_groups, kept, strict=True):
                group.update({key: before[key] for key in ("lr", "fused", "foreach") if key in before})

    @staticmethod
    def settings(optimizer: Optimizer, device: torch.device) -> tuple[Any, ...]:
        """What a recording keeps of the groups' settings: all of them but a rate that it reads anew."""
        found: list[Any] = []
        for group in optimizer.param_groups:
            rate = group["lr"]
            if _on(rate, device):
                found.append(id(rate))  # read by the graph where it lies
            elif type(optimizer) not in _TENSOR_RATES:
                found.append(float(rate))
            found.extend(value for key, value in group.items() if key not in ("params", "lr", "initial_lr"))
        return tuple(found)


def _on(rate: Any, device: torch.device) -> bool:
    return isinstance(rate, Tensor) and rate.device == device


def make_capturable(optimizer: Optimizer) -> None:
    """Let the optimizer count its steps on the device, as a recording has to.

    Raises:
        UnfitError: It computes in Python what changes from step to step.
    """
    if type(optimizer) is SGD:
        return
    if not all("capturable" in group for group in optimizer.param_groups):
        raise UnfitError(
            f"{type(optimizer).__name__} has no capturable=True: what it computes in Python would stay as it is "
            "recorded; use SGD, Adam, AdamW or another optimizer that has it"
        )
    # torch would warn, once, that a capturable optimizer steps outside a graph: that is how a recording is checked
    optimizer._warned_capturable_if_run_uncaptured = True
    moved: dict[int, Tensor] = {}  # what several parameters share stays shared
    for group in optimizer.param_groups:
        group["capturable"] = True
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                counted = moved.setdefault(id(state["step"]), state["step"].to(parameter.device, torch.float32))
                state["step"] = counted


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def state_of(optimizer: Optimizer) -> list[Tensor]:
    """All tensors of the optimizer's state."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


class _Snapshot:
    """Parameters, optimizer state, buffers and random states, to go back to."""

    def __init__(self, written: Sequence[Tensor], optimizer: Optimizer) -> None:
        self._groups = [parameters_of(optimizer), state_of(optimizer), *([tensor] for tensor in written)]
        self.values = [[tensor.detach().clone() for tensor in group] for group in self._groups]
        self.random = RandomState.capture()

    @torch.no_grad()
    def restore(self) -> None:
        for group, values in zip(self._groups, self.values, strict=True):
            for tensor, value in zip(group, values, strict=True):
                tensor.copy_(value)
        self.random.restore()

    def changes(self, since: _Snapshot) -> list[Tensor]:
        """How all parameters, all optimizer state and each buffer changed: a vector each, in double precision."""
        return [
            torch.cat([(now.double() - then.double()).flatten() for now, then in zip(*pair, strict=True)] or [_NOTHING])
            for pair in zip(self.values, since.values, strict=True)
        ]


class RecordedStep:
    """A step for batches of one kind.

    Args:
        step: Tensor leaves of a batch -> the detached loss; zero_grad, forward, backward and optimizer step.
        leaves: Of the batch that it is recorded with; the batch is trained on once.
        written: What a step writes beside parameters and optimizer state: buffers.
        optimizer: Fit for recording.
        recorder: How.

    Attributes:
        first_loss: Of the batch that it was recorded with.

    Raises:
        UnfitError: It cannot be recorded, or does not do what the eager step does. That batch has been trained on,
            eagerly.
    """

    def __init__(
        self,
        step: Callable[[Sequence[Tensor]], Tensor],
        leaves: Sequence[Tensor],
        written: Sequence[Tensor],
        optimizer: Optimizer,
        recorder: Recorder,
    ) -> None:
        self._parameters = parameters_of(optimizer)
        self._state = state_of(optimizer)  # kept alive: the recording writes there, and kinds compare identities
        self._inputs = [torch.empty_like(leaf, memory_format=torch.preserve_format) for leaf in leaves]
        self._rates = Rates(optimizer, self._parameters[0].device)
        before = _Snapshot(written, optimizer)
        self._load(leaves)
        self.first_loss = recorder.warm(lambda: step(self._inputs))
        eager = _Snapshot(written, optimizer)
        before.restore()
        try:
            self._load(leaves)  # the step may have written into them
            self._tape = self._record(lambda: step(self._inputs), recorder, before)
            self._gradients = [parameter.grad for parameter in self._parameters]
            self._tape.replay()
            _compare(before, eager, _Snapshot(written, optimizer), self.first_loss, self._tape.loss)
        except Exception as error:
            eager.restore()
            raise UnfitError(str(error) or type(error).__name__, self.first_loss) from error

    def __call__(self, leaves: Sequence[Tensor]) -> Tensor:
        """Train on a batch of the same kind; returns its loss. Nothing waits for the device."""
        self._load(leaves)
        self._rates.refresh()
        self._tape.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._tape.loss.clone()

    def _load(self, leaves: Sequence[Tensor]) -> None:
        for own, leaf in zip(self._inputs, leaves, strict=True):
            own.copy_(leaf, non_blocking=True)

    def _record(self, run: Callable[[], Tensor], recorder: Recorder, before: _Snapshot) -> Tape:
        with self._rates.in_place():
            tape = recorder.record(run)
        drawn = [name for name in before.random.moved() if name != "torch.cuda"]
        if drawn:
            raise UnfitError(f"the step draws from {drawn[0]} on the CPU, and a recording would repeat that draw")
        return tape


def _compare(before: _Snapshot, eager: _Snapshot, replayed: _Snapshot, loss: Tensor, again: Tensor) -> None:
    """Raise where a replay did not do what the eager step did."""
    off, size = float((loss.double() - again.double()).norm()), float(loss.double().norm())
    if not off <= TOLERANCE * size:
        raise UnfitError(f"the recorded step's loss is {off:.2g} off the eager one's of {size:.2g}")
    what = ["the parameters", "the optimizer's state"]
    for i, (wanted, got) in enumerate(zip(eager.changes(before), replayed.changes(before), strict=True)):
        off, size = float((got - wanted).norm()), float(wanted.norm())
        if not off <= TOLERANCE * size:
            name = what[i] if i < len(what) else "a buffer"
            raise UnfitError(f"the recorded step changes {name} otherwise than the eager one: {off:.2g} of {size:.2g}")
    if replayed.random.key != eager.random.key:
        raise UnfitError("the recorded step draws other random numbers than the eager one")
