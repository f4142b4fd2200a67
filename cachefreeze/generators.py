"""Random generators that a dataset keeps for itself: no global state shows that they were drawn from."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachefreeze.attributes import GENERATORS, generator_state, set_generator_state
from cachefreeze.fingerprint import digest

# A walk this deep has left what a dataset or transform is made of.
_MAX_DEPTH = 8
# Of a long list of like items (file names, labels) the first are looked into.
_MAX_ITEMS = 64
_CONTENT = (str, bytes, int, float, complex, Tensor, np.ndarray, type, types.ModuleType, types.BuiltinFunctionType)


def generators_of(value: Any, name: str) -> list[tuple[str, Any]]:
    """The generators within an object, and where: in its attributes, transforms, containers and closures."""
    found: list[tuple[str, Any]] = []
    _walk(found, value, name, 0, set())
    return found


def state_of(generator: Any) -> str:
    """Equal for equal states of one generator."""
    return digest(generator_state(generator))


@contextmanager
def preserved_generators(*values: Any) -> Iterator[None]:
    """Whatever is drawn inside from the generators within some objects, their states are as before on exit."""
    with preserved_states([generator for value in values for _, generator in generators_of(value, "")]):
        yield


@contextmanager
def preserved_states(generators: Sequence[Any]) -> Iterator[None]:
    """Whatever is drawn inside from some generators, their states are as before on exit."""
    states = [generator_state(generator) for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            set_generator_state(generator, state)


def seed_generator(generator: Any, seed: int) -> None:
    """Begin a generator anew, as one of its kind begins with this seed (0 to 2**32 - 1)."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random | np.random.RandomState):
        generator.seed(seed)
    else:
        generator.bit_generator.state = type(generator.bit_generator)(seed).state


def _walk(found: list[tuple[str, Any]], value: Any, name: str, depth: int, seen: set[int]) -> None:
    if depth > _MAX_DEPTH or value is None or isinstance(value, _CONTENT) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, GENERATORS):
        if not isinstance(value, random.SystemRandom):  # which has no state
            found.append((name, value))
        return
    for part, inner in _parts(value):
        _walk(found, inner, f"{name}{part}", depth + 1, seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", inner) for key, inner in islice(value.items(), _MAX_ITEMS))
    elif isinstance(value, list | tuple):
        yield from ((f"[{i}]", inner) for i, inner in enumerate(value[:_MAX_ITEMS]))
    elif isinstance(value, functools.partial):
        yield from (("", value.func), ("", value.args), ("", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from (("", value.__self__), ("", value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from ((f" ({variable})", inner) for variable, inner in _variables(value))
    else:
        yield from ((f".{key}", inner) for key, inner in islice(getattr(value, "__dict__", {}).items(), _MAX_ITEMS))
        slots = getattr(type(value), "__slots__", ())
        for key in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, key):
                yield f".{key}", getattr(value, key)
        for method in ("__getitem__", "__call__"):
            yield "", getattr(type(value), method, None)


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function closes over, and the generators among its globals."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not bound yet
            yield name, cell.cell_contents
    for name in function.__code__.co_names:
        if isinstance(function.__globals__.get(name), GENERATORS):
            yield name, function.__globals__[name]
