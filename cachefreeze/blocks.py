"""The blocks of a model, in the order in which a forward uses them: the places where a boundary can be.

Containers open into their children, a norm or activation belongs to the layer before it, and a final
classifier Sequential stays whole. Anything else that holds weights is one block.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cachefreeze.tracing import Usage

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        name: Its module name.
        parameters: Number of parameters that it and the norms that belong to it hold.
        bytes_per_sample: Bytes that cross its front edge for one sample; None without example inputs, or where
            no rows can hold what crosses.
        forward_before: Share of the forward's FLOPs spent before it, 0 to 1; None without example inputs.
        members: Names of the modules that belong to it; the first is the block itself.
    """

    name: str
    parameters: int
    bytes_per_sample: int | None
    forward_before: float | None
    members: tuple[str, ...]


def list_blocks(model: nn.Module, usage: Usage) -> list[Block]:
    """The blocks by name and parameters alone, in the order that ``usage`` recorded."""
    final = _final_classifier(model, usage)
    elsewhere = _called_parameters(model, usage)
    leaves = [
        name
        for name in _opened(model, "", final)
        if name and (usage.first_call_of(model, name) or not _owned(model, name) <= elsewhere)
    ]
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


def _called_parameters(model: nn.Module, usage: Usage) -> set[int]:
    """Ids of the parameters of modules that a forward calls."""
    modules = {id(m): m for name, m in model.named_modules() if name and usage.first_call(name) is not None}
    return {id(p) for m in modules.values() for p in m.parameters(recurse=False)}


def _owned(model: nn.Module, name: str) -> set[int]:
    return {id(p) for p in model.get_submodule(name).parameters()}


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: it has no weights worth a boundary of its own."""
    return "Norm" in type(module).__name__ and not any(True for _ in module.children())


def is_stochastic(module: nn.Module) -> bool:
    """Whether train mode changes what a module computes: batch statistics, dropout, stochastic depth."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    return is_random(module)


def is_random(module: nn.Module) -> bool:
    """Whether a module draws in train mode: dropout, stochastic depth, attention and recurrences that drop."""
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
    # a vocabulary may hold more weights than all layers of a small language model, and is no layer
    looked_up = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    weights = sum(p.numel() for p in module.parameters() if id(p) not in looked_up)
    stacked = sum(sum(p.numel() for p in child.parameters()) for child in module.children() if _is_stack(child))
    return 2 * stacked > weights


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is a stack of repeated blocks, or holds mostly such stacks (the body of a ViT or a BERT)."""
    if not isinstance(module, CONTAINERS):
        return _opens(module)
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    if not children:
        return False
    if all(isinstance(child, CONTAINERS) for child in children) and len(children) > 1:
        return all(_is_stack(child) for child in children)
    if isinstance(module, nn.ModuleList) and len(children) > 1 and all(_opens(child) for child in children):
        return True  # stages of different kinds
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
