"""The replay executor: the model's own forward, with what ran before the boundary replaced by stubs that return rows.

What is not kept is a poison: a fake tensor while the cut is proven (no output may be one), NaN afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from cachefreeze.errors import SplitError, StaleCacheError
from cachefreeze.fingerprint import digest
from cachefreeze.isolation import eval_mode, preserved_buffers, preserved_random_state
from cachefreeze.splitting.boundary import BoundaryTensor, Cut, Site
from cachefreeze.splitting.fx_executor import plain_attributes
from cachefreeze.splitting.lengths import sizes_at
from cachefreeze.splitting.planner import ClosedCall, Place, Plan, plan
from cachefreeze.splitting.replica import replicate
from cachefreeze.tracing import Example


class ReplayExecutor:
    """Cut any model whose forward does the same for every batch; see the module's docstring."""

    name = "replay"

    def cut(self, site: Site, example: Example, shorter: Example | None = None) -> Cut:
        """Propose a prefix and a suffix; raises SplitError where no rows can hold what crosses.

        Args:
            site: Where to cut.
            example: The model's inputs.
            shorter: Others that are padded to another length, where samples have different lengths.
        """
        planned = plan(site, example, shorter)
        if all(tensor.input is not None for tensor in planned.tensors):
            raise SplitError(f"replay: nothing that is used after {site.name!r} depends on the inputs")
        prefix = ReplayPrefix(site, planned)
        suffix = ReplaySuffix(site, planned, example)
        some = example.take([0, 1])
        made = some.call(prefix)
        rows = [row.clone() for row in (made if isinstance(made, tuple) else (made,))]
        for train in (False, True):
            with site.mode(train=train), preserved_random_state(), preserved_buffers(site.model), torch.no_grad():
                _prove(suffix, rows, site)
        return Cut(prefix, suffix, planned.tensors)


def _prove(suffix: ReplaySuffix, rows: list[Tensor], site: Site) -> None:
    """No output may depend on what is not kept."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def poison(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        with fake:
            return torch.empty(shape, dtype=dtype, device=device)

    try:
        output = suffix.run(rows, poison)
    except SplitError:
        raise
    except Exception as error:  # the model's forward may fail with anything on a value that is not there
        first = "".join(str(error).strip().splitlines()[:1])
        raise SplitError(f"replay: what runs after {site.name!r} reads a value that is not kept: {first}") from error
    if any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(output)):
        raise SplitError(f"replay: an output of {type(site.model).__name__} depends on a value that is not kept")


class _Reached(BaseException):
    """The boundary was reached: the prefix is done."""


class _Numbered:
    """Counts the calls of every module in one forward."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def next(self, name: str) -> int:
        number = self.calls.get(name, 0)
        self.calls[name] = number + 1
        return number


class _Pass(nn.Module):
    """What one forward of the prefix has seen; a module, since a fingerprint leaves out unregistered ones."""

    def __init__(self, kept: tuple[Place, ...]) -> None:
        super().__init__()
        self.kept = kept
        self.begin()

    def begin(self) -> None:
        self.numbers = _Numbered()
        self.found: dict[Place, Tensor] = {}


