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
from dataclasses import dataclass, field
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
    optimizer.register_state_dict_post_hook(_unshared)
    return update


class _UnfitError(Exception):
    """What is off. Never leaves the module."""


class _Stack:
    """One parameter of all heads: its weights, their gradient, and the optimizer's state, of which heads have slices.

    Args:
        weights: (heads, *shape).
        own: Of each head.
    """

    def __init__(self, weights: Tensor, own: Sequence[nn.Parameter]) -> None:
        self.weights = nn.Parameter(weights)
        self.own = own
        self.before = torch.empty_like(weights)
        self._slices: tuple[Tensor, ...] = ()  # of the weights' gradient, one a head
        self.weights.register_post_accumulate_grad_hook(self._hand_out)  # type: ignore[no-untyped-call]
        self._shown: dict[str, Any] = {}  # the first head's state, as it was put there
        self._made: list[Any] = []  # what that is slices of

    def leaf(self) -> Tensor:
        """The weights for one forward, whose gradient is added to the heads' own."""
        self._gather()
        return self.weights

    def settle(self) -> None:
        """Before an update: the gradient is what the heads have, None where none has any."""
        given = [parameter.grad is not None and parameter.requires_grad for parameter in self.own]
        if any(given) and not all(given):
            raise UsageError(
                f"head {given.index(False)} is frozen or has no gradient, others have one: expected gradients of all "
                f"heads, for one update of all. Give it a learning rate of 0, or {_FIX}"
            )
        self._gather()

    @torch.no_grad()
    def _gather(self) -> None:
        """The weights' gradient is what the heads have, which may have put something in place of their slices."""
        if self._slices and all(p.grad is part for p, part in zip(self.own, self._slices, strict=True)):
            return
        self._slices, self.weights.grad = (), None
        if any(parameter.grad is not None for parameter in self.own):
            self.weights.grad = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in self.own])
            self._hand_out(self.weights)

    def _hand_out(self, weights: Tensor) -> None:
        """The heads' gradients are slices of the weights'."""
        assert weights.grad is not None
        self._slices = weights.grad.unbind(0)
        for parameter, part in zip(self.own, self._slices, strict=True):
            parameter.grad = part

    def take_state(self, of_heads: Mapping[Tensor, Any], joint: dict[Tensor, Any], whole: frozenset[str]) -> None:
        """What the heads' state has that was not put there: of a checkpoint, or of steps before ``attach``.

        ``whole`` are entries that no head has slices of.
        """
        first: dict[str, Any] = of_heads.get(self.own[0], {})
        if first is self._shown:
            # what no head has slices of may have been moved to another device
            joint[self.weights].update({key: first[key] for key in whole & first.keys()})
            return
        joint.pop(self.weights, None)
        states = [of_heads.get(parameter, {}) for parameter in self.own]
        for key in dict.fromkeys(key for state in states for key in state):
            values = [state.get(key) for state in states]
            if key not in whole and all(_like(value, self.own[0]) for value in values):
                joint[self.weights][key] = torch.stack(values)
            elif all(_same(value, values[0]) for value in values):
                joint[self.weights][key] = values[0]
            else:
                raise CheckpointError(
                    f"the optimizer's {key} is not the same for all heads: expected heads that have taken the same "
                    f"steps, for one update of all; {_FIX}"
                )

    def show_state(self, of_heads: dict[Tensor, Any], joint: Mapping[Tensor, Any]) -> None:
        """Make the heads' state slices of the joint one."""
        state = joint.get(self.weights, {})
        made = list(state.values())
        same = len(made) == len(self._made) and all(a is b for a, b in zip(made, self._made, strict=True))
        if same and of_heads.get(self.own[0]) is self._shown:
            return
        for head, parameter in enumerate(self.own):
            of_heads[parameter] = {
                key: value[head] if _like(value, self.weights) else value for key, value in state.items()
            }
        self._shown, self._made = of_heads[self.own[0]], made


