"""Leave no trace: random states and training modes are put back as they were found."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cachefreeze.attributes import Attributes


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
def outside_inference_mode() -> Iterator[None]:
    """Make tensors that can be trained on and written later, also where the caller is in inference mode.

    Its tensors can be neither, and what is made in a validation pass, stores and the memory of batches, is used again.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def preserved_modes(*models: nn.Module) -> Iterator[None]:
    """Whatever ``train()`` or ``eval()`` is called inside, every module's flag is as before on exit."""
    with preserved_modes_of(module for model in models for module in model.modules()):
        yield


@contextmanager
def preserved_modes_of(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Likewise for some modules alone, without those inside them."""
    flags = [(module, module.training) for module in modules]
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


class WrittenParameters(TorchFunctionMode):
    """Knows the parameters that a forward writes (an ``Embedding`` with ``max_norm``), and what they were before.

    Only after an operation it shows that it wrote, so a parameter is copied for the time of every operation on it: for
    one forward alone. What is written through ``.data`` shows at the end.
    """

    def __init__(self, apart: Collection[str] = ()) -> None:
        super().__init__()
        self._apart = apart  # operations that ask for a shape or a dtype
        self._before: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation(func)
        known = []
        if name not in self._apart:
            given = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter))
            with torch._C.DisableTorchFunction():
                known = [
                    (p, p._version, p.detach().clone())
                    for p in given
                    if id(p) not in self._before and not isinstance(p, nn.UninitializedParameter)
                ]
        result = func(*args, **kwargs)
        for parameter, version, value in known:
            if parameter._version != version or name == "data":
                self._before[id(parameter)] = parameter, value
        return result

    def restore(self) -> list[nn.Parameter]:
        """Put them back; the parameters that were written."""
        written = [(p, value) for p, value in self._before.values() if not torch.equal(p.detach(), value)]
        with torch.no_grad():
            for parameter, value in written:
                parameter.copy_(value)
        return [parameter for parameter, _ in written]


@contextmanager
def preserved_parameters(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Whatever is written into some parameters inside, their values are as before on exit."""
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                if not torch.equal(parameter.detach(), value):
                    parameter.copy_(value)


def operation(func: Any) -> str:
    """The name of what a TorchFunctionMode intercepted: of the attribute, when it is a property's getter."""
    name = str(getattr(func, "__name__", ""))
    return str(getattr(getattr(func, "__self__", None), "__name__", "")) if name == "__get__" else name


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A forward inside is in eval mode and without gradients, and leaves no trace."""
    with preserved_random_state(), preserved_state(model), eval_mode(model), torch.no_grad():
        yield
