"""The fx executor: one linear graph, cut at the boundary's first call.

Only modules whose forward encloses that call are traced through; everything that lies wholly before or wholly
after is a leaf and is called as it is, with its own modes, hooks and control flow. Cutting a linear order keeps
the order of in-place writes. There is one graph for train and one for eval; both share the model's Parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from cachefreeze.errors import SplitError, StaleCacheError
from cachefreeze.fingerprint import attributes_of, digest
from cachefreeze.freezing import hooks_of
from cachefreeze.isolation import eval_mode
from cachefreeze.splitting.boundary import Cut, Site, Uncopied, as_returned
from cachefreeze.splitting.fx_recipe import VIEWS, Recipe, signature, tensor_leaves
from cachefreeze.splitting.fx_tracing import Tracing
from cachefreeze.splitting.fx_unread import unread_rows
from cachefreeze.tracing import Example

# Deterministic and parameter-free, and never larger than their input: right after the prefix they belong to it,
# since rows behind them are smaller (a pooled head's are up to 49 times) or save the suffix the work.
_TAIL_MODULES = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.Flatten, nn.Unflatten, nn.Identity,
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
)  # fmt: skip
_TAIL_FUNCTIONS = VIEWS | {
    torch.mean, torch.amax, torch.relu, torch.sigmoid, torch.tanh, "mean", "amax", "relu", "sigmoid", "tanh",
    functional.relu, functional.gelu, functional.silu, functional.hardswish, functional.avg_pool2d,
    functional.max_pool2d, functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d,
    functional.adaptive_max_pool2d, torch.adaptive_avg_pool1d,
}  # fmt: skip


class FxExecutor:
    """Cut a traceable model; see the module's docstring."""

    name = "fx"

    def cut(self, site: Site, example: Example) -> Cut:
        """Propose a prefix and a suffix; raises SplitError where the model cannot be traced or the cut not made."""
        tracing = Tracing(site, example)
        with site.mode(train=True):
            train = tracing.graph()
        with site.mode(train=False):
            evaluate = tracing.graph()
        latest = _common_end(tracing, train, evaluate)
        refusals: list[SplitError] = []
        for place in _by_bytes(site, example, latest, train, evaluate):
            try:
                return self._cut_at(place, site, example, tracing, train, evaluate)
            except SplitError as error:  # a fold of batch and time, for one, has no row
                refusals.append(error)
        raise refusals[0]

    def _cut_at(
        self, place: _Place, site: Site, example: Example, tracing: Tracing, train: fx.Graph, evaluate: fx.Graph
    ) -> Cut:
        end, crossing = place.end, place.crossing
        prefix_graph = _prefix_graph(evaluate, end, crossing)
        prefix = Prefix(fx.GraphModule(site.model, prefix_graph, "PrefixGraph"))
        two = _record(prefix, example, [0, 1]) if place.of_two is None else place.of_two
        three = _record(prefix, example, [i % example.batch for i in range(3)])
        _check_constants(list(evaluate.nodes), crossing, two, prefix, example)
        recipe = Recipe(evaluate, end, crossing, two, three)

        def prepared() -> Suffix:
            suffix = Suffix(
                site.model, tracing.open_modules(), lambda graph: recipe.suffix(graph or tracing.graph(), site.model)
            )
            with site.mode(train=True):
                suffix.prepare(train)
            with site.mode(train=False):
                suffix.prepare(evaluate)
            return suffix

        suffix = prepared()
        kept = [crossing.index(position) for position in recipe.stored]
        recipe.left_out = unread_rows(suffix, list(_tensors(two, kept)), site)
        if recipe.left_out:
            suffix = prepared()
        prefix.select(kept, recipe.left_out)
        return Cut(prefix, suffix, tuple(t for i, t in enumerate(recipe.tensors) if i not in recipe.left_out))


