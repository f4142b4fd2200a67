"""The planner: what a forward computes before the boundary, and which values are cheapest to keep.

One forward is recorded at two batch sizes. Everything that ran before the boundary's first call is opaque by module
call (a *closed* call: its modules are frozen and are not run again) or glue between such calls, which the suffix may
run again. The values that may be kept are raw inputs, what closed calls return, and the arguments of the boundary's
first call. Of these the planner takes the cut with the fewest bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import networkx as nx
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cachefreeze.errors import SplitError
from cachefreeze.isolation import preserved_buffers, preserved_random_state
from cachefreeze.splitting.boundary import BoundaryTensor, Site
from cachefreeze.splitting.lengths import fits_a_row, follow_lengths
from cachefreeze.splitting.replica import replicate
from cachefreeze.tracing import METADATA, Example, operation

# Where a value can be kept and put back: a raw input, a leaf of what the n-th call of a module returns, or a leaf of
# the boundary's arguments. (kind, module name, number of the call, number of the leaf)
Place = tuple[Literal["input", "output", "argument"], str, int, int]

_CONSTANT = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice)

# What makes a Python value of a tensor's contents: control flow may follow from a whole batch.
_READS = frozenset({
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__",
    "__contains__", "equal", "allclose", "is_nonzero",
})  # fmt: skip


@dataclass
class Value:
    """One tensor made before the boundary.

    Attributes:
        shape: As recorded.
        spec: Its batch dimension and bytes, once both recordings are compared; None when no row can hold it.
        inputs: Numbers of the values that it is computed from by glue.
        place: Where it can be kept, or None.
        opaque: Whether it comes out of a closed call.
    """

    tensor: Tensor | None
    shape: tuple[int, ...]
    inputs: frozenset[int]
    place: Place | None = None
    opaque: bool = False
    spec: BoundaryTensor | None = None


@dataclass
class ClosedCall:
    """What a closed call returned.

    Attributes:
        name: Of the module.
        number: Which of its calls, from 0.
        tree: Structure of what it returned.
        leaves: Per leaf a constant, a value's number, or the position of the argument leaf that it is.
    """

    name: str
    number: int
    tree: pytree.TreeSpec
    leaves: list[tuple[Literal["constant", "value", "argument"], Any]]


@dataclass
class Recording:
    """One forward up to the boundary, and what was used from there on."""

    values: list[Value] = field(default_factory=list)
    closed: dict[tuple[str, int], ClosedCall] = field(default_factory=dict)
    needed: set[int] = field(default_factory=set)
    operations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What to keep of a forward.

    Attributes:
        kept: Places in the order of the boundary's tensors.
        tensors: What is kept, per place.
        closed: Closed calls by module name and number of the call, as recorded for two samples.
        values: The recorded values.
        live: Numbers of values that glue computes again in the suffix.
    """

    kept: tuple[Place, ...]
    tensors: tuple[BoundaryTensor, ...]
    closed: dict[tuple[str, int], ClosedCall]
    values: list[Value]
    live: frozenset[int]


def plan(site: Site, example: Example, shorter: Example | None = None) -> Plan:
    """Record and choose.

    Args:
        site: Where to cut.
        example: The model's inputs.
        shorter: Others that are padded to another length, where samples have different lengths: raw inputs then cost
            nothing and are all kept, since a batch is collated anew each time.

    Raises:
        SplitError: The forward cannot be recorded alike at two batch sizes, or no rows can hold what crosses.
    """
    opened: set[str] = set()
    while True:
        try:
            two, three = (_record(site, example.take([i % example.batch for i in range(n)]), opened) for n in (2, 3))
            other = None if shorter is None else _record(site, shorter.take([0, 1]), opened)
        except _OpenInstead as found:
            _open(site, opened, found.name, found.reason)
            continue
        _compare(site, two, three)
        if other is not None:
            follow_lengths(site, two, other)
        kept, live, obstacle = _minimum_cut(two)
        if obstacle is None:
            chosen = sorted(kept if other is None else kept | _inputs(two))
            return Plan(
                kept=tuple(_place(two.values[v]) for v in chosen),
                tensors=tuple(_spec(two.values[v]) for v in chosen),
                closed=two.closed,
                values=two.values,
                live=frozenset(live),
            )
        value = two.values[obstacle]
        where = value.place[1] if value.place is not None else ""
        what = "has no batch dimension" if value.spec is None else "follows the padded length in a way that no row can"
        reason = f"returns a tensor {value.shape} that {what} and is used after {site.name!r}"
        _open(site, opened, where, reason)


