"""One update of all heads' weights, each head with a learning rate of its own.

A group of an optimizer for every head takes as long as a step of its own. All heads' weights lie in one tensor, whose
update takes little longer than one head's: it is made with the largest of the rates, and each head then goes its share
of the way. The optimizer would have done the same wherever its update is in proportion to the rate and treats every
number on its own, which is tried on a few numbers first.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cachefreeze.errors import CheckpointError, UsageError
from cachefreeze.isolation import preserved_random_state

# Of steps in double precision, with rates whose shares are exact: what is not so in arithmetic is off by more.
_TOLERANCE = 1e-9
_RATES = (0.5, 0.125, 2.0**-8)
_STEPS = 4

_FIX = "leave heads.attach out, and every group has an update of its own"


def attach(
    optimizer: Optimizer, stacked: Mapping[str, Tensor], own: Mapping[str, Sequence[nn.Parameter]]
) -> JointUpdate:
    """Let ``optimizer.step`` be one update of ``stacked``, with the rates of the groups of ``own``.

    Groups, state and checkpoints stay those of the heads' own parameters.

    Shapes:
        stacked[name]: (heads, *shape), of which own[name][head]: (*shape) is a slice.

    Raises:
        UsageError: Its groups are not those of the heads, differ in more than the rate, or its update is not in
            proportion to the rate for every number on its own.
    """
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise UsageError(f"attach({type(optimizer).__name__}): expected an optimizer of torch.optim other than LBFGS")
    update = JointUpdate(optimizer, stacked, own)
    update.try_out()

    # a scheduler counts steps by wrapping this method, or has done so
    @functools.wraps(optimizer.step)
    def step(_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        return update.step(closure)

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    return update


class _UnfitError(Exception):
    """What is off. Never leaves the module."""


@dataclass(frozen=True)
class _Group:
    """Parameters whose heads are in the same groups of the optimizer.

    Attributes:
        names: Of the parameters.
        of_heads: The index of each head's group.
    """

    names: list[str]
    of_heads: tuple[int, ...]


class JointUpdate:
    """``optimizer.step`` for all heads. ``attach`` makes it."""

    def __init__(
        self,
        optimizer: Optimizer,
        stacked: Mapping[str, Tensor],
        own: Mapping[str, Sequence[nn.Parameter]],
    ) -> None:
        self._optimizer = optimizer
        self._original = optimizer.step
        self._own = own
        self._weights = {name: nn.Parameter(weight, requires_grad=False) for name, weight in stacked.items()}
        self._before = {name: torch.empty_like(weight) for name, weight in stacked.items()}
        self._counters: frozenset[str] = frozenset()  # entries of the state that no parameter has slices of
        self._settings = sorted(set(optimizer.defaults) - {"lr"})
        self._count = len(optimizer.param_groups)
        self._groups = self._grouped()
        self._state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        self._shown: dict[str, dict[str, Any]] = {}  # of the first head, as it was put there
        self._made: dict[str, list[Any]] = {}  # of which the heads have slices
        self._handed: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def _grouped(self) -> list[_Group]:
        """Joint groups, of parameters whose heads' groups are the same."""
        groups = self._optimizer.param_groups
        index = {id(parameter): i for i, group in enumerate(groups) for parameter in group["params"]}
        wanted = {id(parameter) for own in self._own.values() for parameter in own}
        if set(index) != wanted:
            raise UsageError(
                f"attach: expected the {len(wanted)} parameters of all heads in the optimizer and no other; it has "
                f"{len(wanted & set(index))} of them and {len(set(index) - wanted)} others. Make it of "
                "heads.parameters(head) of every head"
            )
        found: dict[tuple[int, ...], list[str]] = {}
        for name, own in self._own.items():
            found.setdefault(tuple(index[id(parameter)] for parameter in own), []).append(name)
        return [_Group(names, of_heads) for of_heads, names in found.items()]

    def try_out(self) -> None:
        """Find out on a few numbers whether an update of all is each head's own.

        Raises:
            UsageError: It is not, or groups differ in more than the rate.
        """
        kind = type(self._optimizer).__name__
        for members in self._members():
            try:
                with preserved_random_state():
                    self._counters |= _tried(self._optimizer, members[0], members[0]["params"][0].device)
            except _UnfitError as error:
                raise UsageError(
                    f"attach({kind}): expected an update in proportion to the learning rate, for every number on its "
                    f"own; tried on a few numbers, {error}; {_FIX}"
                ) from None
            except Exception as error:
                raise UsageError(
                    f"attach({kind}): it could not be tried, {type(error).__name__}: {error}; {_FIX}"
                ) from error

    def _members(self) -> list[list[dict[str, Any]]]:
        """For each joint group the optimizer's own, by head, which may differ in the rate alone."""
        groups = self._optimizer.param_groups
        if len(groups) != self._count:
            raise UsageError(f"the optimizer has {len(groups)} groups, and {self._count} when it was attached: {_FIX}")
        members = [[groups[i] for i in group.of_heads] for group in self._groups]
        settings = itemgetter(*self._settings)
        for heads in members:
            first = settings(heads[0])
            other = next((head for head, group in enumerate(heads) if settings(group) != first), None)
            if other is not None:
                key = next(key for key in self._settings if heads[other][key] != heads[0][key])
                raise UsageError(
                    f"heads 0 and {other} have {key}={heads[0][key]} and {heads[other][key]}: expected groups that "
                    f"differ in lr alone, for one update of all heads; {_FIX}"
                )
        return members

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As the optimizer's own, of all heads at once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._update()
        return loss

    def _update(self) -> None:
        groups, shares = [], {}
        for group, members in zip(self._groups, self._members(), strict=True):
            largest, each = _largest([member["lr"] for member in members], self._weights[group.names[0]].device)
            groups.append({**members[0], "lr": largest, "params": [self._weights[name] for name in group.names]})
            shares.update(dict.fromkeys(group.names, each))
        for name, weight in self._weights.items():
            weight.grad = self._gradient(name)
            self._before[name].copy_(weight)
            self._take_state(name)
        with self._in_place_of_heads(groups):
            self._original()
        for name, weight in self._weights.items():
            share = shares[name].to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
            torch.lerp(self._before[name], weight, share, out=weight)
            weight.grad = None
            self._show_state(name)

    def leaf(self, name: str) -> Tensor:
        """All heads' weights for one forward, whose gradient goes to the heads' own parameters: slices of it."""
        leaf = self._weights[name].detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(functools.partial(self._hand_out, name))
        return leaf

    def _hand_out(self, name: str, leaf: Tensor) -> None:
        assert leaf.grad is not None
        whole, leaf.grad = leaf.grad, None
        if self._whole(name) is not None:
            self._handed[name][0].add_(whole)
            return
        parts = whole.unbind(0)
        self._handed[name] = whole, parts
        for parameter, part in zip(self._own[name], parts, strict=True):
            if parameter.requires_grad:
                parameter.grad = part if parameter.grad is None else parameter.grad + part

    def _whole(self, name: str) -> Tensor | None:
        """The gradient that was handed out, where every head still has its slice of it."""
        whole, parts = self._handed.get(name, (None, ()))
        intact = all(p.grad is part for p, part in zip(self._own[name], parts, strict=False))
        return whole if intact else None

    def _gradient(self, name: str) -> Tensor:
        whole = self._whole(name)
        if whole is not None:
            return whole
        parts = [parameter.grad for parameter in self._own[name]]
        if any(part is None for part in parts):
            head = parts.index(None)
            raise UsageError(
                f"head {head} has no gradient for {name}, as it has where backward() was not called or it is frozen: "
                f"one update is for all heads. Give it a learning rate of 0, or {_FIX}"
            )
        return torch.stack(parts)  # type: ignore[arg-type]

    def _take_state(self, name: str) -> None:
        """What the heads' state has that this did not put there: of a checkpoint, or of steps before ``attach``."""
        weight, own = self._weights[name], self._own[name]
        states = [self._optimizer.state.get(parameter, {}) for parameter in own]
        if states[0] is self._shown.get(name):
            # what has no slices may have been moved to another device
            self._state[weight].update({key: v for key, v in states[0].items() if not self._sliced(key, v, own[0])})
            return
        self._state.pop(weight, None)
        for key in dict.fromkeys(key for state in states for key in state):
            values = [state.get(key) for state in states]
            if all(self._sliced(key, value, own[0]) for value in values):
                self._state[weight][key] = torch.stack(values)  # type: ignore[arg-type]
            elif all(_same(value, values[0]) for value in values):
                self._state[weight][key] = values[0]
            else:
                raise CheckpointError(
                    f"the optimizer's {key} for {name} is not the same for all heads: expected heads that have taken "
                    f"the same steps, for one update of all; {_FIX}"
                )

    def _show_state(self, name: str) -> None:
        """The heads' own state: slices of the joint one."""
        weight = self._weights[name]
        state = self._state.get(weight, {})
        made = list(state.values())
        known = self._made.get(name, [None])
        if len(made) == len(known) and all(a is b for a, b in zip(made, known, strict=True)):
            return
        self._made[name] = made
        for head, parameter in enumerate(self._own[name]):
            self._optimizer.state[parameter] = {
                key: value[head] if self._sliced(key, value, weight) else value for key, value in state.items()
            }
        self._shown[name] = self._optimizer.state[self._own[name][0]]

    def unsliced(self, name: str) -> frozenset[str]:
        """Entries of a parameter's state that are not as large as the parameter."""
        weight = self._weights[name]
        return frozenset(key for key, value in self._state[weight].items() if not self._sliced(key, value, weight))

    def _sliced(self, key: str, value: Any, like: Tensor) -> bool:
        return isinstance(value, Tensor) and value.shape == like.shape and key not in self._counters

    @contextmanager
    def _in_place_of_heads(self, groups: list[dict[str, Any]]) -> Iterator[None]:
        optimizer = self._optimizer
        kept = optimizer.param_groups, optimizer.state
        try:
            optimizer.param_groups, optimizer.state = groups, self._state
            yield
        finally:
            optimizer.param_groups, optimizer.state = kept


