"""The plain attributes of modules as they were: containers, objects and random generators are looked into."""

from __future__ import annotations

import functools
import pickle
import random
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def generator_state(generator: Any) -> Any:
    """The state of one of the GENERATORS."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def set_generator_state(generator: Any, state: Any) -> None:
    """Put the state of one of the GENERATORS back."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


class Attributes:
    """The plain attributes of some modules: all but weights, buffers, children and modes.

    Lists, dicts, sets, objects with attributes of their own (a meter) and random generators are looked into.
    """

    _APART = frozenset({"training", "_parameters", "_buffers", "_modules"})

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._kept: list[_Own] = []
        seen: set[int] = set()  # a configuration is shared by every layer
        for name, module in modules:
            state = vars(module)
            own = {key: value for key, value in state.items() if key not in self._APART}
            # of a module's ten dicts of hooks nearly all are empty: what holds nothing needs no copy
            full, empty = {}, []
            for key, value in own.items():
                if type(value) in _CONTAINERS and not value:
                    empty.append(key)
                elif type(value) not in _CONSTANTS and (found := list(_contents(value, seen))):
                    full[key] = found
            self._kept.append(_Own(name, module, len(state), own, full, empty))

    def drawn(self) -> list[str]:
        """Dotted names of the attributes whose random generator was drawn from."""
        return [
            f"{kept.name}.{key}".lstrip(".")
            for kept in self._kept
            for key, found in kept.full.items()
            if any(isinstance(content, _Drawing) and content.changed() for content in found)
        ]

    def changed(self) -> list[str]:
        """Dotted names of the attributes that were bound anew, or whose list, dict or set holds something else."""
        return [
            f"{kept.name}.{key}".lstrip(".")
            for kept in self._kept
            for key in sorted((vars(kept.module).keys() | kept.own.keys()) - self._APART)
            if vars(kept.module).get(key, self) is not kept.own.get(key, self)
            or (key in kept.empty and kept.own[key])
            or any(content.changed() for content in kept.full.get(key, ()))
        ]

    def restore(self) -> None:
        """Put all of them back."""
        for kept in self._kept:
            state, own = vars(kept.module), kept.own
            state.update(own)
            if len(state) != kept.size:
                for key in state.keys() - own.keys() - self._APART:
                    del state[key]
            for key in kept.empty:
                if own[key]:
                    own[key].clear()
            for content in chain.from_iterable(kept.full.values()):
                if content.changed():
                    content.restore()


class _Own(NamedTuple):
    """A module, how many attributes it had, and those that are looked after: holding something, and holding nothing."""

    name: str
    module: nn.Module
    size: int
    own: dict[str, Any]
    full: dict[str, list[_Content]]
    empty: list[str]


class _Holding:
    """A list, dict or set, and what it held."""

    def __init__(self, container: Any) -> None:
        self._now = container
        # plain ones: a module has ten ordered dicts of hooks, nearly all of them empty, which are slow to copy
        kind = dict if isinstance(container, dict) else list
        self._before = kind(container) if container else kind()

    def changed(self) -> bool:
        return not _same_items(self._now, self._before)

    def restore(self) -> None:
        self._now.clear()
        (self._now.extend if isinstance(self._now, list | deque) else self._now.update)(self._before)


class _Drawing:
    """A random generator and its state."""

    def __init__(self, generator: Any) -> None:
        self._generator, self._state = generator, generator_state(generator)

    def changed(self) -> bool:
        now = generator_state(self._generator)
        if isinstance(now, Tensor):
            return not torch.equal(now, self._state)
        return pickle.dumps(now) != pickle.dumps(self._state)

    def restore(self) -> None:
        set_generator_state(self._generator, self._state)


_Content = _Holding | _Drawing
_CONTAINERS = frozenset({list, dict, set, deque, OrderedDict})
_CONSTANTS = frozenset({bool, int, float, str, bytes, type(None)})
_PLAIN = (bool, int, float, str, bytes, Tensor)
# What has a __dict__ that no forward is expected to write, or that is kept elsewhere.
_NOT_LOOKED_INTO = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, functools.partial)


def _contents(value: Any, seen: set[int], depth: int = 3) -> Iterator[_Content]:
    """Every container and generator in a value; of an object, the dict of its attributes."""
    if not depth or value is None or isinstance(value, _PLAIN) or id(value) in seen:
        return
    if not isinstance(value, list | dict | set | deque | tuple):
        if isinstance(value, GENERATORS):
            seen.add(id(value))
            yield _Drawing(value)
            return
        value = None if isinstance(value, _NOT_LOOKED_INTO) else getattr(value, "__dict__", None)
        if not isinstance(value, dict):
            return
    if id(value) in seen:
        return
    seen.add(id(value))
    if not isinstance(value, tuple):
        yield _Holding(value)
    if not value:
        return
    for item in list(value.values() if isinstance(value, dict) else value):
        if type(item) not in _CONSTANTS:
            yield from _contents(item, seen, depth - 1)


def _same_items(now: Any, before: Any) -> bool:
    """Whether a container holds the very same objects: comparing tensors by value would be no answer."""
    if len(now) != len(before):
        return False
    if not before:
        return True
    if isinstance(before, dict):
        return all(a is b and now[a] is before[b] for a, b in zip(now, before, strict=True))
    if isinstance(now, set):
        return {id(item) for item in now} == {id(item) for item in before}
    return all(a is b for a, b in zip(now, before, strict=True))