class _OpenInstead(Exception):  # noqa: N818 - not an error: the recording starts again
    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name)
        self.name = name
        self.reason = reason


def _open(site: Site, opened: set[str], name: str, reason: str) -> None:
    """Look into a closed module from now on: its children are closed instead."""
    module = site.model.get_submodule(name)
    if name in opened or not name or next(module.children(), None) is None:
        raise SplitError(
            f"replay: {name or 'an input'!r} ({type(module).__name__}) {reason}, so no row can hold what crosses; "
            "train from another block"
        )
    opened.add(name)


def _record(site: Site, example: Example, opened: set[str]) -> Recording:
    recorder = _Recorder(site, opened)
    names = [name for name, _ in site.model.named_modules()]
    replica, _ = replicate(site.model, {name: recorder.rewrite(name) for name in names})
    own = example.fresh()
    with (
        preserved_random_state(),
        preserved_buffers(site.model),
        site.mode(train=False),
        torch.no_grad(),
    ):
        for module in replica.modules():
            module.training = False
        recorder.take_inputs(own)
        with recorder:
            output = own.call(replica)
        recorder.need(pytree.tree_leaves(output))
    if not recorder.reached:
        raise SplitError(f"replay: the forward of {type(site.model).__name__} never calls {site.name!r}")
    return recorder.recording


