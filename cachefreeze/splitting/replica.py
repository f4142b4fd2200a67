"""A replica of a module tree: the same Parameters, buffers and hooks, other forwards in chosen places.

Only what has another forward, and what holds such a module, is copied, and copied shallowly: everything else is the
model's own. ``forward`` is replaced and not ``__call__``, so that hooks still run.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

# (the replica's module, its own forward) -> the forward to use instead
Rewrite = Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]


def replicate(model: nn.Module, forwards: Mapping[str, Rewrite]) -> tuple[nn.Module, list[tuple[nn.Module, nn.Module]]]:
    """Copy a module tree with some forwards replaced.

    Args:
        model: The tree; it is not touched.
        forwards: Module name -> what its forward becomes.

    Returns:
        The replica, and (copy, original) of every module that was copied.
    """
    names = {id(module): name for name, module in model.named_modules()}
    done: dict[int, nn.Module] = {}
    copied: list[tuple[nn.Module, nn.Module]] = []

    def copy(module: nn.Module) -> nn.Module:
        if id(module) in done:
            return done[id(module)]
        children = {key: child if child is None else copy(child) for key, child in module._modules.items()}
        name = names[id(module)]
        same = all(children[key] is child for key, child in module._modules.items())
        if same and name not in forwards and module is not model:
            done[id(module)] = module
            return module
        made: nn.Module = object.__new__(type(module))
        made.__dict__.update(module.__dict__)
        made.__dict__["_modules"] = children
        if name in forwards:
            own = module.__dict__.get("forward") or types.MethodType(type(module).forward, made)
            made.__dict__["forward"] = forwards[name](made, own)
        done[id(module)] = made
        copied.append((made, module))
        return made

    return copy(model), copied
