"""The suffix of a replay: the model's own forward on rows, with stubs in place of what is frozen."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachefreeze import trees
from cachefreeze.errors import SplitError, StaleCacheError
from cachefreeze.fingerprint import attributes_of
from cachefreeze.splitting.boundary import Site, Uncopied
from cachefreeze.splitting.planner import Plan
from cachefreeze.splitting.replay_inputs import Inputs, Pass, Poison, poisoned
from cachefreeze.splitting.replica import Rewrite, replicate
from cachefreeze.splitting.values import ClosedCall, Place
from cachefreeze.tracing import Example

# Under which calls of the boundary are counted, beside those of its module's stub: no module has this name.
_BOUNDARY = "\0boundary"


class ReplaySuffix(Uncopied, nn.Module):
    """Rows -> the model's output, by its own forward. It has no mode of its own: it follows the model's modules."""

    def __init__(
        self, site: Site, planned: Plan, example: Example, around: Mapping[str, Rewrite] | None = None
    ) -> None:
        super().__init__()
        self.plan = planned
        self._places = {place: i for i, place in enumerate(planned.kept)}
        self._pass: Pass | None = None
        self._has_gradients: bool | None = None  # at the boundary, in the verification's training step
        # the backward that runs, and the passes whose outputs it has come to
        self._backward: tuple[int, list[weakref.ref[Pass]]] = (-1, [])
        self._bad_values: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._inputs = Inputs(site, planned, example)
        names = {name for name, _ in planned.closed.keys() | planned.constant}
        self._called = Counter(name for name, _ in planned.closed)
        forwards: dict[str, Rewrite] = {name: self._stub(name) for name in names}
        arguments = {place[3]: i for place, i in self._places.items() if place[0] == "argument"}
        if site.first_call is not None:
            known = site.known_as
            self._called[_BOUNDARY] = sum(call.name == known for call in site.usage.calls)
            forwards[known] = self._boundary(arguments, forwards.get(known))
        for name, rewrite in (around or {}).items():
            forwards[name] = _around(rewrite, forwards.get(name))
        self.replica, self._copied = replicate(site.model, forwards)
        # modules whose forward runs here follow the model's attributes, in both directions
        running = names - {name for name, number in planned.closed if (name, number) not in planned.again}
        stubs = {id(site.model.get_submodule(name)) for name in names - running}
        for made, original in self._copied:
            if id(original) in stubs:
                made.training = False
        self._open = [(m, o, m._modules, vars(m).get("forward")) for m, o in self._copied if id(o) not in stubs]
        # a compiled forward follows those of Python's own plain types, which it guards by value
        self._traced = [
            (m, o, [n for n, v in attributes_of(o).items() if isinstance(v, bool | int | float | str | None)])
            for m, o, _, _ in self._open
        ]
        self._children = [
            (original, dict(original._modules), type(original), vars(original).get("forward"))
            for _, original in self._copied
        ]
        self.drops_generation_caches = False

    def train(self, mode: bool = True) -> ReplaySuffix:
        """Set the mode of the model, which is the only mode there is."""
        self._copied[-1][1].train(mode)
        return self

    def follow(self) -> None:
        """Raise if a module was replaced behind the suffix."""
        for original, children, kind, forward in self._children:
            if type(original) is not kind or vars(original).get("forward") is not forward:
                raise StaleCacheError(
                    f"the forward of {kind.__name__} was replaced after the loader was made, so what trains is not "
                    "what the model does; replace it first, then make the Engine"
                )
            for key, child in original._modules.items():
                if children.get(key) is not child:
                    raise StaleCacheError(
                        f"{key!r} of {type(original).__name__} was replaced after the loader was made, so what trains "
                        "is not what the model holds; replace modules first, then make the Engine"
                    )

    def forward(self, *rows: Any) -> Any:
        """Run the trainable part on a fresh batch of rows, which it may write into.

        Args:
            rows: One tensor per boundary tensor, and after them what is given with the batch: a detector's lists.
        """
        count = len(self.plan.tensors)
        return self.run(list(rows[:count]), given=rows[count:])

    def _nan(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, writable: bool) -> Tensor:
        """A value that shows where it is used: NaN, else the smallest integer; one element, seen as many."""
        if writable:
            return torch.full(shape, _bad(dtype), dtype=dtype, device=device)
        one = self._bad_values.get((dtype, device))
        if one is None:
            one = self._bad_values[dtype, device] = torch.full((), _bad(dtype), dtype=dtype, device=device)
        return one.expand(shape)

    def answer(self, value: int | None) -> None:
        """Let masks that are not kept, but asked for a truth value, be all ``value``; None: as in the example."""
        self._inputs.answer = value

    def run(
        self,
        rows: list[Tensor],
        poison: Poison | None = None,
        see_inputs: Callable[[Any], None] | None = None,
        given: Sequence[Any] = (),
    ) -> Any:
        """The model's forward on rows, with a poison in place of what is not kept.

        Args:
            rows: One tensor per boundary tensor, which the forward may write into.
            poison: Makes what stands for a value that is not kept; NaN by default.
            see_inputs: Called with the model's arguments before the forward.
            given: A detector's lists, alone in this sequence.
        """
        spec = self.plan.tensors[0]
        batch = rows[0].shape[spec.batch_dim]
        rows = [tensor.fold(row) for tensor, row in zip(self.plan.tensors, rows, strict=True)]
        current = self._pass = Pass(rows, batch, poison or self._nan)
        args, kwargs = self._inputs.build(current, self._places, given)
        self._follow_attributes()
        try:
            if see_inputs is not None:
                see_inputs((args, kwargs))
            output = self.replica(*args, **kwargs)
        finally:
            self._pass = None
            self._hand_attributes_back()
        if self.drops_generation_caches:
            output = trees.without_generation_caches(output)
        if current.checkpointed:
            self._expect_backward(current, output)
        return output

    # --- attributes ---

    def _follow_attributes(self) -> None:
        if torch.compiler.is_compiling():
            for made, original, names in self._traced:
                made.training = original.training
                for name in names:
                    setattr(made, name, getattr(original, name))
            return
        for made, original, children, forward in self._open:
            own = made.__dict__
            own.clear()  # what was deleted from the model must not live on here
            own.update(original.__dict__)
            own["_modules"] = children
            if forward is not None:
                own["forward"] = forward

    def _hand_attributes_back(self) -> None:
        """What the forward wrote on its modules (a counter, a list of losses) belongs to the model."""
        if torch.compiler.is_compiling():
            for made, original, names in self._traced:
                for name in names:
                    setattr(original, name, getattr(made, name))
            return
        for made, original, _, _ in self._open:
            own, theirs = made.__dict__, original.__dict__
            for key in [k for k, v in own.items() if theirs.get(k, self) is not v and k not in ("_modules", "forward")]:
                theirs[key] = own.pop(key)  # only there: it may hold a graph

    # --- activation checkpointing ---

    def _watch_checkpointing(self, current: Pass) -> None:
        if current.checkpointed or torch.compiler.is_compiling():
            return
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        current.checkpointed = current.grad and (hooked or not torch.is_grad_enabled())

    def _watch_gradients(self, *, always: bool) -> None:
        """Raise where the boundary runs without gradients, unless the model itself has it so from the beginning."""
        enabled = torch.is_grad_enabled()
        if self._has_gradients is None:
            self._has_gradients = enabled
        if not enabled and (always or self._has_gradients):
            raise SplitError(
                "replay: the boundary runs without gradients inside reentrant activation checkpointing, and rows need "
                "none, so nothing in it would be trained; checkpoint with use_reentrant=False"
            )

    def _expect_backward(self, current: Pass, output: Any) -> None:
        def begin(_gradient: Tensor) -> None:
            task = torch._C._current_graph_task_id()
            known = [ref for ref in self._backward[1] if ref() is not current] if self._backward[0] == task else []
            self._backward = (task, [*known, weakref.ref(current)])

        for tensor in trees.tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(begin)  # type: ignore[no-untyped-call]

    def _recomputed(self, name: str) -> tuple[Pass, int]:
        """The pass whose backward calls a stub again, and the number of that call."""
        task, passes = self._backward
        begun = [p for ref in passes if (p := ref()) is not None]
        if task != torch._C._current_graph_task_id() or len(begun) != 1 or self._called[name] != 1:
            what = "the boundary again" if name == _BOUNDARY else f"frozen layers again ({name!r})"
            raise SplitError(
                f"replay: activation checkpointing runs {what}, and which forward and which call it repeats is not "
                "known; call backward() after every forward, or checkpoint trained layers only"
            )
        return begun[0], 0

    # --- stubs ---

    def _arrive(self, name: str) -> tuple[Pass, int] | None:
        """Which pass a call belongs to, and its number there; None inside a call that is run as it is."""
        current = self._pass
        if current is None:
            return self._recomputed(name)
        if current.numbers.inside:
            return None
        self._watch_checkpointing(current)
        return current, current.numbers.next(name)

    def _stub(self, name: str) -> Rewrite:
        planned = self.plan
        calls = {number: call for (n, number), call in planned.closed.items() if n == name}

        def make(_module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                arrived = self._arrive(name)
                if arrived is None:
                    return own(*args, **kwargs)
                current, number = arrived
                call = calls.get(number)
                if call is not None and (name, number) not in planned.again:
                    return self._result(current, call, args, kwargs)
                if call is None and (name, number) not in planned.constant:
                    return own(*args, **kwargs)
                current.numbers.inside = True
                try:
                    return own(*args, **kwargs)
                finally:
                    current.numbers.inside = False

            return forward

        return make

    def _result(self, current: Pass, call: ClosedCall, args: Any, kwargs: Any) -> Any:
        """What a closed call returned, and what it wrote into its arguments."""
        places, rows = self._places, current.rows
        needs_arguments = call.written or any(kind == "argument" for kind, _ in call.leaves)
        given = trees.leaves((args, kwargs)) if needs_arguments else []
        for at, _number in call.written:
            row = places.get(("written", call.name, call.number, at))
            if row is None:
                given[at].fill_(_bad(given[at].dtype))
            else:
                given[at].copy_(rows[row])
        leaves: list[Any] = []
        for at, (kind, what) in enumerate(call.leaves):
            if kind == "constant":
                leaves.append(what)
            elif kind == "argument":
                leaves.append(given[what])
            elif kind == "shared":
                place: Place = "output", call.name, call.number, at
                leaves.append(self.plan.shared.give(place, current.batch, rows[0].device))
            else:
                row = places.get(("output", call.name, call.number, at))
                value = self.plan.values[what]
                leaves.append(
                    poisoned(current, value.spec, value.shape, value.dtype, value.written) if row is None else rows[row]
                )
        return call.structure.build(leaves)

    def _boundary(self, arguments: dict[int, int], stub: Rewrite | None) -> Rewrite:
        def make(module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
            inner = own if stub is None else stub(module, own)

            def forward(*args: Any, **kwargs: Any) -> Any:
                arrived = self._arrive(_BOUNDARY)
                if arrived is None:
                    return inner(*args, **kwargs)
                current, number = arrived
                if current.grad:
                    self._watch_gradients(always=bool(arguments))
                if number == 0:
                    leaves, tree = pytree.tree_flatten((args, kwargs))
                    for at, row in arguments.items():
                        given = leaves[at]  # perhaps more than once, as query, key and value
                        leaves = [current.rows[row] if leaf is given else leaf for leaf in leaves]
                    args, kwargs = pytree.tree_unflatten(leaves, tree)
                return inner(*args, **kwargs)

            return forward

        return make


def _around(outer: Rewrite, inner: Rewrite | None) -> Rewrite:
    """One rewrite of a forward around another."""

    def make(module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        return outer(module, own if inner is None else inner(module, own))

    return make


def _bad(dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return False
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min