def _largest(rates: list[Any], device: torch.device) -> tuple[Any, Tensor]:
    """The largest learning rate, and each head's share of it: (heads,)."""
    if any(isinstance(rate, Tensor) for rate in rates):
        each = torch.stack([torch.as_tensor(rate, device=device).reshape(()) for rate in rates])
        largest = each.max()
        return largest, each / largest.clamp(min=torch.finfo(each.dtype).tiny)
    largest = max(rates)
    return largest, torch.tensor([rate / (largest or 1.0) for rate in rates], dtype=torch.float64, device=device)


def _tried(optimizer: Optimizer, settings: Mapping[str, Any], device: torch.device) -> frozenset[str]:
    """Try on a few numbers that one update is each head's own; what of the state has no slices.

    Raises:
        UsageError: It is not.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (4, 3), "bias": (4,)}

    def drawn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(len(_RATES), *shape, generator=generator, dtype=torch.float64).to(device)

    stacked = {name: drawn(shape) for name, shape in shapes.items()}
    ways = []
    for weights in ({name: weight.clone() for name, weight in stacked.items()}, stacked):
        own = {name: [nn.Parameter(part) for part in weight] for name, weight in weights.items()}
        tried = copy.copy(optimizer)  # which leaves its hooks and what a scheduler did to it
        tried.state = defaultdict(dict)
        tried.param_groups = [
            {**settings, "lr": _as(settings["lr"], rate), "params": [parts[head] for parts in own.values()]}
            for head, rate in enumerate(_RATES)
        ]
        ways.append((tried, own))
    (alone, wanted), (together, found) = ways
    update = JointUpdate(together, stacked, found)
    for _ in range(_STEPS):
        for name, shape in shapes.items():
            for one, other, gradient in zip(wanted[name], found[name], drawn(shape), strict=True):
                one.grad, other.grad = gradient, gradient.clone()
        alone.step()
        update.step()
    for name, parts in wanted.items():
        off = float((torch.stack(list(parts)).detach() - stacked[name]).abs().max())
        if not off <= _TOLERANCE:
            raise _UnfitError(f"one update of all heads is off by {off:.2g} from updates of each")
    return update.unsliced("weight")


def _as(rate: Any, value: float) -> Any:
    return torch.full_like(rate, value) if isinstance(rate, Tensor) else value


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
