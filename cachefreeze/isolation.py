"""Leave no trace: random states and training modes are put back as they were found."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
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

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal states."""
        torch_states = (self.torch_cpu, *self.torch_cuda)
        return (*(state.numpy().tobytes() for state in torch_states), _numpy_key(self.numpy), self.python)

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


def seed_generators(seed: int) -> None:
    """Seed torch's generators, numpy's and Python's; CUDA's only where it is initialised.

    ``torch.manual_seed`` would queue the seed for a CUDA that comes up later, and the user's draws would start there.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed)  # noqa: NPY002 - the user's global state is the point
    random.seed(seed)


@contextmanager
def preserved_random_state() -> Iterator[RandomState]:
    """Whatever is drawn inside, the global random states are as before on exit."""
    state = RandomState.capture()
    try:
        yield state
    finally:
        state.restore()


@contextmanager
def preserved_modes(*models: nn.Module) -> Iterator[None]:
    """Whatever ``train()`` or ``eval()`` is called inside, every module's flag is as before on exit."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def preserved_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever a forward writes into the own buffers of some modules, their values are as before on exit."""
    modules = list(modules)
    known: list[tuple[nn.Module, dict[str, Tensor | None]]] = [(module, dict(module._buffers)) for module in modules]
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
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
            for module, before in known:
                for name in module._buffers.keys() - before.keys():
                    del module._buffers[name]
                for name, held in before.items():
                    if held is None:  # filled by its first forward
                        module._buffers[name] = None


class Attributes:
    """The plain attributes of some modules: all but weights, buffers, children and modes."""

    _APART = frozenset({"training", "_parameters", "_buffers", "_modules"})

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._kept: list[tuple[str, nn.Module, dict[str, Any], dict[str, list[tuple[Any, Any]]]]] = []
        for name, module in modules:
            own = {key: value for key, value in vars(module).items() if key not in self._APART}
            self._kept.append((name, module, own, {key: _contents(value) for key, value in own.items()}))

    def changed(self) -> list[str]:
        """Dotted names of the attributes that were bound anew, or whose list, dict or set holds something else."""
        return [
            f"{name}.{key}".lstrip(".")
            for name, module, own, contents in self._kept
            for key in sorted((vars(module).keys() | own.keys()) - self._APART)
            if vars(module).get(key, self) is not own.get(key, self)
            or not all(_same_items(now, before) for now, before in contents.get(key, ()))
        ]

    def restore(self) -> None:
        """Put all of them back."""
        for _, module, own, contents in self._kept:
            state = vars(module)
            for key in state.keys() - own.keys() - self._APART:
                del state[key]
            state.update(own)
            for now, before in (pair for pairs in contents.values() for pair in pairs):
                if not _same_items(now, before):
                    now.clear()
                    (now.extend if isinstance(before, list | deque) else now.update)(before)


def _contents(value: Any, depth: int = 3) -> list[tuple[Any, Any]]:
    """Every list, dict and set in a value, and a copy of what it holds."""
    if not isinstance(value, list | dict | set | deque) or not depth:
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [(value, copy.copy(value)), *(pair for item in inner for pair in _contents(item, depth - 1))]


def _same_items(now: Any, before: Any) -> bool:
    """Whether a container holds the very same objects: comparing tensors by value would be no answer."""
    if len(now) != len(before):
        return False
    if isinstance(before, dict):
        return all(a is b and now[a] is before[b] for a, b in zip(now, before, strict=True))
    if isinstance(before, set):
        return {id(item) for item in now} == {id(item) for item in before}
    return all(a is b for a, b in zip(now, before, strict=True))


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[Attributes]:
    """Whatever a forward writes into buffers and plain attributes, they are as before on exit."""
    with preserved_state_of(list(model.named_modules())) as attributes:
        yield attributes


@contextmanager
def preserved_state_of(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[Attributes]:
    """Likewise for some modules alone, without those inside them."""
    attributes = Attributes(modules)
    try:
        with preserved_buffers(module for _, module in modules):
            yield attributes
    finally:
        attributes.restore()


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Run ``module`` in eval mode and put every flag back."""
    with preserved_modes(module):
        module.eval()
        yield
