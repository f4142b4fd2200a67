"""The fx executor: one linear graph, cut at the boundary's first call.

Only modules whose forward encloses that call are traced through; everything that lies wholly before or wholly
after is a leaf and is called as it is, with its own modes, hooks and control flow. Cutting a linear order keeps
the order of in-place writes. There is one graph for train and one for eval; both share the model's Parameters.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from cachefreeze.errors import SplitError
from cachefreeze.freezing import FrozenLock
from cachefreeze.isolation import eval_mode
from cachefreeze.splitting.boundary import BoundaryTensor, Cut, Site
from cachefreeze.tracing import Example, Tracer, asks_metadata, attribute

# Deterministic and parameter-free, and never larger than their input: right after the prefix they belong to it,
# since rows behind them are smaller (a pooled head's are up to 49 times) or save the suffix the work.
_TAIL_MODULES = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.Flatten, nn.Unflatten, nn.Identity,
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
)  # fmt: skip
_VIEWS = {
    operator.getitem, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
    torch.chunk, torch.split, torch.unbind, getattr,
    "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split", "unbind",
    "contiguous", "size", "dim",
}  # fmt: skip
_TAIL_FUNCTIONS = _VIEWS | {
    torch.mean, torch.amax, torch.relu, torch.sigmoid, torch.tanh, "mean", "amax", "relu", "sigmoid", "tanh",
    functional.relu, functional.gelu, functional.silu, functional.hardswish, functional.avg_pool2d,
    functional.max_pool2d, functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d,
    functional.adaptive_max_pool2d, torch.adaptive_avg_pool1d,
}  # fmt: skip


_CONSTANT = (int, float, bool, str, torch.dtype, torch.device, type(None))


class FxExecutor:
    """Cut a traceable model; see the module's docstring."""

    name = "fx"

    def cut(self, site: Site, example: Example) -> Cut:
        """Propose a prefix and a suffix; raises SplitError where the model cannot be traced or the cut not made."""
        tracing = _Tracing(site, example)
        with site.mode(train=True):
            train = tracing.graph()
        with site.mode(train=False):
            evaluate = tracing.graph()
        end = _common_end(tracing, train, evaluate)
        refusal: SplitError | None = None
        while True:
            try:
                return self._cut_at(end, site, example, tracing, train, evaluate)
            except SplitError as error:
                # a fold of batch and time, for one, has no row: what needs no weights can run in the suffix as well
                refusal = refusal or error
                if not _is_free(list(evaluate.nodes)[end - 1]):
                    raise refusal from None
                end -= 1

    def _cut_at(
        self, end: int, site: Site, example: Example, tracing: _Tracing, train: fx.Graph, evaluate: fx.Graph
    ) -> Cut:
        crossing = sorted(_crossing(train, end) | _crossing(evaluate, end))
        prefix_graph = _prefix_graph(evaluate, end, crossing)
        prefix = Prefix(fx.GraphModule(site.model, prefix_graph, "PrefixGraph"))
        values = [_record(prefix, example, [i % example.batch for i in range(count)]) for count in (2, 3)]
        _check_constants(list(evaluate.nodes), crossing, values[0], prefix, example)
        recipe = _Recipe(evaluate, end, crossing, *values)
        suffix = Suffix(site.model, tracing.open_modules(), lambda: recipe.suffix(tracing.graph(), site.model))
        with site.mode(train=True):
            suffix.prepare()
        with site.mode(train=False):
            suffix.prepare()
        kept = [crossing.index(position) for position in recipe.stored]
        prefix.select(kept)
        return Cut(prefix, suffix, tuple(recipe.tensors))


class Prefix(nn.Module):
    """Raw inputs -> boundary activations, without gradients and in eval mode; modes are put back afterwards."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph
        self._kept: list[int] | None = None

    def select(self, kept: list[int]) -> None:
        """Hand out only these of the recorded values; the others are remade in the suffix."""
        self._kept = kept

    def values(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Every recorded value that crosses the boundary."""
        with torch.no_grad(), eval_mode(self.graph):
            result: tuple[Any, ...] = self.graph(*args, **kwargs)
        return result

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """Run the frozen part: one tensor, or a tuple in the order of ``boundary.tensors``."""
        values = _tensors(self.values(*args, **kwargs), self._kept)
        return values[0] if len(values) == 1 else values