class Prefix(nn.Module):
    """Raw inputs -> boundary activations, without gradients and in eval mode; modes are put back afterwards."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph
        self._kept: list[int] | None = None
        self._left_out = frozenset[int]()

    def select(self, kept: list[int], left_out: frozenset[int] = frozenset()) -> None:
        """Hand out only these of the recorded values, and not some of their tensors; the suffix remakes the others."""
        self._kept, self._left_out = kept, left_out

    def values(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Every recorded value that crosses the boundary."""
        with torch.no_grad(), eval_mode(self.graph):
            result: tuple[Any, ...] = self.graph.forward(*args, **kwargs)  # its own call prints what it raises
        return result

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """Run the frozen part: one tensor, or a tuple in the order of ``boundary.tensors``."""
        made = _tensors(self.values(*args, **kwargs), self._kept)
        return as_returned([tensor for at, tensor in enumerate(made) if at not in self._left_out])


class Suffix(Uncopied, nn.Module):
    """Boundary activations -> the model's output. It has no mode of its own: it follows the model's modules."""

    def __init__(
        self, model: nn.Module, opened: tuple[nn.Module, ...], make: Callable[[fx.Graph | None], fx.GraphModule]
    ) -> None:
        super().__init__()
        self.graphs = nn.ModuleDict()
        # not registered: the whole model is no part of the suffix
        self._follow: dict[str, Any] = {"model": model, "opened": opened, "make": make}
        self._attributes = _digest(opened)
        self._seen = _values(opened)

    def train(self, mode: bool = True) -> Suffix:
        """Set the mode of the model, which is the only mode there is."""
        self._follow["model"].train(mode)
        return self

    def prepare(self, traced: fx.Graph | None = None) -> nn.Module:
        """The graph for the modes that the traced-through modules are in now, made of a trace in these modes."""
        opened = self._follow["opened"]
        if self._are_set_anew():
            self._take_up_attributes()
        key = "".join("t" if module.training else "e" for module in opened)
        if key not in self.graphs:
            self.graphs[key] = self._follow["make"](traced)
        return self.graphs[key]

    def _are_set_anew(self) -> bool:
        """Whether a plain attribute is another object; in a compiled forward, which has no identities, unequal."""
        if torch.compiler.is_compiling():
            plain = [entry for entry in self._seen if isinstance(entry[2], bool | int | float | str)]
            return any(getattr(module, key, None) != value for module, key, value in plain)
        return any(vars(module).get(key, self) is not value for module, key, value in self._seen)

    def follow(self) -> None:
        """Take up plain attributes that changed on traced-through modules; called between passes.

        Raises:
            StaleCacheError: A module that the suffix calls is no longer the model's.
        """
        model = self._follow["model"]
        for graph in self.graphs.values():
            assert isinstance(graph, fx.GraphModule)
            for node in graph.graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    name = str(node.target)
                    if _reach(model, name) is not _reach(graph, name):
                        raise StaleCacheError(
                            f"{name!r} of {type(model).__name__} was replaced after the loader was made, so what "
                            "trains is not what the model holds; replace modules first, then make the Engine"
                        )
        for module in self._follow["opened"]:
            if hooks_of(module):
                raise StaleCacheError(
                    f"a forward hook was registered on {type(module).__name__} after the loader was made, and a traced "
                    "forward would not run it; register hooks first, then make the Engine"
                )
        self._take_up_attributes()
        self.prepare()  # a compiled suffix cannot trace anew by itself

    def _take_up_attributes(self) -> None:
        """Trace again where a plain attribute of a traced-through module has another value."""
        opened = self._follow["opened"]
        self._seen = _values(opened)
        attributes = _digest(opened)
        if attributes != self._attributes:
            self._attributes = attributes
            self.graphs.clear()

    def forward(self, *rows: Tensor) -> Any:
        """Run the trainable part on a fresh batch of rows, which it may write into."""
        return self.prepare().forward(*rows)  # as in the prefix


