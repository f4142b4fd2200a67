"""What must be equal for a store to be reused, and the difference when it is not.

A fingerprint is a flat mapping of field name -> short readable value (a digest where the value is long). Equal
mappings mean equal rows. Anything that cannot change a row (batch size, paths, memory addresses, device index,
hooks, the tier) stays out.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
# attributes of a module that say nothing about what it computes
BOOKKEEPING = {
    "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_compiled_call_impl",
}  # fmt: skip
# A walk this deep has left what a dataset or transform is made of; the limit keeps cyclic objects finite.
_MAX_DEPTH = 12


def identity(fields: Mapping[str, str]) -> str:
    """Twelve hexadecimal digits that stand for a fingerprint, used in file names."""
    joined = "\0".join(f"{key}\1{fields[key]}" for key in sorted(fields))
    return xxhash.xxh3_128_hexdigest(joined.encode())[:12]


def differing(old: Mapping[str, str], new: Mapping[str, str]) -> set[str]:
    """Names of the fields that differ."""
    return {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Readable lines for the fields that differ, old value against new."""
    return [f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}" for key in sorted(differing(old, new))]


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of names, shapes, dtypes and every byte of some tensors (xxh3_128; about 0.1 s per GB on a CPU)."""
    state = xxhash.xxh3_128()
    for name, tensor in tensors:
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        state.update(tensor_bytes(tensor))
    return state.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in logical (row-major) order, whatever its dtype, device or memory format."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def state_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of a module, non-persistent buffers included."""
    return [*module.named_parameters(), *module.named_buffers()]


def structure(module: nn.Module) -> str:
    """Digest of a module tree: classes, their forward's code and plain attributes, without weights, hooks, modes."""
    state = xxhash.xxh3_128()
    _walk_structure(state, module, set())
    return state.hexdigest()


def _walk_structure(state: Any, module: nn.Module, seen: set[int]) -> None:
    for name, child in module.named_modules():
        kind = type(child)
        state.update(f"{name}:{kind.__module__}.{kind.__qualname__};".encode())
        if isinstance(child, torch.fx.GraphModule):
            state.update(child.code.encode())
            continue
        within = seen | {id(child)}  # a closure over the module itself comes back here
        _walk(state, kind.forward, 0, within)
        for key, value in sorted(attributes_of(child).items()):
            state.update(f"{key}=".encode())
            _walk(state, value, 0, within)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """What a forward may read of a module beside its weights, buffers, children, hooks and mode."""
    return {
        key: value
        for key, value in vars(module).items()
        if key not in BOOKKEEPING and "hook" not in key and not isinstance(value, nn.Module | Tensor)
    }


def digest(value: Any) -> str:
    """Digest of a value that describes data: tensors and arrays by content, functions by code, objects by state."""
    state = xxhash.xxh3_128()
    _walk(state, value, 0, set())
    return state.hexdigest()


def _walk(state: Any, value: Any, depth: int, seen: set[int]) -> None:
    """Feed a value into a digest, independent of addresses, paths and the order of sets."""
    if depth > _MAX_DEPTH or (id(value) in seen and not isinstance(value, str | int | float | bytes)):
        state.update(b"~")
        return
    seen = seen | {id(value)}
    kind = type(value)
    state.update(f"<{kind.__module__}.{kind.__qualname__}>".encode())
    if isinstance(value, Tensor):
        state.update(f"{tuple(value.shape)}{value.dtype}".encode())
        state.update(tensor_bytes(value))
    elif isinstance(value, np.ndarray) and value.dtype != object:
        state.update(f"{value.shape}{value.dtype}".encode())
        state.update(np.ascontiguousarray(value).tobytes())
    elif value is None or isinstance(value, bool | int | float | complex | np.generic):
        state.update(repr(value).encode())
    elif isinstance(value, str):
        state.update(value.encode(errors="surrogatepass"))
    elif isinstance(value, bytes):
        state.update(value)
    elif isinstance(value, Path):
        state.update(value.name.encode())  # a moved folder is the same data
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            _walk(state, key, depth + 1, seen)
            _walk(state, value[key], depth + 1, seen)
    elif isinstance(value, set | frozenset):
        for item in sorted(value, key=repr):
            _walk(state, item, depth + 1, seen)
    elif isinstance(value, list | tuple | range):
        state.update(f"{len(value)}".encode())
        for item in value:
            _walk(state, item, depth + 1, seen)
    elif isinstance(value, functools.partial):
        for part in (value.func, value.args, value.keywords):
            _walk(state, part, depth + 1, seen)
    elif isinstance(value, types.MethodType):
        _walk(state, value.__func__, depth + 1, seen)
        _walk(state, value.__self__, depth + 1, seen)
    elif isinstance(value, types.FunctionType):
        _walk_function(state, value, depth, seen)
    elif isinstance(value, type | types.BuiltinFunctionType | types.ModuleType):
        state.update(getattr(value, "__qualname__", getattr(value, "__name__", "")).encode())
    elif isinstance(value, types.CodeType):
        _walk_code(state, value, depth, seen)
    else:
        _walk_object(state, value, depth, seen)


def _walk_function(state: Any, function: types.FunctionType, depth: int, seen: set[int]) -> None:
    state.update(function.__qualname__.encode())
    cells = [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
    for part in (function.__code__, function.__defaults__, function.__kwdefaults__, cells):
        _walk(state, part, depth + 1, seen)


def _walk_code(state: Any, code: types.CodeType, depth: int, seen: set[int]) -> None:
    # file names and line numbers are left out: moving or reformatting a script changes no row
    state.update(code.co_code)
    for part in (code.co_names, code.co_varnames):
        state.update(repr(part).encode())
    for constant in code.co_consts:
        _walk(state, constant, depth + 1, seen)


def _walk_object(state: Any, value: Any, depth: int, seen: set[int]) -> None:
    """An object stands for its class and its state; one that has none for its repr without addresses."""
    attributes = dict(vars(value)) if hasattr(value, "__dict__") else {}
    for name in getattr(type(value), "__slots__", ()):
        if isinstance(name, str) and hasattr(value, name):
            attributes[name] = getattr(value, name)
    if isinstance(value, nn.Module):
        _walk_structure(state, value, seen)
        state.update(tensors_digest(state_tensors(value)).encode())
    elif attributes:
        for key in sorted(attributes):
            state.update(f"{key}=".encode())
            _walk(state, attributes[key], depth + 1, seen)
    else:
        state.update(_ADDRESS.sub("", repr(value)).encode())


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an unbound free variable raises
    except ValueError:
        return True
    return False
