"""How the fx executor makes a suffix: which values arrive as rows, and how the others are remade from them."""

from __future__ import annotations

import operator
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from cachefreeze.errors import SplitError
from cachefreeze.splitting.boundary import BoundaryTensor
from cachefreeze.splitting.fx_unread import absent, absent_arguments

VIEWS = {
    operator.getitem, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
    torch.chunk, torch.split, torch.unbind, getattr,
    "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split", "unbind",
    "contiguous", "size", "dim",
}  # fmt: skip
_CONSTANT = (int, float, bool, str, torch.dtype, torch.device, type(None))


class Recipe:
    """How a suffix is made: which values arrive as rows, and how the others are remade from them.

    Attributes:
        stored: Positions whose value is one tensor (or several) that arrives as rows.
        tensors: The boundary tensors, in the order of the suffix's arguments and of what is left out among them.
        left_out: Which of them do not arrive, since nothing follows from them.
    """

    def __init__(
        self, graph: fx.Graph, end: int, crossing: list[int], at_two: tuple[Any, ...], at_three: tuple[Any, ...]
    ) -> None:
        self.end = end
        nodes = list(graph.nodes)
        self.before = [signature(node) for node in nodes[:end]]
        self.values = {p: (a, b) for p, a, b in zip(crossing, at_two, at_three, strict=True)}
        self.same, self.views = _shared_memory(nodes, self.values)
        self.left_out = frozenset[int]()
        self.stored: list[int] = []
        self.tensors: list[BoundaryTensor] = []
        for position in crossing:
            if position in self.views or position in self.same:
                continue
            two, three = (tensor_leaves(value) for value in self.values[position])
            found = [_describe(nodes[position], a, b) for a, b in zip(two, three, strict=True)]
            if found:
                self.stored.append(position)
                self.tensors += found
        if not self.tensors:
            raise SplitError("no tensor crosses the boundary, so there is nothing to cache")
        # the recipe lives as long as its suffix: that there is a tensor is all that it needs to know by now
        self.values = pytree.tree_map_only(Tensor, lambda tensor: tensor.new_empty(0), self.values)

    def suffix(self, graph: fx.Graph, model: nn.Module) -> fx.GraphModule:
        """Make the suffix from one trace of the model, in whatever modes its modules are in."""
        nodes = list(graph.nodes)
        if [signature(node) for node in nodes[: self.end]] != self.before:
            raise SplitError(
                f"in these modes the forward of {type(model).__name__} differs before the boundary; keep the modules "
                "around the boundary all in train mode or all in eval mode"
            )
        made = fx.Graph()
        rows = {i: made.placeholder(f"row_{i}") for i in range(len(self.tensors)) if i not in self.left_out}
        first = min(rows)
        batch = made.call_function(torch.Tensor.size, (rows[first], self.tensors[first].batch_dim))
        for i in sorted(self.left_out):
            rows[i] = made.call_function(absent, (rows[first], batch, *absent_arguments(self.tensors[i])))
        arriving = iter(rows[i] for i in range(len(self.tensors)))
        copies: dict[fx.Node, fx.Node] = {}
        for position, (at_two, at_three) in self.values.items():
            if position in self.same:
                copies[nodes[position]] = copies[nodes[self.same[position]]]
            elif position not in self.views:
                copies[nodes[position]] = _remake(made, at_two, at_three, batch, arriving)

        for node in nodes[self.end :]:
            # constants made of weights, and views of rows, are remade here from what they were made of
            copy_into(made, node, copies, "is used after the boundary in one mode only")
        if not batch.users:
            made.erase_node(batch)
        made.lint()
        return fx.GraphModule(model, made, "SuffixGraph")


def copy_into(made: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node], refusal: str) -> fx.Node:
    """Copy a node into another graph, and before it whatever it is made of that has no copy there yet.

    Raises:
        SplitError: It is made of an input that has none; the message ends in ``refusal``.
    """
    if node not in copies:
        if node.op == "placeholder":
            raise SplitError(f"fx: input {node.target!r} {refusal}")
        for parent in node.all_input_nodes:
            copy_into(made, parent, copies, refusal)
        copies[node] = made.node_copy(node, copies.__getitem__)
    return copies[node]


def tensor_leaves(value: Any) -> list[Tensor]:
    """The tensors in a value, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


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
    if isinstance(at_two, _CONSTANT) and at_two == at_three:
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
    pure = node.op in ("call_function", "call_method") and node.target in VIEWS
    return pure and bool(inputs) and all(_is_view_of(parent, base) for parent in inputs)


def signature(node: fx.Node) -> tuple[str, str, str, str]:
    """What a node does and to what, comparable between two traces of one model."""
    return node.op, str(node.target), str(node.args), str(node.kwargs)