def _reach(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, None where there is none any more."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def _values(modules: tuple[nn.Module, ...]) -> list[tuple[nn.Module, str, Any]]:
    """The plain attributes themselves: what is still the same object was not set anew."""
    return [(module, name, value) for module in modules for name, value in attributes_of(module).items()]


def _digest(modules: tuple[nn.Module, ...]) -> str:
    """Of what a traced forward may have read from its modules beside weights and submodules, and from around them."""
    return digest([(attributes_of(module), _plain_around(type(module))) for module in modules])


def _plain_around(kind: type[nn.Module]) -> dict[str, Any]:
    """Numbers, flags and words of a module's class, and of the globals, that its forward names."""
    code, around = getattr(kind.forward, "__code__", None), getattr(kind.forward, "__globals__", {})
    named = {name: getattr(kind, name, around.get(name)) for name in (code.co_names if code is not None else ())}
    return {name: value for name, value in named.items() if isinstance(value, bool | int | float | str)}


def _common_end(tracing: Tracing, train: fx.Graph, evaluate: fx.Graph) -> int:
    """Where the prefix ends in both graphs, after the parameter-free tail; both must agree up to there."""
    nodes = [list(graph.nodes) for graph in (train, evaluate)]
    end = min(tracing.end(train), tracing.end(evaluate))
    for first, second in zip(nodes[0][:end], nodes[1][:end], strict=True):
        if signature(first) != signature(second):
            raise SplitError(
                f"{first.format_node()} runs before {tracing.site.name!r} and differs between train and eval mode, so "
                "its result is no fixed row (a functional dropout with training=self.training?). Make it a module "
                "and freeze from a block before it, or train from an earlier block"
            )
    model = tracing.site.model
    while _in_tail(nodes[0][end], model) and signature(nodes[0][end]) == signature(nodes[1][end]):
        end += 1
    return end


def _in_tail(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return type(module) in _TAIL_MODULES and not hooks_of(module)  # a subclass may be anything
    return node.op in ("call_function", "call_method") and node.target in _TAIL_FUNCTIONS


class _Place(NamedTuple):
    """Where the cut may lie.

    Attributes:
        end: Position of the first node behind it.
        crossing: Positions of the values that cross.
        of_two: These values for the first two samples, where they are known.
    """

    end: int
    crossing: list[int]
    of_two: tuple[Any, ...] | None


def _by_bytes(site: Site, example: Example, latest: int, train: fx.Graph, evaluate: fx.Graph) -> list[_Place]:
    """Where the cut may lie, the fewest bytes of a row first, and of equals the latest.

    What needs no weights right before the boundary can run on either side: pooling to a size above the input's, or a
    resize, makes rows larger than what it was made of.
    """
    nodes = list(evaluate.nodes)
    ends = [latest]
    while _in_tail(nodes[ends[-1] - 1], site.model) or _is_free(nodes[ends[-1] - 1]):
        ends.append(ends[-1] - 1)
    crossing = {end: sorted(_crossing(train, end) | _crossing(evaluate, end)) for end in ends}
    if len(ends) == 1:
        return [_Place(latest, crossing[latest], None)]
    some = example.take([0, 1])
    with site.mode(train=False), torch.no_grad():
        values = _Values(
            fx.GraphModule(site.model, _prefix_graph(evaluate, latest, [])),
            {nodes[at].name for found in crossing.values() for at in found},
        )
        values.run(*some.args, *some.kwargs.values())
    places = [_Place(end, crossing[end], tuple(values.of[nodes[at].name] for at in crossing[end])) for end in ends]
    return sorted(places, key=lambda place: (sum(leaf.nbytes for leaf in tensor_leaves(place.of_two)), -place.end))


class _Values(fx.Interpreter):
    """Runs a graph and keeps some of its nodes' values, by their names."""

    def __init__(self, module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.of: dict[str, Any] = {}
        self._names = names

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            self.of[n.name] = value
        return value


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


def _tensors(values: tuple[Any, ...], kept: list[int] | None) -> tuple[Tensor, ...]:
    chosen = values if kept is None else [values[i] for i in kept]
    return tuple(leaf for value in chosen for leaf in tensor_leaves(value))
