"""Leave no trace: random states and training modes are put back as they were found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomState:
    """The four random states that a training script draws from: torch, CUDA, numpy, ``random``."""

    torch_cpu: Tensor
    torch_cuda: tuple[Tensor, ...]
    numpy: dict[str, Any]
    python: tuple[Any, ...]

    @classmethod
    def capture(cls) -> RandomState:
        """Read all states; CUDA's only once it is initialised, since asking would initialise it."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the user's global state is the point
        return cls(torch.get_rng_state(), cuda, state, random.getstate())

    def restore(self) -> None:
        """Put all states back."""
        torch.set_rng_state(self.torch_cpu)
        for index, state in enumerate(self.torch_cuda):
            torch.cuda.set_rng_state(state, index)
        np.random.set_state(self.numpy)  # noqa: NPY002 - the user's global state is the point
        random.setstate(self.python)

    def moved(self) -> list[str]:
        """Names of the states that differ from this one now."""
        now = RandomState.capture()
        pairs = zip(self.torch_cuda, now.torch_cuda, strict=False)
        checks = {
            "torch": not torch.equal(self.torch_cpu, now.torch_cpu),
            "torch.cuda": any(not torch.equal(a, b) for a, b in pairs),
            "numpy": _numpy_key(self.numpy) != _numpy_key(now.numpy),
            "random": self.python != now.python,
        }
        return [name for name, differs in checks.items() if differs]


def _numpy_key(state: dict[str, Any]) -> tuple[Any, ...]:
    inner = state["state"]
    return (inner["key"].tobytes(), inner["pos"], state["has_gauss"], state["gauss"])


def seed_initialised_generators(seed: int) -> None:
    """Seed torch's generators, CUDA's only where it is initialised.

    ``torch.manual_seed`` would queue the seed for a CUDA that comes up later, and the user's draws would start there.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


@contextmanager
def preserved_random_state() -> Iterator[RandomState]:
    """Whatever is drawn inside, the global random states are as before on exit."""
    state = RandomState.capture()
    try:
        yield state
    finally:
        state.restore()


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Whatever ``train()`` or ``eval()`` is called inside, every module's flag is as before on exit."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Whatever a forward in train mode writes into buffers, their values are as before on exit."""
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer  # a forward may bind a buffer anew
                if not torch.equal(buffer, value):  # an untouched buffer keeps its version counter
                    buffer.copy_(value)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Without the fused attention of eval mode, which the FLOP counter takes for no work at all."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Run ``module`` in eval mode and put every flag back."""
    with preserved_modes(module):
        module.eval()
        yield