class Suffix(nn.Module):
    """Boundary activations -> the model's output. It has no mode of its own: it follows the model's modules."""

    def __init__(self, model: nn.Module, opened: tuple[nn.Module, ...], make: Callable[[], fx.GraphModule]) -> None:
        super().__init__()
        self.graphs = nn.ModuleDict()
        # not registered: the whole model is no part of the suffix
        self._follow: dict[str, Any] = {"model": model, "opened": opened, "make": make}

    def train(self, mode: bool = True) -> Suffix:
        """Set the mode of the model, which is the only mode there is."""
        self._follow["model"].train(mode)
        return self

    def prepare(self) -> nn.Module:
        """The graph for the modes that the traced-through modules are in now."""
        key = "".join("t" if module.training else "e" for module in self._follow["opened"])
        if key not in self.graphs:
            self.graphs[key] = self._follow["make"]()
        return self.graphs[key]

    def forward(self, *rows: Tensor) -> Any:
        """Run the trainable part on a fresh batch of rows, which it may write into."""
        return self.prepare()(*rows)


class _Tracing:
    """Traces the model with everything but the boundary's surroundings as leaves."""

    def __init__(self, site: Site, example: Example) -> None:
        self.site = site
        self.example = example
        module = site.model.get_submodule(site.name)
        # a shared module is known by its first name, to the recording as to fx
        known = next(name for name, other in site.model.named_modules() if other is module)
        call = site.usage.first_call(known)
        if call is None:
            raise SplitError(
                f"fx: module {site.name!r} is never called (the forward uses its weights directly), so there is no "
                "place to cut; train from the module that uses it"
            )
        self.target = call.name
        self.opened = ["", *(name for name in site.usage.enclosing(call) if name)]
        boundary = site.model.get_submodule(call.name)
        if isinstance(boundary, nn.Sequential) and type(boundary).forward is nn.Sequential.forward:
            self.opened.append(call.name)  # its parameter-free start may belong to the prefix
        for name in self.opened:
            module = site.model.get_submodule(name)
            hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
            if any(not isinstance(hook, FrozenLock) for hook in hooks):
                raise SplitError(
                    f"fx: module {name or type(module).__name__!r} encloses {site.name!r} and has forward hooks, which "
                    "a traced forward would not run; remove them, or hook the modules inside it"
                )
        parameters = dict(site.model.named_parameters())
        self.trainable = {id(p) for n, p in parameters.items() if p.requires_grad and n not in site.frozen}

    def open_modules(self) -> tuple[nn.Module, ...]:
        return tuple(self.site.model.get_submodule(name) for name in self.opened)

    def graph(self) -> fx.Graph:
        """Trace in the modes that the modules are in now."""
        opened = set(self.opened)
        inside: list[str] = []

        class _Cutting(Tracer):
            def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
                inside.append(self.path_of_module(m))
                result = super().call_module(m, forward, args, kwargs)
                inside.pop()
                return result

        model = self.site.model
        try:
            return _Cutting(lambda _m, name: name not in opened, self.example).trace(model)
        except Exception as error:  # the user's forward may refuse a proxy with any exception
            where = next((name for name in reversed(inside) if name in opened), "")
            owner = type(model.get_submodule(where)).__name__
            place = f"module {where!r} ({owner})" if where else f"the forward of {owner} itself"
            first = str(error).strip().splitlines()[:1]
            raise SplitError(
                f"fx cannot trace {place}, which encloses {self.site.name!r}: {type(error).__name__}: {''.join(first)}"
            ) from error

    def end(self, graph: fx.Graph) -> int:
        """Position of the first node that belongs to the boundary or uses a trainable parameter."""
        model = self.site.model
        for position, node in enumerate(graph.nodes):
            if node.op == "call_module":
                target = str(node.target)
                if target == self.target or target.startswith(f"{self.target}."):
                    return position
                if any(id(p) in self.trainable for p in model.get_submodule(target).parameters()):
                    return position
            weights = (parent for parent in node.all_input_nodes if parent.op == "get_attr")
            if any(id(attribute(model, str(w.target))) in self.trainable for w in weights) and not asks_metadata(node):
                return position
        raise SplitError(f"fx: the traced forward of {type(model).__name__} never reaches {self.site.name!r}")


def _common_end(tracing: _Tracing, train: fx.Graph, evaluate: fx.Graph) -> int:
    """Where the prefix ends in both graphs, after the parameter-free tail; both must agree up to there."""
    nodes = [list(graph.nodes) for graph in (train, evaluate)]
    end = min(tracing.end(train), tracing.end(evaluate))
    for first, second in zip(nodes[0][:end], nodes[1][:end], strict=True):
        if _signature(first) != _signature(second):
            raise SplitError(
                f"{first.format_node()} runs before {tracing.site.name!r} and differs between train and eval mode, so "
                "its result is no fixed row (a functional dropout with training=self.training?). Make it a module "
                "and freeze from a block before it, or train from an earlier block"
            )
    model = tracing.site.model
    while _in_tail(nodes[0][end], model) and _signature(nodes[0][end]) == _signature(nodes[1][end]):
        end += 1
    return end


