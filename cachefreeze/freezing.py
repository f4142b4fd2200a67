"""Freeze and unfreeze: gradient flags, and an eval lock that survives ``model.train()``.

The lock is a forward pre-hook, so it is pickled and deep-copied with the model, ``model.train`` stays the
user's own, and ``torch.save(model)`` keeps it. Each lock remembers which of its module's parameters were frozen
here, so that ``unfreeze`` never thaws what the user froze by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torch import nn

from cachefreeze.blocks import Block, is_random, list_blocks
from cachefreeze.errors import FreezeError
from cachefreeze.tracing import Example, Usage, usage_of

Stochastic = Literal["eval", "train"]


class FrozenLock:
    """Forward pre-hook: keeps a module in eval mode and remembers what was frozen here.

    Attributes:
        parameters: Names of the module's own parameters that ``freeze`` froze.
        evaluate: Whether the module is held in eval mode; a half-frozen parent is not.
        train_from: On the model's own lock: the boundary that the last freeze asked for, by any module's name.
        stochastic: On the model's own lock: what the last freeze asked for.
    """

    def __init__(
        self,
        parameters: tuple[str, ...],
        *,
        evaluate: bool,
        train_from: str | None = None,
        stochastic: Stochastic = "eval",
    ) -> None:
        self.parameters = parameters
        self.evaluate = evaluate
        self.train_from = train_from
        self.stochastic = stochastic

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Put the module and all below it back to eval mode where ``train()`` undid it."""
        if self.evaluate and module.training:
            module.eval()


def freeze(
    model: nn.Module,
    train_from: str | None = None,
    *,
    train_last: int | None = None,
    modules: Sequence[str] | None = None,
    example_inputs: Any = None,
    stochastic: Stochastic = "eval",
) -> list[str]:
    """Freeze leading layers: no gradients, and eval mode whatever ``model.train()`` says.

    Freezing never thaws: flags that were set by hand stay. Frozen parameters get ``grad = None``.

    Args:
        model: Any module.
        train_from: The first module to train; every parameter first used before it is frozen.
        train_last: Train the last N blocks (see :func:`cachefreeze.blocks`) and freeze what runs before them.
        modules: Names or glob patterns of modules to freeze, e.g. ``["conv1", "layer*"]``.
        example_inputs: Real inputs, for models whose order of use cannot be read without.
        stochastic: What becomes of modules that draw (dropout, stochastic depth, attention that drops) before the
            boundary: ``eval`` rests them; with ``train`` they follow ``model.train()``, and rows are taken before the
            first of them, since no row can stand for a draw. Batch norms rest in either case.

    Returns:
        Names of the parameters that this call froze.

    Raises:
        FreezeError: A name matches nothing, or nothing would be left to train. The model is then as before.
    """
    if stochastic not in get_args(Stochastic):
        raise FreezeError(f"stochastic={stochastic!r}: use one of {', '.join(map(repr, get_args(Stochastic)))}")
    given = [n for n, v in (("train_from", train_from), ("train_last", train_last), ("modules", modules)) if v]
    if train_last is not None and train_last < 1:
        raise FreezeError(f"train_last={train_last}: expected a whole number of blocks, 1 or more")
    if len(given) != 1:
        raise FreezeError(f"freeze() got {given or 'nothing'}; give exactly one of train_from=, train_last=, modules=")
    usage = usage_of(model, None if example_inputs is None else Example.of(example_inputs))
    if modules is not None:
        names = {n for name in _match(model, modules, usage) for n in _parameter_names(model, name)}
    else:
        train_from = train_from if train_from is not None else _last_blocks(model, train_last or 1, usage)
        event = boundary_event(model, train_from, usage)
        names = {name for name, used in usage.parameters.items() if used < event}
    return _freeze_parameters(model, names, usage, train_from, stochastic)


