"""A whole training step behind one call: replayed as a CUDA graph where that is possible, eager everywhere else.

With rows on the device, the step of a small suffix is bound by the launches of its kernels. A recorded step is one
launch. It holds for batches of one shape, one state of the model's modes and flags and one set of optimizer settings;
anything else is recorded on its own when it comes for the second time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from cachefreeze.errors import UsageError
from cachefreeze.recorded import (
    CudaRecorder,
    Rates,
    RecordedStep,
    Recorder,
    UnfitError,
    make_capturable,
    parameters_of,
    state_of,
)
from cachefreeze.running import NumericMode, autocast, model_device

_LOG = logging.getLogger("cachefreeze")

# Recordings keep their activations in memory of their own; batches of many widths would keep many.
_MOST_RECORDINGS = 8

_CONSTANTS = (type(None), bool, int, float, str, torch.dtype)
_ON_CPU = "there is no CUDA graph on a CPU, and torch.compile made no step faster there: see the benchmarks' log"


@dataclass(frozen=True)
class _Kind:
    """What a recording depends on: the form of the batch, and the state of everything around it."""

    spec: pytree.TreeSpec
    batch: list[Any]
    state: tuple[Any, ...]


class CompiledStep:
    """One call a batch: ``zero_grad``, forward, loss, backward and optimizer step. ``engine.compile_step`` makes it.

    Args:
        compute: A batch and its targets -> the loss, or several that are summed for the backward.
        optimizer: Steps once a call.
        model: Whose modes, flags and buffers are watched.
        split: Says which split is in use; another one needs another recording.
        written: What a step writes beside the model's buffers, parameters and optimizer state.
        recorder: How steps are recorded; None: CUDA graphs on CUDA, and nothing elsewhere.

    Attributes:
        how: ``graph`` where the last step was replayed, ``eager`` where it ran as it is written.
        reason: Why the last step was not replayed; None where it was.
    """

    def __init__(
        self,
        compute: Callable[..., Tensor],
        optimizer: Optimizer,
        model: nn.Module,
        split: Callable[[], Any] = lambda: None,
        written: Callable[[], list[Tensor]] = list,
        recorder: Recorder | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise UsageError(f"optimizer={optimizer!r}: expected an optimizer of torch.optim, made already")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UsageError("LBFGS calls the loss several times a step; write its step in your own loop")
        self.how: Literal["graph", "eager"] = "eager"
        self.reason: str | None = None
        self._compute = compute
        self._optimizer = optimizer
        self._model = model
        self._split = split
        self._written = written
        self._device = model_device(model)
        self._recorder = recorder
        if recorder is None and self._device.type == "cuda":  # needs CUDA
            self._recorder = CudaRecorder(self._device)
        self._modules: tuple[Any, list[nn.Module]] = (None, list(model.modules()))
        self._seen: list[_Kind] = []
        self._recorded: list[tuple[_Kind, RecordedStep]] = []
        self._unfit: list[tuple[_Kind, str]] = []
        self._said: set[str] = set()

    def __call__(self, inputs: Any, *targets: Any) -> Tensor:
        """Train on one batch.

        Args:
            inputs: What the loader yields for the model: rows, raw inputs, or a dict batch.
            targets: What the loss takes after the model's output.

        Returns:
            The loss, detached, on the device; no call waits for it.
        """
        leaves, spec = pytree.tree_flatten((inputs, targets))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.reason = self._unfit_batch(leaves, tensors)
        if self.reason is None:
            return self._recorded_step(leaves, tensors, spec)
        self._say(self.reason)
        return self._eager(leaves, spec)

    def _eager(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> Tensor:
        """The step as a user writes it."""
        self.how = "eager"
        inputs, targets = pytree.tree_unflatten(list(leaves), spec)
        self._optimizer.zero_grad(set_to_none=True)
        mode = NumericMode.now(self._device)
        if mode.autocast is None:
            losses = self._compute(inputs, *targets)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
        else:
            # without the cache of casts, which would outlive the step that changes the weights
            with autocast(self._device, mode.autocast):
                losses = self._compute(inputs, *targets)
            with autocast(self._device, None):
                losses.sum().backward()  # type: ignore[no-untyped-call]
                self._optimizer.step()
        return losses.detach()

    def _recorded_step(self, leaves: Sequence[Any], tensors: list[Tensor], spec: pytree.TreeSpec) -> Tensor:
        kind = self._kind(leaves, spec)
        for known, step in self._recorded:
            if known == kind:
                loss = step(tensors)
                self.how = "graph"
                return loss
        self.reason = next((why for known, why in self._unfit if known == kind), None)
        if self.reason is None and kind not in self._seen:
            self._seen = [*self._seen[1 - _MOST_RECORDINGS :], kind]
            self.reason = "the first step of its kind (shapes, modes, flags, optimizer settings) runs as it is written"
            return self._eager(leaves, spec)  # which also sets up what a recording must find there
        if self.reason is None:
            self.reason = self._full(kind)
        if self.reason is None:
            return self._record(leaves, tensors, spec)
        self._say(self.reason)
        return self._eager(leaves, spec)

    def _record(self, leaves: Sequence[Any], tensors: list[Tensor], spec: pytree.TreeSpec) -> Tensor:
        """Record a step, training on this batch once."""
        assert self._recorder is not None
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def step(values: Sequence[Tensor]) -> Tensor:
            given = list(leaves)
            for place, value in zip(places, values, strict=True):
                given[place] = value
            return self._eager(given, spec)

        try:
            make_capturable(self._optimizer)
            written = [*self._model.buffers(), *self._written()]
            recorded = RecordedStep(step, tensors, written, self._optimizer, self._recorder)
        except UnfitError as error:
            self.reason = str(error)
            self._unfit.append((self._kind(leaves, spec), self.reason))
            self._say(self.reason)
            return self._eager(leaves, spec) if error.loss is None else error.loss
        self._recorded.append((self._kind(leaves, spec), recorded))
        self.how = "graph"
        return recorded.first_loss

    def _full(self, kind: _Kind) -> str | None:
        """Make room for one more recording, or say why there is none."""
        if len(self._unfit) >= _MOST_RECORDINGS:
            return f"{_MOST_RECORDINGS} kinds of steps could not be recorded: {self._unfit[-1][1]}"
        if len(self._recorded) >= _MOST_RECORDINGS:
            # those of another split, mode or setting than the present one are the likeliest to be of no more use
            self._recorded = [(known, step) for known, step in self._recorded if known.state == kind.state]
        if len(self._recorded) >= _MOST_RECORDINGS:
            return f"batches of {_MOST_RECORDINGS} shapes are recorded already, each in memory of its own"
        return None

    def _unfit_batch(self, leaves: Sequence[Any], tensors: Sequence[Tensor]) -> str | None:
        """Why no step can be recorded here, whatever was recorded before."""
        if self._recorder is None:
            return _ON_CPU
        optimizer = self._optimizer
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return "the optimizer has step hooks (those of a schedule, or your own), which a graph would not call"
        elsewhere = next((tensor.device for tensor in tensors if tensor.device != self._device), None)
        if elsewhere is not None:
            return f"a tensor of the batch is on {elsewhere}, the model on {self._device}"
        other = next((leaf for leaf in leaves if not isinstance(leaf, (Tensor, *_CONSTANTS))), None)
        if other is not None:
            return f"the batch holds a {type(other).__name__}, of which a graph would keep this one for ever"
        return None

    def _kind(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> _Kind:
        """What a recording depends on besides the values of tensors."""
        split = self._split()
        if split is not self._modules[0]:
            self._modules = (split, list(self._model.modules()))
        parameters = parameters_of(self._optimizer)
        batch = [
            (tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        return _Kind(
            spec=spec,
            batch=batch,
            state=(
                id(split),
                [module.training for module in self._modules[1]],
                [parameter.requires_grad for parameter in parameters],
                torch.is_grad_enabled(),
                NumericMode.now(self._device),
                Rates.settings(self._optimizer, self._device),
                [(id(tensor), tensor.data_ptr()) for tensor in (*parameters, *state_of(self._optimizer))],
            ),
        )

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _LOG.info("the step runs eagerly: %s", reason)
