"""In which order a forward uses modules and parameters: recorded from a run, else read by ``torch.fx``.

Everything that names a boundary stands on this order, since registration order lies for many models
(a classifier registered first, a shared activation, a head inside the backbone).
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cachefreeze.errors import UsageError
from cachefreeze.isolation import (
    WrittenParameters,
    eval_mode,
    evaluating,
    operation,
    preserved_random_state,
    preserved_state,
)


@dataclass(frozen=True)
class Call:
    """One module call: the module's name and the events between which it ran."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Usage:
    """What one forward used, in order. Event numbers are comparable between all three attributes.

    Attributes:
        calls: Module calls in order of their start; a call that encloses others starts before them.
        parameters: Parameter name -> event of its first use; unused parameters are missing.
        source: ``inputs`` (recorded), ``fx`` (traced without inputs) or ``registration`` (a guess).
        writes: Names of the parameters that a forward in eval mode writes (an ``Embedding`` with ``max_norm``).
    """

    calls: tuple[Call, ...]
    parameters: dict[str, int]
    source: Literal["inputs", "fx", "registration"]
    writes: tuple[str, ...] = ()
    _first: dict[str, Call] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        first: dict[str, Call] = {}
        for call in self.calls:
            first.setdefault(call.name, call)
        object.__setattr__(self, "_first", first)

    def first_call(self, name: str) -> Call | None:
        """The first call of module ``name``, or of what it holds when it is never called itself (a ModuleList)."""
        if name in self._first:
            return self._first[name]
        inside = [call for call in self.calls if call.name.startswith(f"{name}.")]
        return inside[0] if inside else None

    def first_call_of(self, model: nn.Module, name: str) -> Call | None:
        """The first call of the module that has this name, whatever name a recording has for it."""
        return self.first_call(self._known_as(model, name))

    def start(self, model: nn.Module, name: str) -> int | None:
        """The event at which module ``name`` or one of its parameters is first used."""
        name = self._known_as(model, name)
        call = self.first_call(name)
        if call is not None:
            return call.start
        prefix = f"{name}." if name else ""
        ids = {id(p) for p in model.get_submodule(name).parameters()}
        own = (n for n, p in model.named_parameters() if n.startswith(prefix) and id(p) in ids)
        return min((self.parameters[n] for n in own if n in self.parameters), default=None)

    def _known_as(self, model: nn.Module, name: str) -> str:
        """The name by which a recording knows a module: the first of those it is registered under."""
        if name in self._first:
            return name
        module = model.get_submodule(name)
        return next(str(n) for n, m in model.named_modules() if m is module)

    def enclosing(self, call: Call) -> list[str]:
        """Modules whose call encloses ``call``, outermost first; the root is ''."""
        return [other.name for other in self.calls if other.start < call.start and call.end < other.end]