@dataclass
class _Group:
    """Parameters whose heads are in the same groups of the optimizer.

    Attributes:
        stacks: Of the parameters.
        of_heads: The index of each head's group.
    """

    stacks: list[_Stack]
    of_heads: tuple[int, ...]
    _rates: list[float] = field(default_factory=list)
    _shares: list[Tensor] = field(default_factory=list)

    def shares(self, rates: list[Any]) -> tuple[Any, list[Tensor]]:
        """The largest learning rate, and each head's share of it: for every parameter, to be multiplied with it."""
        device = self.stacks[0].weights.device
        if any(isinstance(rate, Tensor) for rate in rates):  # a captured graph reads these very tensors
            each = torch.stack([torch.as_tensor(rate, device=device).reshape(()) for rate in rates])
            largest = each.max()
            return largest, self._shaped(each / largest.clamp(min=torch.finfo(each.dtype).tiny))
        largest = max(rates)
        if rates != self._rates or device.type != "cpu":  # no graph reads what is made anew for the next rates
            parts = torch.tensor([rate / (largest or 1.0) for rate in rates], dtype=torch.float64, device=device)
            self._rates, self._shares = rates, self._shaped(parts)
        return largest, self._shares

    def _shaped(self, parts: Tensor) -> list[Tensor]:
        weights = [stack.weights for stack in self.stacks]
        return [parts.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1)) for weight in weights]


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
        self._stacks = {name: _Stack(weights, own[name]) for name, weights in stacked.items()}
        self._whole: frozenset[str] = frozenset()  # entries of the state that no head has slices of
        self._settings = sorted(set(optimizer.defaults) - {"lr"})
        self._count = len(optimizer.param_groups)
        self._groups = self._grouped()
        self._state: defaultdict[Tensor, Any] = defaultdict(dict)

    def leaf(self, name: str) -> Tensor:
        """All heads' weights for one forward, whose gradient is added to the heads' own: (heads, *shape)."""
        return self._stacks[name].leaf()

    def _grouped(self) -> list[_Group]:
        """Joint groups, of parameters whose heads' groups are the same."""
        groups = self._optimizer.param_groups
        index = {id(parameter): i for i, group in enumerate(groups) for parameter in group["params"]}
        wanted = {id(parameter) for stack in self._stacks.values() for parameter in stack.own}
        if set(index) != wanted:
            raise UsageError(
                f"attach: expected the {len(wanted)} parameters of all heads in the optimizer and no other; it has "
                f"{len(wanted & set(index))} of them and {len(set(index) - wanted)} others. Make it of "
                "heads.parameters(head) of every head"
            )
        found: dict[tuple[int, ...], list[_Stack]] = {}
        for stack in self._stacks.values():
            found.setdefault(tuple(index[id(parameter)] for parameter in stack.own), []).append(stack)
        return [_Group(stacks, of_heads) for of_heads, stacks in found.items()]

    def try_out(self) -> None:
        """Find out on a few numbers whether an update of all is each head's own.

        Raises:
            UsageError: It is not, or groups differ in more than the rate.
        """
        kind = type(self._optimizer).__name__
        for members in self._members():
            try:
                with preserved_random_state():
                    self._whole |= _tried(self._optimizer, members[0], members[0]["params"][0].device)
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
        optimizer, groups = self._optimizer, []
        shares: list[tuple[_Stack, Tensor]] = []
        for group, members in zip(self._groups, self._members(), strict=True):
            largest, parts = group.shares([member["lr"] for member in members])
            groups.append({**members[0], "lr": largest, "params": [stack.weights for stack in group.stacks]})
            shares += zip(group.stacks, parts, strict=True)
        for stack, _ in shares:
            stack.settle()
            stack.take_state(optimizer.state, self._state, self._whole)
            stack.before.copy_(stack.weights)
        with self._in_place_of_heads(groups):
            self._original()
        for stack, share in shares:
            torch.lerp(stack.before, stack.weights, share, out=stack.weights)
            stack.show_state(optimizer.state, self._state)

    def unsliced(self) -> frozenset[str]:
        """Entries of the state that are not as large as their parameter."""
        pairs = [
            (stack.weights, *entry) for stack in self._stacks.values() for entry in self._state[stack.weights].items()
        ]
        return frozenset(key for weights, key, value in pairs if not _like(value, weights))

    @contextmanager
    def _in_place_of_heads(self, groups: list[dict[str, Any]]) -> Iterator[None]:
        optimizer = self._optimizer
        kept = optimizer.param_groups, optimizer.state
        try:
            optimizer.param_groups, optimizer.state = groups, self._state
            yield
        finally:
            optimizer.param_groups, optimizer.state = kept


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
        for one, other in zip(parts, found[name], strict=True):
            for key, value in alone.state[one].items():
                if isinstance(value, Tensor) and not torch.allclose(value, together.state[other][key]):
                    raise _UnfitError(f"{key} of its state follows the rate")
    return update.unsliced()


def _unshared(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Heads share what they have no slices of, such as the count of steps: elsewhere each would count it up."""
    saved["state"] = {
        parameter: {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
        for parameter, state in saved["state"].items()
    }


def _as(rate: Any, value: float) -> Any:
    return torch.full_like(rate, value) if isinstance(rate, Tensor) else value


def _like(value: Any, weights: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weights.shape


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