def unfreeze(model: nn.Module, modules: Sequence[str] | None = None, *, example_inputs: Any = None) -> list[str]:
    """Undo :func:`freeze`: thaw what it froze and lift its locks.

    Args:
        model: The model that was frozen.
        modules: Names or glob patterns of the modules to thaw; all by default.
        example_inputs: As for :func:`freeze`.

    Returns:
        Names of the parameters that were thawed. What the user froze by hand stays frozen.

    Raises:
        FreezeError: A pattern matches no module.
    """
    names = frozen_here(model)
    usage = usage_of(model, None if example_inputs is None else Example.of(example_inputs))
    if modules is not None:
        names &= {n for name in _match(model, modules, usage) for n in _parameter_names(model, name)}
    return _thaw(model, names, usage)


def freeze_before(model: nn.Module, boundary: str | None, usage: Usage) -> None:
    """Freeze what is first used before ``boundary``, and thaw what :func:`freeze` froze from it on.

    Args:
        model: What a schedule drives; flags that were set by hand stay.
        boundary: Any module's name; None thaws all.
        usage: What its forward uses, in order.
    """
    event = 0 if boundary is None else boundary_event(model, boundary, usage)
    names = {name for name, used in usage.parameters.items() if used < event}
    if frozen_here(model) - names:
        _thaw(model, frozen_here(model), usage)
    if names:
        _freeze_parameters(model, names, usage, boundary, "eval")


def frozen_here(model: nn.Module) -> set[str]:
    """Names of the parameters that :func:`freeze` froze."""
    canonical = {id(p): name for name, p in model.named_parameters()}
    found = set()
    for module in model.modules():
        for lock in _locks(module):
            found |= {canonical[id(getattr(module, name))] for name in lock.parameters}
    return found


def is_locked(module: nn.Module) -> bool:
    """Whether a module is held in eval mode."""
    return any(lock.evaluate for lock in _locks(module))


def stochastic_of(model: nn.Module) -> Stochastic:
    """What the last freeze of a model asked for; ``eval`` where nothing is frozen."""
    return next((lock.stochastic for lock in _locks(model)), "eval")