class _Recorder(TorchFunctionMode):
    """Follows tensors by identity and version through one forward."""

    def __init__(self, site: Site, opened: set[str]) -> None:
        super().__init__()
        self.recording = Recording()
        self.reached = False
        self._site = site
        self._opened = opened
        first = site.usage.first_call(site.known_as)
        self._boundary = first.name if first is not None else ""
        self._calls = iter(site.usage.calls)
        self._numbers: dict[str, int] = {}
        self._of: dict[int, tuple[int, Tensor]] = {}  # id -> value number; the tensor is held, or its id would return
        self._inside: dict[int, str] = {}  # id -> closed module in which it was made
        self._whole: set[int] = set()  # ids of integers and masks that come from integers and masks alone
        self._closed: str | None = None
        self._touched = False
        self._kept: list[Any] = []

    def take_inputs(self, example: Example) -> None:
        for at, leaf in enumerate(pytree.tree_leaves((example.args, example.kwargs))):
            if isinstance(leaf, Tensor):
                self._add(leaf, frozenset(), ("input", "", 0, at))
                if not leaf.is_floating_point():
                    self._whole.add(id(leaf))

    def need(self, leaves: list[Any]) -> None:
        self.recording.needed |= self._values(leaves)

    def rewrite(self, name: str) -> Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]:
        def make(_module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                return self._call(name, own, args, kwargs)

            return forward

        return make

    def _call(self, name: str, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        call = next(self._calls, None)
        if call is None or call.name != name:
            raise SplitError(
                f"replay: {name!r} is called in another order than in the forward before (random or batch-dependent "
                "control flow, such as LayerDrop?), so no fixed part of the model runs before the boundary"
            )
        if self._closed is not None or self.reached:
            return own(*args, **kwargs)
        if call.start == self._site.event and name == self._boundary:
            return self._enter_boundary(own, args, kwargs)
        number = self._numbers.get(name, 0)
        self._numbers[name] = number + 1
        if call.end > self._site.event or name in self._opened:
            return own(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # what is looked up here is no op of the model
            given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            before = {id(leaf): leaf._version for leaf in given}
        self._closed, self._touched = name, False
        try:
            result = own(*args, **kwargs)
        finally:
            self._closed = None
        with torch._C.DisableTorchFunction():
            self._close(name, number, args, kwargs, before, result)
        return result

    def _enter_boundary(self, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """From here on everything is suffix; its arguments are values of their own."""
        self.reached = True
        outside = dict(self._of)
        with torch._C.DisableTorchFunction():
            for at, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
                if isinstance(leaf, Tensor) and id(leaf) in self._of:
                    self._add(leaf, frozenset({self._of[id(leaf)][0]}), ("argument", "", 0, at))
        result = own(*args, **kwargs)
        self.need([leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)])
        self._of = outside
        return result

    def _close(self, name: str, number: int, args: Any, kwargs: Any, before: dict[int, int], result: Any) -> None:
        leaves, tree = pytree.tree_flatten(result)
        given = [id(leaf) for leaf in pytree.tree_leaves((args, kwargs))]
        if not self._touched:  # made of weights and shapes alone: the suffix makes it again
            for leaf in leaves:
                self._inside.pop(id(leaf), None)
            untouched = all(not isinstance(leaf, Tensor) or id(leaf) not in self._of for leaf in leaves)
            if untouched or all(id(leaf) in given for leaf in leaves if isinstance(leaf, Tensor)):
                return
        described: list[tuple[Any, Any]] = []
        for at, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                if not isinstance(leaf, _CONSTANT):
                    raise _OpenInstead(name, f"returns a {type(leaf).__name__}")
                described.append(("constant", leaf))
            elif id(leaf) in before and before[id(leaf)] == leaf._version:
                described.append(("argument", given.index(id(leaf))))
            else:
                self._inside.pop(id(leaf), None)
                value = self._add(leaf, frozenset(), ("output", name, number, at), opaque=True)
                described.append(("value", value))
        changed = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        changed = [leaf for leaf in changed if before[id(leaf)] != leaf._version]
        if any(id(leaf) not in {id(other) for other in leaves} for leaf in changed):
            raise _OpenInstead(name, "writes into an argument")
        self.recording.closed[name, number] = ClosedCall(name, number, tree, described)

    def _add(self, tensor: Tensor, inputs: frozenset[int], place: Place | None = None, *, opaque: bool = False) -> int:
        number = len(self.recording.values)
        self.recording.values.append(Value(tensor.detach(), tuple(tensor.shape), inputs, place, opaque))
        self._of[id(tensor)] = (number, tensor)
        self._kept.append(tensor)
        return number

    def _values(self, leaves: list[Any]) -> set[int]:
        found = set()
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if id(leaf) in self._inside:
                    raise _OpenInstead(self._inside[id(leaf)], "makes a tensor that is used outside it")
                if id(leaf) in self._of:
                    found.add(self._of[id(leaf)][0])
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [leaf._version for leaf in given]
        result = func(*args, **kwargs)
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        name = operation(func)
        if not made and name in METADATA:
            return result
        depend = [leaf for leaf in given if id(leaf) in self._of or id(leaf) in self._inside]
        if depend and all(id(leaf) in self._whole for leaf in depend):
            self._whole |= {id(leaf) for leaf in made if not leaf.is_floating_point()}
        elif name in _READS and depend and not self.reached:
            self._refuse_read(name)
        if name in _READS - {"__bool__"} and depend and not self.reached:
            self._refuse_read(name)
        if self._closed is not None:
            self._touched = self._touched or any(id(leaf) in self._of for leaf in given)
            for leaf in made:
                if id(leaf) not in self._of:
                    self._inside[id(leaf)] = self._closed
                    self._kept.append(leaf)
            return result
        inputs = self._values(given)
        if self.reached:
            self.recording.needed |= inputs
            return result
        self.recording.operations.append(name)
        if not made:  # read into Python: the suffix reads it too
            self.recording.needed |= inputs
        written = [leaf for leaf, version in zip(given, versions, strict=True) if leaf._version != version]
        self._write(written, frozenset(inputs))
        if inputs:
            new = [leaf for leaf in made if id(leaf) not in self._of]
            for leaf in new:
                self._add(leaf, frozenset(inputs))
        else:
            self._kept += made
        return result

    def _refuse_read(self, name: str) -> None:
        # ``if mask.all()`` only skips work that would change nothing; everything else may couple samples
        raise SplitError(
            f"replay: {self._closed or type(self._site.model).__name__!r} reads a value of the batch into Python "
            f"({name}) before {self._site.name!r}, so a row may depend on the other samples of its batch; train "
            "from an earlier block"
        )

    def _write(self, written: list[Tensor], inputs: frozenset[int]) -> None:
        """A write reaches every tensor in the same memory."""
        if not inputs:
            return
        storages = {leaf.untyped_storage().data_ptr() for leaf in written}
        for number, tensor in list(self._of.values()):
            if tensor.untyped_storage().data_ptr() in storages:
                self._add(tensor, inputs | {number})
        for leaf in written:
            if id(leaf) not in self._of:
                self._add(leaf, inputs)


def _compare(site: Site, two: Recording, three: Recording) -> None:
    """Both recordings must be one graph; the batch dimension is the one that is 2 in one and 3 in the other."""
    same = two.operations == three.operations and len(two.values) == len(three.values)
    if not same or two.closed.keys() != three.closed.keys():
        raise SplitError(
            f"replay: what runs before {site.name!r} depends on the number of samples in a batch, so no row is "
            "independent of its batch; train from an earlier block"
        )
    for a, b in zip(two.values, three.values, strict=True):
        moving = [d for d, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if x != y]
        if len(moving) == 1 and (a.shape[moving[0]], b.shape[moving[0]]) == (2, 3) and a.tensor is not None:
            a.spec = BoundaryTensor.of(a.tensor, moving[0])
        a.tensor = b.tensor = None
    for key, call in two.closed.items():
        other = three.closed[key]
        if call.tree != other.tree or any(
            a[0] != b[0] or (a[0] == "constant" and a[1] != b[1])
            for a, b in zip(call.leaves, other.leaves, strict=True)
        ):
            raise SplitError(
                f"replay: {call.name!r} returns a value that depends on the number of samples in a batch, which no row "
                "can carry; train from another block"
            )


def _minimum_cut(recording: Recording) -> tuple[set[int], set[int], int | None]:
    """Kept values, recomputed values, and a value that would have to be kept and cannot."""
    graph = nx.DiGraph()
    graph.add_nodes_from(["made", "used"])
    for number, value in enumerate(recording.values):
        capacity = {"capacity": _cost(value)} if _fits_a_row(value) else {}
        graph.add_edge((number, "in"), (number, "out"), **capacity)
        for source in value.inputs:
            graph.add_edge((source, "out"), (number, "in"))
        if value.opaque or (value.place is not None and value.place[0] == "input"):
            graph.add_edge("made", (number, "in"))
    for number in recording.needed:
        graph.add_edge((number, "out"), "used")
    try:
        # networkx gives the side of "used" as what still reaches it, so of equal cuts this is the deepest
        _, (_, near) = nx.minimum_cut(graph, "made", "used")
    except nx.NetworkXUnbounded:
        reaching = nx.ancestors(graph, "used")
        sources = (n for n, v in enumerate(recording.values) if v.opaque or not v.inputs)
        return set(), set(), next(n for n in sources if not _fits_a_row(recording.values[n]) and (n, "out") in reaching)
    numbers = range(len(recording.values))
    kept = {n for n in numbers if (n, "out") in near and (n, "in") not in near}
    live = {n for n in numbers if (n, "in") in near}
    return kept, live, None


def _fits_a_row(value: Value) -> bool:
    return value.place is not None and value.spec is not None and fits_a_row(value.spec)


def _cost(value: Value) -> int:
    """Bytes to keep of a sample; an input of a batch that is collated anew each time is there anyway."""
    return 0 if _spec(value).input is not None else _spec(value).bytes_per_sample


def _inputs(recording: Recording) -> set[int]:
    return {n for n, value in enumerate(recording.values) if value.spec is not None and value.spec.input is not None}


def _place(value: Value) -> Place:
    assert value.place is not None
    return value.place


def _spec(value: Value) -> BoundaryTensor:
    assert value.spec is not None
    return value.spec
