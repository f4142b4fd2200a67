"""What one forward of a model does, op by op: the ground that the checks and the byte reference stand on.

Nothing here comes from the package. Ops are recorded below autograd (``TorchDispatchMode``), so there is no module,
no Python function and no trace between this recording and what torch ran.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# What takes the shape and the type of a tensor, and nothing of what is in it.
_SHAPE_ONLY = frozenset({
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
    "new_empty_strided",
})  # fmt: skip


@dataclass
class Value:
    """One tensor, or one state of a tensor that is written in place.

    Attributes:
        op: Time at which it was made; -1 for an input.
        inputs: Values that it was computed from.
        recomputable: Made without parameters and without work that counts as FLOPs.
    """

    shape: tuple[int, ...]
    bytes: int
    op: int
    inputs: frozenset[int]
    recomputable: bool


@dataclass
class Recording:
    """A forward.

    Attributes:
        values: In the order in which they were made. Only what depends on the inputs is one.
        reads: Time of an op -> values that it read.
        starts: Module name -> time of its first call, and of its first return.
        heavy: (time, parameter names, whether it depends on the inputs) of every op that takes FLOPs and a parameter.
        results: Values that the model returned.
    """

    values: list[Value] = field(default_factory=list)
    reads: dict[int, frozenset[int]] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    heavy: list[tuple[int, frozenset[str], bool]] = field(default_factory=list)
    results: frozenset[int] = frozenset()
    parameters: dict[str, int] = field(default_factory=dict)


class Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found = Recording()
        self.now = 0
        # views of a weight share its memory; values computed from weights alone count as weights
        self._weights = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.numel()}
        self._derived: dict[int, frozenset[str]] = {}
        self._held: list[Tensor] = []  # these, so that their memory comes back with nothing else
        self._of: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def value_of(self, tensor: Tensor) -> int | None:
        entry = self._of.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def add(self, tensor: Tensor, inputs: frozenset[int], *, recomputable: bool, op: int) -> None:
        size = tensor.numel() * tensor.element_size()
        self.found.values.append(Value(tuple(tensor.shape), size, op, inputs, recomputable))
        self._of[id(tensor)] = (weakref.ref(tensor), len(self.found.values) - 1)

    def _weight_names(self, tensor: Tensor) -> frozenset[str]:
        pointer = tensor.untyped_storage().data_ptr()
        name = self._weights.get(pointer)
        return frozenset({name}) if name is not None else self._derived.get(pointer, frozenset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        read = [] if func._overloadpacket.__name__ in _SHAPE_ONLY else given
        inputs = frozenset(v for t in read if (v := self.value_of(t)) is not None)
        weights = frozenset().union(*(self._weight_names(t) for t in given))
        direct = frozenset(n for t in given if (n := self._weights.get(t.untyped_storage().data_ptr())) is not None)
        result = func(*args, **(kwargs or {}))
        self.now += 1
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        works = func._overloadpacket in flop_registry
        for name in weights:
            self.found.parameters.setdefault(name, self.now)
        if works and direct:
            self.found.heavy.append((self.now, direct, bool(inputs)))
        if not inputs:
            for tensor in made if weights else []:
                self._derived.setdefault(tensor.untyped_storage().data_ptr(), weights)
                self._held.append(tensor)
            return result
        self.found.reads[self.now] = inputs
        cheap = not weights and not works
        written = func._schema.is_mutable
        for tensor in made:
            if not written or not any(tensor is t for t in given):
                self.add(tensor, inputs, recomputable=cheap, op=self.now)
        if written:
            self._write(func, args, kwargs or {}, inputs, cheap)
        return result

    def _write(self, func: Any, args: Any, kwargs: Any, inputs: frozenset[int], cheap: bool) -> None:
        """A write reaches every tensor that lives in the same memory."""
        targets = set()
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                targets |= {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(value) if isinstance(t, Tensor)}
                for tensor in pytree.tree_leaves(value):
                    if isinstance(tensor, Tensor) and self.value_of(tensor) is None:
                        self.add(tensor, inputs, recomputable=cheap, op=self.now)
        for reference, number in list(self._of.values()):
            tensor = reference()
            if tensor is not None and tensor.untyped_storage().data_ptr() in targets:
                self.add(tensor, inputs | {number}, recomputable=cheap, op=self.now)


def record(model: nn.Module, inputs: Any, call: Callable[[nn.Module, Any], Any]) -> Recording:
    """Record one forward of ``model`` in eval mode without gradients."""
    recorder = Recorder(model)

    def note(times: dict[str, int], name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            times.setdefault(name, recorder.now)

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(note(recorder.found.starts, name)))
        handles.append(module.register_forward_hook(note(recorder.found.ends, name)))
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        recorder.add(leaf, frozenset(), recomputable=False, op=-1)
    model.eval()
    try:
        with torch.no_grad(), recorder:
            output = call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    _name_uncalled(model, recorder.found)
    found = (recorder.value_of(leaf) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    recorder.found.results = frozenset(v for v in found if v is not None)
    return recorder.found


def _name_uncalled(model: nn.Module, found: Recording) -> None:
    """Start what is never called itself where what it holds first is.

    A shared module has several names; a ModuleList starts with its first child; a module whose weight alone is used
    starts there.
    """
    first = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        known = first[id(module)]
        inside = [n for n in found.starts if n == known or n.startswith(f"{known}.")]
        used = [
            found.parameters[f"{known}.{n}"] - 1
            for n, _ in module.named_parameters()
            if f"{known}.{n}" in found.parameters
        ]
        if name in found.starts or not (inside or used):
            continue
        time = min(found.starts[n] for n in inside) if inside else min(used)
        before = [(n, at) for n, at in found.starts.items() if at < time or (at == time and n not in inside)]
        after = [(n, at) for n, at in found.starts.items() if (n, at) not in before]
        found.starts = dict([*before, (name, time), *after])