@dataclass(frozen=True)
class Example:
    """A model's inputs as the user hands them over.

    Attributes:
        args: Positional arguments of ``forward``.
        kwargs: Keyword arguments of ``forward``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, inputs: Any) -> Example:
        """A tensor, a tuple (positional) or a dict (keyword)."""
        if isinstance(inputs, Example):
            return inputs
        if isinstance(inputs, dict):
            return cls((), dict(inputs))
        if isinstance(inputs, tuple | list):
            return cls(tuple(inputs), {})
        if isinstance(inputs, Tensor):
            return cls((inputs,), {})
        raise UsageError(
            f"example_inputs={type(inputs).__name__}: expected a tensor, a tuple (positional arguments) "
            "or a dict (keyword arguments) with a batch of at least 2"
        )

    @property
    def batch(self) -> int:
        """Samples in the batch: the length of the first tensor's first dimension."""
        tensors = [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        if not tensors or tensors[0].dim() == 0:
            raise UsageError("example_inputs hold no tensor with a batch dimension; pass one batch of real inputs")
        return int(tensors[0].shape[0])

    def take(self, indices: list[int]) -> Example:
        """The samples ``indices`` of every tensor whose first dimension is the batch."""
        batch = self.batch

        def pick(leaf: Any) -> Any:
            batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch
            return leaf[torch.tensor(indices, device=leaf.device)] if batched else leaf

        args, kwargs = pytree.tree_map(pick, (self.args, self.kwargs))
        return Example(args, kwargs)

    def fresh(self) -> Example:
        """The same inputs in tensors of their own: a forward may write into what it is given."""
        return self.map(lambda tensor: tensor.clone())

    def to(self, device: torch.device) -> Example:
        """The same inputs on ``device``."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Example:
        """The same inputs with every tensor changed."""
        args, kwargs = pytree.tree_map(
            lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        return type(self)(args, kwargs)

    @property
    def beside(self) -> tuple[Example, ...]:
        """What a suffix takes after the rows: nothing, but of inputs that no row can hold."""
        return ()

    def first_two(self) -> list[tuple[Tensor, Tensor]]:
        """Of every tensor whose first dimension is the batch, its first two rows."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        batched = (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == self.batch)
        return [(leaf[0], leaf[1]) for leaf in batched]

    def call(self, model: Callable[..., Any]) -> Any:
        """``model(*args, **kwargs)``."""
        return model(*self.args, **self.kwargs)


# The module with which torchvision's detectors make one batch of a list of images.
LISTS_OF_IMAGES = "GeneralizedRCNNTransform"

# Asking a weight for these is no use of it: many a forward begins with ``x.to(self.head.weight.dtype)``.
METADATA = frozenset({
    "device", "dtype", "grad", "grad_fn", "is_cuda", "is_leaf", "layout", "nbytes", "ndim", "requires_grad", "shape",
    "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point", "nelement", "numel",
    "size", "stride", "__len__",
})  # fmt: skip


class Tracer(fx.Tracer):
    """``torch.fx`` with the model libraries' own leaf modules and functions.

    A library that is not imported cannot have built the model, so none is imported here. Sources:
    torchvision.models.feature_extraction (torchvision.ops), timm.models._features_fx.
    """

    def __init__(self, is_leaf: Callable[[nn.Module, str], bool] | None = None, given: Example | None = None) -> None:
        vision = sys.modules.get("torchvision.ops")
        timm = sys.modules.get("timm.models._features_fx")
        modules: Any = (math,) if vision is None else (math, vision)
        functions = tuple(timm.get_notrace_functions()) if timm is not None else ()
        super().__init__(autowrap_modules=modules, autowrap_functions=functions)
        self._library: tuple[type, ...] = ()
        if vision is not None:
            self._library += tuple(v for v in vars(vision).values() if isinstance(v, type) and issubclass(v, nn.Module))
        if timm is not None:
            self._library += tuple(timm.get_notrace_modules())
        self._is_leaf = is_leaf
        self._given = given

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """One placeholder per given input, in the order given; what was not given keeps its default.

        ``concrete_args`` would do the same but flattens the output of a forward that has a container among its
        defaults. An input without tensors (a flag) is taken as the constant it is.
        """
        required = [
            p.name
            for p in list(inspect.signature(root_fn).parameters.values())[1:]
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        given = Example((), dict.fromkeys(required, torch.empty(0))) if self._given is None else self._given
        names = [name for name in list(inspect.signature(root_fn).parameters)[1:] if name not in given.kwargs]
        names += [f"input_{at}" for at in range(len(names), len(given.args))]  # what *args takes
        proxies = []
        for name, value in [*zip(names, given.args, strict=False), *given.kwargs.items()]:
            proxy = self.create_proxy("placeholder", name, (), {})
            constant = not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
            proxies.append(value if constant else proxy)
        positional, keywords = (
            proxies[: len(given.args)],
            dict(zip(given.kwargs, proxies[len(given.args) :], strict=True)),
        )

        def forward(root: nn.Module) -> Any:
            return root_fn(root, *positional, **keywords)

        return forward, [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Leaves are torch's and the libraries' own modules, unless a rule was given."""
        if self._is_leaf is not None:
            return self._is_leaf(m, module_qualified_name)
        if isinstance(m, nn.Sequential):
            return False
        return isinstance(m, self._library) or super().is_leaf_module(m, module_qualified_name)


def record_usage(model: nn.Module, inputs: Example) -> Usage:
    """Run one forward in eval mode without gradients and note what it uses, in order.

    Module modes, buffers, plain attributes and random states are as before afterwards.

    Raises:
        UsageError: A module is scripted, so what it uses cannot be seen.
    """
    scripted = next((name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise UsageError(
            f"{scripted or 'the model'!r} is a ScriptModule, whose calls and weights cannot be followed; put the plain "
            "module in its place"
        )
    _refuse_padded_images(model)
    events = _Events(model)

    class _Parameters(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if operation(func) not in METADATA:
                for leaf in pytree.tree_leaves((args, kwargs or {})):
                    if isinstance(leaf, nn.Parameter):
                        events.parameter(leaf)
            return func(*args, **(kwargs or {}))

    written = WrittenParameters(METADATA)
    try:
        with _calls_told(model, events.enter, events.leave), evaluating(model), _Parameters(), written:
            inputs.fresh().call(model)
    finally:
        found = {id(parameter) for parameter in written.restore()}
    usage = events.usage("inputs")
    return replace(usage, writes=tuple(name for name, p in model.named_parameters() if id(p) in found))


@contextmanager
def noted_usage(model: nn.Module) -> Iterator[Callable[[], Usage | None]]:
    """Note what a forward inside uses, in order, at hardly any cost: parameters when their own module is called.

    Yields:
        The usage, once the forward has run; None where that is not when they are used: a module with some that train
        and some that do not uses its own beside those of its children (a class token).
    """
    events = _Events(model)
    modules = dict(model.named_modules())
    calling: set[str] = set()

    def enter(name: str) -> None:
        calling.update(opened for opened, _ in events._open[-1:])
        events.enter(name)
        for parameter in modules[name].parameters(recurse=False):
            events.parameter(parameter)

    def leave(name: str) -> None:
        if name not in calling:  # one kernel for all that is in it
            for parameter in modules[name].parameters():
                events.parameter(parameter)
        events.leave(name)

    mixed = any(
        module._modules
        and next(module.parameters(recurse=False), None) is not None
        and len({p.requires_grad for p in module.parameters()}) > 1
        for module in modules.values()
    )
    with _calls_told(model, enter, leave):
        yield lambda: None if mixed else events.usage("inputs")


@contextmanager
def _calls_told(model: nn.Module, enter: Callable[[str], None], leave: Callable[[str], None]) -> Iterator[None]:
    """``enter`` and ``leave`` are called with the name of every module that a forward inside calls."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, n=name: enter(n), prepend=True))
        handles.append(module.register_forward_hook(lambda _m, _a, _o, n=name: leave(n)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_padded_images(model: nn.Module) -> None:
    """Detectors of torchvision put a list of images into one batch themselves; most pad it to the largest."""
    for name, module in model.named_modules():
        if type(module).__name__ == LISTS_OF_IMAGES and getattr(module, "fixed_size", None) is None:
            raise UsageError(
                f"{name!r} ({type(module).__name__}) of {type(model).__name__} pads a batch to its largest image, so "
                "a row would depend on its batch; cache its backbone instead: split(model.backbone, images) takes one "
                "tensor of images of equal size"
            )


def trace_usage(model: nn.Module) -> Usage:
    """Read the order of use from a symbolic trace; from registration, with a warning, where that fails."""
    events = _Events(model)
    parameters: dict[Any, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))

    class _Order(Tracer):
        def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            name = self.path_of_module(m)
            events.enter(name)
            if self.is_leaf_module(m, name):
                events.register(m, name)
            result = super().call_module(m, forward, args, kwargs)
            events.leave(name)
            return result

        def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
            node = super().create_node(kind, target, args, kwargs, *rest, **more)
            if not asks_metadata(node):
                for parent in node.all_input_nodes:
                    if parent.op == "get_attr" and parent.target in parameters:
                        events.parameter(parameters[parent.target])
            return node

    events.enter("")
    try:
        with eval_mode(model), preserved_random_state(), preserved_state(model):
            _Order().trace(model)
    except Exception as error:  # any op of the user's forward may refuse a proxy, with any exception
        warnings.warn(
            f"the forward of {type(model).__name__} cannot be read without inputs ({_first_line(error)}); blocks are "
            "in registration order, which may differ from the order of use. Pass example_inputs, or let split resolve "
            "it",
            stacklevel=3,
        )
        events = _Events(model)
        events.enter("")
        events.register(model, "")
        events.leave("")
        return events.usage("registration")
    events.leave("")
    return events.usage("fx")


def usage_of(model: nn.Module, inputs: Example | None = None) -> Usage:
    """The order of use: recorded when there are inputs, else traced."""
    return trace_usage(model) if inputs is None else record_usage(model, inputs)


def asks_metadata(node: fx.Node) -> bool:
    """Whether a node reads a tensor's shape, dtype or device rather than its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in METADATA
    return node.op == "call_method" and node.target in METADATA


def attribute(model: nn.Module, path: str) -> Any:
    """What a ``get_attr`` node refers to."""
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


class _Events:
    """A clock of module calls and parameter uses."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(p): name for name, p in model.named_parameters()}  # a tied parameter has its first name
        self._calls: list[Call] = []
        self._parameters: dict[str, int] = {}
        self._open: list[tuple[str, int]] = []
        self._now = 0

    def usage(self, source: Literal["inputs", "fx", "registration"]) -> Usage:
        return Usage(tuple(sorted(self._calls, key=lambda call: call.start)), self._parameters, source)

    def enter(self, name: str) -> None:
        self._open.append((name, self._tick()))

    def leave(self, name: str) -> None:
        # a forward that raised inside (and was caught by the model) never left: drop what it opened
        while self._open:
            opened, start = self._open.pop()
            if opened == name:
                self._calls.append(Call(name, start, self._tick()))
                return

    def parameter(self, parameter: nn.Parameter) -> None:
        name = self._names.get(id(parameter))
        if name is not None and name not in self._parameters:
            self._parameters[name] = self._tick()

    def register(self, module: nn.Module, name: str) -> None:
        """Use a module's parameters and children in registration order: all that is known inside a leaf."""
        for parameter in module.parameters(recurse=False):
            self.parameter(parameter)
        for child_name, child in module.named_children():
            child_path = f"{name}.{child_name}" if name else child_name
            self.enter(child_path)
            self.register(child, child_path)
            self.leave(child_path)

    def _tick(self) -> int:
        self._now += 1
        return self._now


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