def hooks_of(module: nn.Module) -> list[Any]:
    """The forward hooks of a module, but for our locks."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [hook for hook in hooks if not isinstance(hook, FrozenLock)]


def hold_eval(model: nn.Module) -> None:
    """Put every locked module back to eval mode now, without waiting for its next forward."""
    for module in model.modules():
        if module.training and is_locked(module):
            module.eval()


def boundary_event(model: nn.Module, name: str, usage: Usage) -> int:
    """The event at which module ``name`` is first used.

    Raises:
        FreezeError: No module of that name, or one that the forward never uses.
    """
    try:
        model.get_submodule(name)
    except AttributeError:
        raise FreezeError(
            f"train_from={name!r} names no module of {type(model).__name__}. {block_list(model, usage)} Pass one of "
            "these, or any module inside one"
        ) from None
    event = usage.start(model, name) if name else None
    if event is None:
        raise FreezeError(
            f"train_from={name!r}: the forward of {type(model).__name__} never uses this module, so nothing can be "
            f"trained from it. {block_list(model, usage)}"
        )
    return event


def boundary_of(model: nn.Module, usage: Usage) -> str | None:
    """Where rows are taken: None when nothing is frozen before.

    It is the boundary that the gradient flags imply, or after ``freeze(stochastic="train")`` the block of a module that
    draws before it, where that is not the boundary's own, else the module.

    Raises:
        FreezeError: Nothing is trainable.
    """
    boundary = _boundary_by_flags(model, usage)
    if boundary is None or stochastic_of(model) == "eval":
        return boundary
    before = runs_before(model, usage, boundary_event(model, boundary, usage))
    drawing = [name for name in before if is_random(model.get_submodule(name))]
    starts = {name: event for name in drawing if (event := usage.start(model, name)) is not None}
    if not starts:
        return boundary
    first = min(starts, key=lambda name: starts[name])
    listed = {block.name for block in list_blocks(model, usage)} - {boundary}
    places = [*(name for name in _paths_above(first) if name in listed), first]
    frozen_from = min(usage.parameters.values())
    return next((name for name in places if boundary_event(model, name, usage) > frozen_from), None)


def _boundary_by_flags(model: nn.Module, usage: Usage) -> str | None:
    """The boundary that the gradient flags imply: None when the first use of a parameter is trainable.

    It is the listed block that holds the first trainable parameter in order of use, or the module that
    ``freeze(train_from=)`` named, where that is the finer or coarser name of the same place. A trainable parameter
    outside every block (a class token) counts for the block that is used next.

    Raises:
        FreezeError: Nothing is trainable.
    """
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    used = sorted((event, name) for name, event in usage.parameters.items() if name in trainable)
    if not used:
        raise FreezeError(
            f"nothing of {type(model).__name__} that its forward uses is trainable, so there is no boundary to train "
            f"from. {block_list(model, usage)} Unfreeze one: cf.unfreeze(model)"
        )
    event, parameter = used[0]
    block = _block_holding(model, usage, parameter, event)
    start = min(event, boundary_event(model, block, usage))
    if not any(e < start for e in usage.parameters.values()):
        finer = _finer_boundary(model, usage, parameter, event)
        if finer is None:
            return None
        block = finer
    asked = next((lock.train_from for lock in _locks(model) if lock.train_from), None)
    asked_event = usage.start(model, asked) if asked else None
    if asked is None or asked_event is None or asked_event > event:
        return block
    block_event = boundary_event(model, block, usage)
    unused_between = not any(asked_event <= e < event for e in usage.parameters.values())
    return asked if asked_event >= block_event or unused_between else block


def block_list(model: nn.Module, usage: Usage) -> str:
    """The sentence that lists the blocks in order of execution."""
    names = [block.name for block in list_blocks(model, usage)]
    shown = names if len(names) <= 40 else [*names[:20], "…", *names[-20:]]
    return f"Blocks, in order: {', '.join(shown)}."


def _freeze_parameters(
    model: nn.Module, names: set[str], usage: Usage, train_from: str | None, stochastic: Stochastic
) -> list[str]:
    parameters = dict(model.named_parameters())
    if not any(p.requires_grad and n not in names and n in usage.parameters for n, p in parameters.items()):
        tied = _tied_to(model, names)
        why = f" ({tied} is tied to a frozen parameter)" if tied else ""
        raise FreezeError(
            f"this freeze leaves nothing of {type(model).__name__} to train{why}. {block_list(model, usage)} "
            "Train from an earlier one"
        )
    newly = [name for name in parameters if name in names and parameters[name].requires_grad]
    for name in names:
        parameters[name].requires_grad_(False)
        parameters[name].grad = None
    # what the user froze by hand is locked as well, but is not ours to thaw
    _relock(model, frozen_here(model) | set(newly), usage, train_from, stochastic, held=names)
    return newly


def _thaw(model: nn.Module, names: set[str], usage: Usage) -> list[str]:
    parameters = dict(model.named_parameters())
    kept = frozen_here(model) - names
    for name in names:
        parameters[name].requires_grad_(True)
    _relock(model, kept, usage, None, stochastic_of(model), held=None)
    return [name for name in parameters if name in names]


def _relock(
    model: nn.Module,
    frozen: set[str],
    usage: Usage,
    train_from: str | None,
    stochastic: Stochastic,
    *,
    held: set[str] | None,
) -> None:
    """Lock what runs before the boundary and what was frozen by name, but for what is to draw.

    ``frozen`` names the parameters that were frozen here; ``held`` those that a freeze asked for, whoever froze
    them. Without ``held``, every other lock of ours is lifted.
    """
    still = frozen | (held or set())
    events = [boundary_event(model, train_from, usage)] if train_from and still else []
    boundary = _boundary_by_flags(model, usage) if still else None
    events += [boundary_event(model, boundary, usage)] if boundary else []
    locked = set(runs_before(model, usage, max(events))) if events else set()
    canonical = {id(p): name for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        holds = [canonical[id(p)] for p in module.parameters()]
        own = tuple(n for n, p in module.named_parameters(recurse=False) if canonical[id(p)] in frozen)
        had = _unlock(module)
        evaluate = name in locked or (bool(holds) and all(n in still for n in holds)) or (had and held is not None)
        evaluate = evaluate and not (stochastic == "train" and any(map(is_random, module.modules())))
        if own or evaluate or (not name and still):
            asked = train_from if not name else None
            lock = FrozenLock(own, evaluate=evaluate, train_from=asked, stochastic=stochastic)
            module.register_forward_pre_hook(lock, prepend=True)
        if evaluate:
            module.eval()
        elif had and not any(is_locked(parent) for parent in _ancestors(model, name)):
            module.train(model.training)  # with what it holds: its lock put that to eval mode too


def runs_before(model: nn.Module, usage: Usage, event: int) -> Iterable[str]:
    """Modules whose first call ends before ``event``, and everything inside them."""
    first: dict[str, int] = {}
    for call in usage.calls:
        first.setdefault(call.name, call.end)
    early = {name for name, end in first.items() if end <= event}
    return [
        name
        for name, _ in model.named_modules(remove_duplicate=False)
        if name in early or (name not in first and any(parent in early for parent in _paths_above(name)))
    ]


def _locks(module: nn.Module) -> list[FrozenLock]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, FrozenLock)]


def _unlock(module: nn.Module) -> bool:
    """Remove our locks from one module; whether it was held in eval mode."""
    held = is_locked(module)
    for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, FrozenLock)]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    return held


def _block_holding(model: nn.Module, usage: Usage, parameter: str, event: int) -> str:
    """The listed block that holds ``parameter``, else the block that is used next after ``event``.

    A list of parameters that is never called is no place to cut at: what uses it is.
    """
    listed = list_blocks(model, usage)
    listed = [block for block in listed if usage.first_call_of(model, block.name) is not None] or listed
    wanted = model.get_parameter(parameter)
    for block in listed:
        if any(p is wanted for member in block.members for p in model.get_submodule(member).parameters()):
            return block.name
    later = [block.name for block in listed if boundary_event(model, block.name, usage) >= event]
    return later[0] if later else listed[-1].name


def _finer_boundary(model: nn.Module, usage: Usage, parameter: str, event: int) -> str | None:
    """The outermost module around ``parameter`` before which something is frozen: the first block may train in part."""
    for name in _paths_above(parameter):
        if usage.first_call_of(model, name) is not None:
            start = min(event, boundary_event(model, name, usage))
            if any(e < start for e in usage.parameters.values()):
                return name
    return None


def _match(model: nn.Module, patterns: Sequence[str], usage: Usage) -> list[str]:
    if isinstance(patterns, str):
        raise FreezeError(f'modules={patterns!r} is a string; pass a list of names or patterns: modules=["{patterns}"]')
    names = [name for name, _ in model.named_modules() if name]
    matched: list[str] = []
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise FreezeError(
                f"modules={pattern!r} matches no module of {type(model).__name__}. {block_list(model, usage)}"
            )
        matched += found
    return matched


def _last_blocks(model: nn.Module, count: int, usage: Usage) -> str:
    listed: list[Block] = list_blocks(model, usage)
    if count > len(listed):
        raise FreezeError(
            f"train_last={count}, but {type(model).__name__} has {len(listed)} blocks. {block_list(model, usage)}"
        )
    return listed[-count].name


def _parameter_names(model: nn.Module, name: str) -> list[str]:
    canonical = {id(p): n for n, p in model.named_parameters()}
    return [canonical[id(p)] for p in model.get_submodule(name).parameters()]


def _tied_to(model: nn.Module, names: set[str]) -> str | None:
    """A second name of a parameter in ``names``: a tied weight that the freeze takes along."""
    parameters = dict(model.named_parameters())
    ids = {id(parameters[name]) for name in names}
    return next((n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in ids and n not in names), None)


def _paths_above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    return [model.get_submodule(path) for path in _paths_above(name)]