def _signature(node: fx.Node) -> tuple[str, str, str, str]:
    return node.op, str(node.target), str(node.args), str(node.kwargs)


def _in_tail(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        hooked = bool(module._forward_hooks or module._forward_pre_hooks)
        return type(module) in _TAIL_MODULES and not hooked  # a subclass may be anything
    return node.op in ("call_function", "call_method") and node.target in _TAIL_FUNCTIONS


def _from_inputs(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes whose value depends on a model input."""
    depend: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(parent in depend for parent in node.all_input_nodes):
            depend.add(node)
    return depend


def _crossing(graph: fx.Graph, end: int) -> set[int]:
    """Positions of the input-dependent values that are made before ``end`` and used from there on."""
    nodes = list(graph.nodes)
    depend = _from_inputs(nodes)
    later = set(nodes[end:])
    return {i for i, node in enumerate(nodes[:end]) if node in depend and any(user in later for user in node.users)}


def _prefix_graph(graph: fx.Graph, end: int, crossing: list[int]) -> fx.Graph:
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    nodes = list(graph.nodes)
    for node in nodes[:end]:
        copies[node] = made.node_copy(node, copies.__getitem__)
    for node in nodes[end:]:
        if node.op == "placeholder":  # fx emits placeholders first, so none comes after the cut
            raise SplitError(f"fx: input {node.target!r} enters after the boundary")
    made.output(tuple(copies[nodes[position]] for position in crossing))
    return made


def _record(prefix: Prefix, example: Example, samples: list[int]) -> tuple[Any, ...]:
    some = example.take(samples)
    values: tuple[Any, ...] = prefix.values(*some.args, **some.kwargs)
    return values


def _check_constants(
    nodes: list[fx.Node], crossing: list[int], values: tuple[Any, ...], prefix: Prefix, example: Example
) -> None:
    """A number that crosses may follow from the batch's size, not from its samples: no row could carry it."""
    found = [_plain(value) for value in values]
    if not any(found):
        return
    for sample in (0, 1):
        others = [_plain(value) for value in _record(prefix, example, [sample, sample])]
        for position, value, other in zip(crossing, found, others, strict=True):
            if value != other:
                raise SplitError(
                    f"{nodes[position].format_node()} crosses the boundary with a value read from the samples of the "
                    f"batch ({value} or {other}), which no row can carry; train from a block before it"
                )


def _plain(value: Any) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves(value) if not isinstance(leaf, Tensor)]


def _is_free(node: fx.Node) -> bool:
    """Whether a node is an op on values: no input, no module and no weight."""
    return node.op in ("call_function", "call_method") and not any(n.op == "get_attr" for n in node.all_input_nodes)


class _Recipe:
    """How a suffix is made: which values arrive as rows, and how the others are remade from them.

    Attributes:
        stored: Positions whose value is one tensor (or several) that arrives as rows.
        tensors: The boundary tensors, in the order of the suffix's arguments.
    """

    def __init__(
        self, graph: fx.Graph, end: int, crossing: list[int], at_two: tuple[Any, ...], at_three: tuple[Any, ...]
    ) -> None:
        self.end = end
        nodes = list(graph.nodes)
        self.before = [_signature(node) for node in nodes[:end]]
        self.values = {p: (a, b) for p, a, b in zip(crossing, at_two, at_three, strict=True)}
        self.same, self.views = _shared_memory(nodes, self.values)
        self.stored: list[int] = []
        self.tensors: list[BoundaryTensor] = []
        for position in crossing:
            if position in self.views or position in self.same:
                continue
            found = [
                _describe(nodes[position], a, b)
                for a, b in zip(_leaves(self.values[position][0]), _leaves(self.values[position][1]), strict=True)
            ]
            if found:
                self.stored.append(position)
                self.tensors += found
        if not self.tensors:
            raise SplitError("no tensor crosses the boundary, so there is nothing to cache")

    def suffix(self, graph: fx.Graph, model: nn.Module) -> fx.GraphModule:
        """Make the suffix from one trace of the model, in whatever modes its modules are in."""
        nodes = list(graph.nodes)
        if [_signature(node) for node in nodes[: self.end]] != self.before:
            raise SplitError(
                f"in these modes the forward of {type(model).__name__} differs before the boundary; keep the modules "
                "around the boundary all in train mode or all in eval mode"
            )
        made = fx.Graph()
        rows = [made.placeholder(f"row_{i}") for i in range(len(self.tensors))]
        batch = made.call_function(torch.Tensor.size, (rows[0], self.tensors[0].batch_dim))
        arriving = iter(rows)
        copies: dict[fx.Node, fx.Node] = {}
        for position, (at_two, at_three) in self.values.items():
            if position in self.same:
                copies[nodes[position]] = copies[nodes[self.same[position]]]
            elif position not in self.views:
                copies[nodes[position]] = _remake(made, at_two, at_three, batch, arriving)

        def copy(node: fx.Node) -> fx.Node:
            # constants made of weights, and views of rows, are remade here from what they were made of
            if node not in copies:
                if node.op == "placeholder":
                    raise SplitError(f"fx: input {node.target!r} is used after the boundary in one mode only")
                for parent in node.all_input_nodes:
                    copy(parent)
                copies[node] = made.node_copy(node, copies.__getitem__)
            return copies[node]

        for node in nodes[self.end :]:
            copy(node)
        if not batch.users:
            made.erase_node(batch)
        made.lint()
        return fx.GraphModule(model, made, "SuffixGraph")


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _tensors(values: tuple[Any, ...], kept: list[int] | None) -> tuple[Tensor, ...]:
    chosen = values if kept is None else [values[i] for i in kept]
    return tuple(leaf for value in chosen for leaf in _leaves(value))


def _describe(node: fx.Node, at_two: Tensor, at_three: Tensor) -> BoundaryTensor:
    """The batch dimension is the one that is 2 for two samples and 3 for three."""
    sizes = list(zip(at_two.shape, at_three.shape, strict=True))
    moving = [d for d, (two, three) in enumerate(sizes) if two != three]
    if not moving:
        raise SplitError(
            f"{node.format_node()} crosses the boundary and has no batch dimension, so a row would depend on the "
            "batch it was computed in; train from a block before it"
        )
    if len(moving) > 1 or sizes[moving[0]] != (2, 3):
        raise SplitError(
            f"{node.format_node()} crosses the boundary with shapes {tuple(at_two.shape)} for two samples and "
            f"{tuple(at_three.shape)} for three: no single dimension is the batch; train from another block"
        )
    return BoundaryTensor.of(at_two, moving[0])


def _remake(graph: fx.Graph, at_two: Any, at_three: Any, batch: fx.Node, rows: Any) -> Any:
    """A crossing value in the suffix: rows for tensors, arithmetic on the batch size for shapes."""
    if isinstance(at_two, Tensor):
        return next(rows)
    if isinstance(at_two, dict) and type(at_two) in (dict, OrderedDict):
        entries = {key: _remake(graph, value, at_three[key], batch, rows) for key, value in at_two.items()}
        return graph.call_function(dict, (entries,))
    if isinstance(at_two, tuple | list):
        items = [_remake(graph, a, b, batch, rows) for a, b in zip(at_two, at_three, strict=True)]
        if hasattr(at_two, "_fields"):
            return graph.call_function(type(at_two), tuple(items))
        return graph.call_function(list if isinstance(at_two, list) else tuple, (items,))
    if isinstance(at_two, int) and at_two != at_three:
        step = at_three - at_two
        scaled = graph.call_function(operator.mul, (batch, step))
        return graph.call_function(operator.add, (scaled, at_two - 2 * step))
    if at_two == at_three and isinstance(at_two, _CONSTANT):
        return graph.call_function(_constant, (at_two,))
    raise SplitError(f"a value of type {type(at_two).__name__} crosses the boundary and cannot be remade from rows")


def _constant(value: Any) -> Any:
    """A value that does not depend on the batch, as a node that others can refer to."""
    return value


def _shared_memory(nodes: list[fx.Node], values: dict[int, tuple[Any, Any]]) -> tuple[dict[int, int], set[int]]:
    """Crossing values in the memory of another one, so that a write must reach both.

    Returns:
        Positions that are the very tensor at another position (what an in-place module returns), and positions that
        are views of another one and are remade from it.
    """
    same: dict[int, int] = {}
    views: set[int] = set()
    owners: dict[int, int] = {}
    for position, (value, _) in values.items():
        if not isinstance(value, Tensor) or not value.numel():
            continue
        base = owners.setdefault(value.untyped_storage().data_ptr(), position)
        if base == position:
            continue
        if _is_view_of(nodes[position], nodes[base]):
            views.add(position)
        elif _geometry(value) == _geometry(values[base][0]):
            same[position] = base
    return same, views


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _is_view_of(node: fx.Node, base: fx.Node) -> bool:
    """Whether only view ops lead from ``base`` to ``node``."""
    if node is base:
        return True
    inputs = node.all_input_nodes
    pure = node.op in ("call_function", "call_method") and node.target in _VIEWS
    return pure and bool(inputs) and all(_is_view_of(parent, base) for parent in inputs)
