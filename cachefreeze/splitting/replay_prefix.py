"""The prefix of a replay: the model's own forward up to the boundary, noting what is kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachefreeze import trees
from cachefreeze.errors import SplitError
from cachefreeze.fingerprint import attributes_of, digest
from cachefreeze.isolation import preserved_modes_of, preserved_state_of
from cachefreeze.splitting.boundary import Site, Uncopied, as_returned
from cachefreeze.splitting.planner import Plan
from cachefreeze.splitting.replica import Rewrite, replicate
from cachefreeze.splitting.values import Place


class Reached(BaseException):
    """All that is kept was seen: the prefix is done."""


class Numbers:
    """Counts the calls of every module in one forward, leaving out those inside opaque calls."""

    def __init__(self) -> None:
        self._calls: dict[str, int] = {}
        self.inside = False

    def next(self, name: str) -> int:
        """The number of this call, from 0."""
        number = self._calls[name] = self._calls.get(name, -1) + 1
        return number


class Notes:
    """Takes the kept values out of a running forward.

    Attributes:
        found: What was seen so far, by place.
    """

    def __init__(self, planned: Plan, others: frozenset[Place] = frozenset()) -> None:
        self._kept = frozenset(planned.kept) | others
        self._opaque = planned.closed.keys() | planned.constant
        self.begin()

    def begin(self) -> None:
        """Forget the last forward."""
        self.numbers = Numbers()
        self.found: dict[Place, Tensor] = {}

    def note(self, kind: Literal["input", "output", "written", "argument"], name: str, number: int, tree: Any) -> None:
        """Keep what is wanted of a tree of values; raises Reached once that was the last."""
        for at, leaf in enumerate(trees.leaves(tree)):
            if (kind, name, number, at) in self._kept:
                self.found[kind, name, number, at] = leaf.clone()  # something later may write into it
        if len(self.found) == len(self._kept):
            raise Reached

    def inputs(self, given: Any) -> None:
        """Note the model's arguments."""
        self.note("input", "", 0, pytree.tree_leaves(given))

    def around(self, name: str) -> Rewrite:
        """A forward that notes what it returns and writes."""

        def make(_module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                numbers = self.numbers
                if numbers.inside:
                    return own(*args, **kwargs)
                number = numbers.next(name)
                opaque = (name, number) in self._opaque
                numbers.inside = opaque
                try:
                    result = own(*args, **kwargs)
                finally:
                    numbers.inside = False
                if opaque:
                    self.note("written", name, number, (args, kwargs))
                    self.note("output", name, number, result)
                return result

            return forward

        return make

    def arriving(self, block: str, then: Rewrite | None = None) -> Rewrite:
        """A forward that notes the arguments of its first call, where the prefix ends at the latest."""

        def make(module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
            inner = own if then is None else then(module, own)

            def forward(*args: Any, **kwargs: Any) -> Any:
                if self.numbers.inside:
                    return inner(*args, **kwargs)
                self.note("argument", block, 0, pytree.tree_leaves((args, kwargs)))
                raise Reached

            return forward

        return make


def _versions(modules: list[tuple[str, nn.Module]]) -> list[tuple[int, int]]:
    return [(id(buffer), buffer._version) for _, m in modules for buffer in m._buffers.values() if buffer is not None]


class _Run(nn.Module):
    """What a prefix runs; a module, since a fingerprint leaves out modules that are not registered."""

    replica: nn.Module
    notes: Notes
    opened: list[tuple[str, nn.Module]]
    before: list[nn.Module]
    writes: bool | None = None

    def __init__(
        self, replica: nn.Module, notes: Notes, opened: list[tuple[str, nn.Module]], before: list[nn.Module]
    ) -> None:
        super().__init__()
        self.__dict__.update(replica=replica, notes=notes, opened=opened, before=before)


class ReplayPrefix(Uncopied, nn.Module):
    """Raw inputs -> the kept values: the model's own forward up to the boundary, in eval mode without gradients."""

    def __init__(self, site: Site, planned: Plan) -> None:
        super().__init__()
        model = site.model
        names = {name for name, _ in planned.closed.keys() | planned.constant}
        opened = [model.get_submodule(name) for name in site.open_before(names)]
        self._register(site, names, opened, planned.late)
        # what the fingerprint sees of modules whose forward runs here in part
        seen = [type(m).forward for m in opened], [attributes_of(m) for m in opened]
        self.recipe = (planned.kept, *map(digest, seen))
        notes = Notes(planned, planned.shared.places)
        forwards = {name: notes.around(name) for name in names}
        stop = site.known_as
        forwards[stop] = notes.arriving(site.name, forwards.get(stop))
        replica, copied = replicate(model, forwards)
        for made, _ in copied:
            made.training = False
        self.kept = planned.kept
        self.tensors = planned.tensors
        self.shared = planned.shared
        # not registered: the replica holds what trains as well
        self.__dict__["_run"] = _Run(
            replica, notes, [("", module) for module in opened], [model.get_submodule(name) for name in site.before]
        )

    def _register(self, site: Site, closed: set[str], opened: list[nn.Module], late: frozenset[str]) -> None:
        """Modules, parameters and buffers that rows depend on: what a fingerprint looks at."""
        model = site.model
        outermost = [n for n in sorted(closed) if not any(n.startswith(f"{other}.") for other in closed if other != n)]
        self.modules_before = nn.ModuleList(model.get_submodule(name) for name in outermost)
        held = {id(p) for p in self.modules_before.parameters()}
        for name, parameter in model.named_parameters():
            if name in site.frozen and id(parameter) not in held:
                self.register_parameter(name.replace(".", "_"), parameter)
        for name, buffer in model.named_buffers():
            owner = model.get_submodule(name.rpartition(".")[0])
            if name not in late and any(owner is module for module in opened):
                self.register_buffer(name.replace(".", "_"), buffer)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """Run the frozen part: one tensor, or a tuple in the order of ``boundary.tensors``."""
        run: _Run = self.__dict__["_run"]
        notes: Notes = run.notes
        notes.begin()
        # most forwards write nothing before the boundary: then there is nothing to put back at every batch
        watched = run.opened if run.writes is not False else []
        with preserved_modes_of(run.before), preserved_state_of(watched) as state, torch.no_grad():
            for module in run.before:
                module.training = False
            versions = _versions(watched)
            with suppress(Reached):
                notes.inputs((args, kwargs))
                run.replica(*args, **kwargs)
            if run.writes is None:
                run.writes = bool(state.changed()) or _versions(watched) != versions
        missing = [place for place in (*self.kept, *self.shared.places) if place not in notes.found]
        if missing:
            raise SplitError(
                f"replay: {missing[0][1] or 'an input'!r} was not seen on the way to the boundary: the forward goes "
                "another way on these inputs, or this is a copy of a prefix (copy the model, and split the copy)"
            )
        for place in self.shared.places:
            self.shared.note(place, notes.found[place])
        pairs = zip(self.kept, self.tensors, strict=True)
        values = [spec.unfold(notes.found[place]) for place, spec in pairs]
        notes.begin()
        return as_returned(values)