class ReplayPrefix(nn.Module):
    """Raw inputs -> the kept values: the model's own forward up to the boundary, in eval mode without gradients."""

    _pass: _Pass
    _replica: nn.Module

    def __init__(self, site: Site, planned: Plan) -> None:
        super().__init__()
        closed = {name for name, _ in planned.closed}
        model = site.model
        self.modules_before = nn.ModuleList(model.get_submodule(name) for name in sorted(closed))
        held = {id(p) for p in self.modules_before.parameters()}
        loose = [n for n, _ in model.named_parameters() if n in site.frozen and id(model.get_parameter(n)) not in held]
        for name in loose:
            self.register_parameter(name.replace(".", "_"), model.get_parameter(name))
        for name, buffer in model.named_buffers():
            owner = model.get_submodule(name.rpartition(".")[0])
            if any(owner is child for child in model.modules() if child in _opened(model, closed, site)):
                self.register_buffer(name.replace(".", "_"), buffer)
        opened = _opened(model, closed, site)
        # what the fingerprint sees of modules whose forward runs here in part
        self.recipe = (planned.kept, digest([type(m).forward for m in opened]), plain_attributes(tuple(opened)))
        forwards = {name: self._keep(name) for name in closed} | {site.known_as: self._arrive}
        replica, copied = replicate(model, forwards)
        # not registered: it holds what trains as well
        self.__dict__["_replica"] = replica
        for made, _ in copied:
            made.training = False
        self.__dict__["_pass"] = _Pass(planned.kept)

    def _keep(self, name: str) -> Any:
        def make(_module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                number = self._pass.numbers.next(name)
                result = own(*args, **kwargs)
                self._note("output", name, number, result)
                return result

            return forward

        return make

    def _arrive(self, _module: nn.Module, _own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._note("argument", "", 0, (args, kwargs))
            raise _Reached

        return forward

    def _note(self, kind: Literal["input", "output", "argument"], name: str, number: int, tree: Any) -> None:
        for at, leaf in enumerate(pytree.tree_leaves(tree)):
            if (kind, name, number, at) in self._pass.kept:
                self._pass.found[kind, name, number, at] = leaf.clone()  # something later may write into it

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """Run the frozen part: one tensor, or a tuple in the order of ``boundary.tensors``."""
        self._pass.begin()
        self._note("input", "", 0, (args, kwargs))
        with torch.no_grad(), eval_mode(self.modules_before), suppress(_Reached):
            self._replica(*args, **kwargs)
        values = tuple(self._pass.found[place] for place in self._pass.kept)
        self._pass.begin()
        return values[0] if len(values) == 1 else values


def _opened(model: nn.Module, closed: set[str], site: Site) -> list[nn.Module]:
    """Modules whose own forward runs in part before the boundary."""
    names = {"", *(name.rpartition(".")[0] for name in closed)}
    names |= {".".join(name.split(".")[:i]) for name in [*closed, site.known_as] for i in range(1, name.count(".") + 1)}
    return [model.get_submodule(name) for name in sorted(names) if name not in closed]


class ReplaySuffix(nn.Module):
    """Rows -> the model's output, by its own forward. It has no mode of its own: it follows the model's modules."""

    def __init__(self, site: Site, planned: Plan, example: Example) -> None:
        super().__init__()
        self._plan = planned
        self._places = {place: i for i, place in enumerate(planned.kept)}
        self._rows: list[Tensor] = []
        self._given: list[Any] = []
        self._numbers = _Numbered()
        self._poison: Any = _nan
        leaves, self._tree = pytree.tree_flatten((example.args, example.kwargs))
        inputs = {v.place[3]: v for v in planned.values if v.place is not None and v.place[0] == "input"}
        self._inputs: list[Any] = [
            (inputs[at].spec, leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf
            for at, leaf in enumerate(leaves)
        ]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        if any(
            t and i[0] is None and ("input", "", 0, at) not in self._places
            for at, (t, i) in enumerate(zip(self._is_tensor, self._inputs, strict=True))
        ):
            raise SplitError("replay: an input has no batch dimension; pass it as a constant of the model")
        names = {name for name, _ in planned.closed}
        forwards: dict[str, Any] = {name: self._stub(name) for name in names}
        self._arguments = {p[3]: i for p, i in self._places.items() if p[0] == "argument"}
        known = site.known_as
        if self._arguments:
            forwards[known] = self._boundary(forwards.get(known))
        self.replica, copied = replicate(site.model, forwards)
        self._copied = copied
        self._children = [(made, original, dict(original._modules)) for made, original in copied]

    def train(self, mode: bool = True) -> ReplaySuffix:
        """Set the mode of the model, which is the only mode there is."""
        self._copied[-1][1].train(mode)
        return self

    def follow(self) -> None:
        """Raise if a module was replaced behind the suffix."""
        for _, original, children in self._children:
            for key, child in original._modules.items():
                if children.get(key) is not child:
                    raise StaleCacheError(
                        f"{key!r} of {type(original).__name__} was replaced after the loader was made, so what trains "
                        "is not what the model holds; replace modules first, then make the Engine"
                    )

    def forward(self, *rows: Tensor) -> Any:
        """Run the trainable part on a fresh batch of rows, which it may write into."""
        return self.run(list(rows), _nan)

    def run(self, rows: list[Tensor], poison: Any) -> Any:
        """The model's forward on rows, with ``poison(shape, dtype, device)`` for what is not kept."""
        self._rows, self._poison = rows, poison
        self._numbers.calls.clear()
        for made, original in self._copied:
            made.training = original.training
        batch = rows[0].shape[self._plan.tensors[0].batch_dim]
        given: list[Any] = []
        self._given = []
        for at, (tensor, what) in enumerate(zip(self._is_tensor, self._inputs, strict=True)):
            place = ("input", "", 0, at)
            if not tensor:
                given.append(what)
            elif place in self._places:
                given.append(rows[self._places[place]])
            else:
                given.append(self._poisoned(what[0], batch))
        self._given = given
        args, kwargs = pytree.tree_unflatten(given, self._tree)
        try:
            return self.replica(*args, **kwargs)
        finally:
            self._rows, self._given = [], []

    def _poisoned(self, spec: BoundaryTensor | None, batch: int) -> Tensor:
        if spec is None:
            shape: tuple[int, ...] = ()
            return self._poison(shape, torch.float32, self._rows[0].device)  # type: ignore[no-any-return]
        inputs = [tuple(leaf.shape) if isinstance(leaf, Tensor) else () for leaf in self._given]
        return self._poison(sizes_at(spec, batch, inputs or None), spec.dtype, self._rows[0].device)  # type: ignore[no-any-return]

    def _stub(self, name: str) -> Any:
        calls = {number: call for (n, number), call in self._plan.closed.items() if n == name}

        def make(_module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                number = self._numbers.next(name)
                call = calls.get(number)
                return own(*args, **kwargs) if call is None else self._result(call, args, kwargs)

            return forward

        return make

    def _result(self, call: ClosedCall, args: Any, kwargs: Any) -> Any:
        batch = self._rows[0].shape[self._plan.tensors[0].batch_dim]
        given = None
        leaves: list[Any] = []
        for at, (kind, what) in enumerate(call.leaves):
            place: Place = ("output", call.name, call.number, at)
            if kind == "constant":
                leaves.append(what)
            elif kind == "argument":
                given = pytree.tree_leaves((args, kwargs)) if given is None else given
                leaves.append(given[what])
            elif place in self._places:
                leaves.append(self._rows[self._places[place]])
            else:
                leaves.append(self._poisoned(self._plan.values[what].spec, batch))
        return pytree.tree_unflatten(leaves, call.tree)

    def _boundary(self, stub: Any) -> Any:
        def make(module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
            arrived = own if stub is None else stub(module, own)

            def forward(*args: Any, **kwargs: Any) -> Any:
                first = self._numbers.next("\0boundary") == 0
                if first:
                    leaves, tree = pytree.tree_flatten((args, kwargs))
                    for at, i in self._arguments.items():
                        leaves[at] = self._rows[i]
                    args, kwargs = pytree.tree_unflatten(leaves, tree)
                return arrived(*args, **kwargs)

            return forward

        return make


def _nan(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A value that shows where it is used: NaN, else the smallest integer; one element, seen as many."""
    if dtype == torch.bool:
        return torch.zeros((), dtype=dtype, device=device).expand(shape)
    bad = float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min
    return torch.full((), bad, dtype=dtype, device=device).expand(shape)
