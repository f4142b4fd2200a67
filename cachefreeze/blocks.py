"""The blocks of a model, in the order in which a forward uses them: the places where a boundary can be.

Containers open into their children, a norm or activation belongs to the layer before it, and a final
classifier Sequential stays whole. Anything else that holds weights is one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from cachefreeze.isolation import eval_mode, plain_attention, preserved_random_state
from cachefreeze.tracing import Example, Tracer, Usage, usage_of

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        name: Its module name.
        parameters: Number of parameters that it and the norms that belong to it hold.
        bytes_per_sample: Bytes that cross its front edge for one sample; None without example inputs, or where
            the model cannot be traced.
        forward_before: Share of the forward's FLOPs spent before it, 0 to 1; None without example inputs.
        members: Names of the modules that belong to it; the first is the block itself.
    """

    name: str
    parameters: int
    bytes_per_sample: int | None
    forward_before: float | None
    members: tuple[str, ...]


def blocks(model: nn.Module, example_inputs: Any = None) -> list[Block]:
    """List the blocks of ``model`` in order of first use in a forward.

    Args:
        model: Any module. Modes, weights and random states are as before afterwards.
        example_inputs: A tensor, a tuple (positional) or a dict (keyword) with a batch of at least 2. Without
            them the order is read from a symbolic trace, else from registration, with a warning.

    Returns:
        The blocks; bytes and share of the forward only with ``example_inputs``.
    """
    if example_inputs is None:
        return list_blocks(model, usage_of(model))
    example = Example.of(example_inputs)
    listed = list_blocks(model, usage_of(model, example))
    shares = _forward_before(model, example, listed)
    crossing = _crossing_bytes(model, example, listed)
    return [
        Block(block.name, block.parameters, crossing.get(block.name), shares.get(block.name), block.members)
        for block in listed
    ]


def list_blocks(model: nn.Module, usage: Usage) -> list[Block]:
    """The blocks by name and parameters alone, in the order that ``usage`` recorded."""
    final = _final_classifier(model, usage)
    leaves = [name for name in _opened(model, "", final) if name]
    started = {name: start for name in leaves if (start := usage.start(model, name)) is not None}
    modules = dict(model.named_modules(remove_duplicate=False))
    members: list[list[str]] = []
    for name in sorted(started, key=started.__getitem__):
        if next(modules[name].parameters(), None) is None:
            continue
        if is_norm(modules[name]) and members:
            members[-1].append(name)
        else:
            members.append([name])
    return [
        Block(
            names[0],
            sum(p.numel() for p in {id(p): p for n in names for p in modules[n].parameters()}.values()),
            None,
            None,
            tuple(names),
        )
        for names in members
    ]


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: it has no weights worth a boundary of its own."""
    return "Norm" in type(module).__name__ and not any(True for _ in module.children())


def is_stochastic(module: nn.Module) -> bool:
    """Whether train mode changes what a module computes: batch statistics, dropout, stochastic depth."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0
    kind = type(module).__name__
    rate = getattr(module, "p", getattr(module, "drop_prob", None))
    return ("Drop" in kind or "StochasticDepth" in kind) and bool(rate)


def _opened(model: nn.Module, name: str, final: str | None) -> list[str]:
    """Names of the blocks and loose modules under ``name``, in registration order."""
    module = model.get_submodule(name)
    if name and (name == final or not _opens(module)):
        return [name]
    dot = f"{name}." if name else ""
    return [leaf for child, _ in module.named_children() for leaf in _opened(model, f"{dot}{child}", final)]


def _weight_layers(module: nn.Module) -> int:
    """Leaf modules with weights that are no norms."""
    return sum(1 for m in module.modules() if next(m.parameters(recurse=False), None) is not None and not is_norm(m))


def _opens(module: nn.Module) -> bool:
    """Whether a module is a container to look into rather than one block."""
    if isinstance(module, CONTAINERS):
        # conv + norm + activation is one layer, whatever its class; two layers are two blocks
        return _weight_layers(module) > 1
    weights = sum(p.numel() for p in module.parameters())
    stacked = sum(sum(p.numel() for p in child.parameters()) for child in module.children() if _is_stack(child))
    return 2 * stacked > weights


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is a stack of repeated blocks, or holds mostly such stacks (the body of a ViT or a BERT)."""
    if not isinstance(module, CONTAINERS):
        return _opens(module)
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    if not children:
        return False
    if all(isinstance(child, nn.Sequential) for child in children) and len(children) > 1:
        return all(_is_stack(child) for child in children)
    alike = len({type(child) for child in children}) == 1
    return alike and not isinstance(children[0], CONTAINERS) and all(_weight_layers(child) > 1 for child in children)


def _final_classifier(model: nn.Module, usage: Usage) -> str | None:
    """The Sequential that runs last among the root's children, when it is plain layers and not all there is."""
    started: dict[str, int] = {}
    for name, child in model.named_children():
        start = usage.start(model, name)
        if start is not None and next(child.parameters(), None) is not None:
            started[name] = start
    if len(started) < 2:
        return None
    last = max(started, key=started.__getitem__)
    module = model.get_submodule(last)
    plain = isinstance(module, nn.Sequential) and all(_weight_layers(child) <= 1 for child in module.children())
    return last if plain else None


def _forward_before(model: nn.Module, example: Example, listed: list[Block]) -> dict[str, float]:
    """Share of the FLOPs that a forward has spent when each block is first entered."""
    spent: dict[str, int] = {}
    counter = FlopCounterMode(display=False)

    def note(name: str, *_: Any) -> None:
        spent.setdefault(name, counter.get_total_flops())

    handles = [model.get_submodule(b.name).register_forward_pre_hook(partial(note, b.name)) for b in listed]
    try:
        with preserved_random_state(), eval_mode(model), torch.no_grad(), plain_attention(), counter:
            example.fresh().call(model)
    finally:
        for handle in handles:
            handle.remove()
    total = counter.get_total_flops()
    return {name: flops / total for name, flops in spent.items()} if total else {}


def _crossing_bytes(model: nn.Module, example: Example, listed: list[Block]) -> dict[str, int]:
    """Bytes per sample of the values that are made before a block and used from it on."""
    names = {block.name for block in listed}
    within = {name for block in names for name in _parents(block)}

    def is_leaf(module: nn.Module, name: str) -> bool:
        return name not in within

    try:
        with eval_mode(model), preserved_random_state(), torch.no_grad():
            graph = Tracer(is_leaf, example).trace(model)
            sizes = _Sizes(fx.GraphModule(model, graph), example.batch)
            own = example.fresh()
            sizes.run(*own.args, *own.kwargs.values())
    except Exception:  # untraceable models have no such figure yet; the attribute says None
        return {}
    nodes = list(graph.nodes)
    last_use = {node: max((nodes.index(user) for user in node.users), default=-1) for node in nodes}
    result: dict[str, int] = {}
    for position, node in enumerate(nodes):
        if node.op == "call_module" and node.target in names and node.target not in result:
            result[str(node.target)] = sum(
                sizes.bytes.get(other, 0) for other in nodes[:position] if last_use[other] >= position
            )
    return result


class _Sizes(fx.Interpreter):
    """Run a graph and note the bytes per sample of every node's value."""

    def __init__(self, module: fx.GraphModule, batch: int) -> None:
        super().__init__(module)
        self.batch = batch
        self.bytes: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "get_attr":
            tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
            self.bytes[n] = sum(t.numel() * t.element_size() for t in tensors) // self.batch
        return value


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return ["", *(".".join(parts[:i]) for i in range(1, len(parts)))]
