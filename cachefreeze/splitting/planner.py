"""The planner: which values of a forward are cheapest to keep, and what the suffix then runs again.

One forward is recorded in train mode at two batch sizes, and once in eval mode. The values that may be kept are raw
inputs, what closed calls return or write, and the arguments of the boundary's first call. Of these the planner takes
the cut with the fewest bytes; of equal ones the deepest.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachefreeze.errors import SplitError
from cachefreeze.flops import count_flops
from cachefreeze.isolation import preserved_random_state, preserved_state
from cachefreeze.splitting.boundary import BoundaryTensor, Site
from cachefreeze.splitting.contents import is_mask
from cachefreeze.splitting.lengths import fits_a_row, follow_lengths
from cachefreeze.splitting.recording import check_ids, record
from cachefreeze.splitting.rules import OpenInstead, Rules, open_as_needed
from cachefreeze.splitting.shared import Shared
from cachefreeze.splitting.values import ClosedCall, Place, Recording, Value
from cachefreeze.tracing import Example


@dataclass(frozen=True)
class Plan:
    """What to keep of a forward.

    Attributes:
        kept: Places in the order of the boundary's tensors.
        tensors: What is kept, per place.
        closed: Closed calls by module name and number of the call, as recorded for two samples.
        constant: Calls that the suffix makes as the model does, and whose inner calls do not count.
        again: Closed calls that the suffix makes again: they hold no weights, and cost no bytes.
        values: The recorded values, which the closed calls name by number.
        shared: Values that the suffix is given beside the rows, since they are the same for every sample.
        stand_ins: Positions of inputs that are not kept, but that glue asks for a truth value: any valid one will do.
        late: Names of the buffers that the forward uses behind the boundary alone, as it runs to make rows.
    """

    kept: tuple[Place, ...]
    tensors: tuple[BoundaryTensor, ...]
    closed: dict[tuple[str, int], ClosedCall]
    constant: frozenset[tuple[str, int]]
    again: frozenset[tuple[str, int]]
    values: list[Value]
    shared: Shared
    stand_ins: frozenset[int]
    late: frozenset[str]


def plan(site: Site, example: Example, shorter: Example | None = None, *, keep_asked: bool = False) -> Plan:
    """Record and choose.

    Args:
        site: Where to cut.
        example: The model's inputs; two and three of their samples are used.
        shorter: Others that are padded to another length, where samples have different lengths: raw inputs then cost
            nothing and are all kept, since a batch is collated anew each time.
        keep_asked: Keep every input that is asked for a truth value.

    Raises:
        SplitError: The forward cannot be recorded alike at two batch sizes, or no rows can hold what crosses.
    """

    def may_open(name: str) -> bool:
        return bool(name) and next(site.model.get_submodule(name).children(), None) is not None

    try:
        return open_as_needed(lambda opened: _plan(site, example, opened, shorter, keep_asked=keep_asked), may_open)
    except OpenInstead as found:
        kind = type(site.model.get_submodule(found.name)).__name__
        raise SplitError(
            f"replay: {found.name or 'the forward'!r} ({kind}) {found.reason}, so no row can hold what crosses; train "
            "from another block"
        ) from None


def _plan(site: Site, example: Example, opened: frozenset[str], shorter: Example | None, *, keep_asked: bool) -> Plan:
    shares = shorter is None  # what follows from a length alone is another one for every batch
    two, three = (record_at(site, example, count, opened, train=True, shares=shares) for count in (2, 3))
    compare(two, three, f"what runs before {site.name!r}")
    if shorter is not None:
        follow_lengths(site, two, record_at(site, shorter, 2, opened, train=True))
    one_mode = record_at(site, example, 2, opened, train=False, live=frozenset(two.live), shares=shares)
    _take_specs(one_mode, two)
    inputs = {value.place for value in two.values if value.spec is not None and value.spec.input is not None}
    others = inputs | (_asked(site, two) if keep_asked else _kept_otherwise(site, example, opened, two))
    kept, again = _kept_in_both(two, one_mode, site, example, inputs, others)
    if two.branches or one_mode.branches:  # the way not taken may use what no poison can show: ids and masks
        kept |= {v.place for v in two.values if _is_raw_integer(v) and fits_a_row(v.spec)}
    order = {value.place: value for value in two.values if value.place in kept}
    places = tuple(place for place in order if place is not None)
    lost = next((p for p in places if p[0] in ("output", "written") and p[1:3] not in one_mode.closed), None)
    if lost is not None and lost[1:3] in two.constant:
        raise SplitError(
            f"replay: the images that {lost[1]!r} puts into one batch are used after {site.name!r} as well"
        )
    if lost is not None:
        raise SplitError(f"replay: {lost[1]!r} is called in train mode only before {site.name!r}, so no row is fixed")
    closed = {key: call for key, call in two.closed.items() if key in one_mode.closed}
    return Plan(
        kept=places,
        tensors=tuple(_spec(order[place]) for place in places),
        closed=closed,
        constant=frozenset(two.constant | one_mode.constant),
        again=frozenset(again),
        values=two.values,
        shared=Shared(two.values[number] for call in closed.values() for number in call.shared),
        stand_ins=_glanced_inputs(two, site.name) | _glanced_inputs(one_mode, site.name),
        late=frozenset(n for n in two.buffers.keys() | one_mode.buffers.keys() if one_mode.buffers.get(n, True)),
    )


def record_at(
    site: Site,
    example: Example,
    count: int,
    opened: frozenset[str],
    *,
    train: bool,
    live: frozenset[tuple[str, int]] = frozenset(),
    shares: bool = False,
    contrary: bool = False,
) -> Recording:
    """One forward with ``count`` samples, of which two differ, in train or eval mode behind the boundary."""
    first = site.first_call
    trainable = frozenset(id(p) for n, p in site.model.named_parameters() if n not in site.frozen and p.requires_grad)
    rules = Rules(
        usage=site.usage,
        closes=lambda call: call.end <= site.event,
        boundaries={first.start if first is not None else -1: site.name},
        trainable=trainable,
        live=live,
        shares=shares,
        contrary=contrary,
        ids=frozenset(
            at
            for at, leaf in enumerate(pytree.tree_leaves((example.args, example.kwargs)))
            if isinstance(leaf, Tensor) and not leaf.is_floating_point() and not is_mask(leaf)
        ),
    )
    some = example.take([i % 2 for i in range(count)])
    with (
        preserved_random_state(),
        preserved_state(site.model),
        site.mode(train=train),
        torch.set_grad_enabled(train),
    ):
        recording = record(site.model, some, rules, opened)
        check_ids(site.model, some, rules, opened, recording.checks)
    if not recording.boundaries:
        raise SplitError(
            f"replay: the forward of {type(site.model).__name__} never calls {site.name!r} through its modules (was "
            "a forward replaced on the instance?)"
        )
    return recording


def check_reads(site: Site, example: Example) -> int | None:
    """Refuse a forward that lets what is in a batch decide what runs before the boundary.

    Samples that take the same way in the verification may take another one in training.

    Returns:
        The floating-point operations of two samples' forward; None where it was not followed to the end.

    Raises:
        SplitError: It does.
    """

    def attempt(opened: frozenset[str]) -> int:
        with count_flops() as counter:
            record_at(site, example, 2, opened, train=False)
        return counter.total

    with suppress(OpenInstead):  # seen by the executor that needs to know
        return open_as_needed(attempt, may_open=bool)
    return None


def compare(two: Recording, three: Recording, what: str) -> None:
    """Both recordings must be one graph; the batch dimension is the one that is 2 in one and 3 in the other.

    Raises:
        SplitError: They are not.
    """
    same = two.operations == three.operations and two.count_before() == three.count_before()
    if not same and two.settled == three.settled and len(two.boundaries) == 1:
        # glue that goes through its batch sample by sample right before the boundary belongs to the suffix
        when, _, operations = two.settled
        same = two.operations[:operations] == three.operations[:operations]
        for recording in (two, three):
            recording.boundaries = dict.fromkeys(recording.boundaries, when)
    if not same or two.closed.keys() != three.closed.keys():
        raise SplitError(
            f"replay: {what} depends on the number of samples in a batch, so no row is independent of its batch; "
            "train from an earlier block"
        )
    for a, b in zip(two.values[: two.count_before()], three.values, strict=False):
        moving = [d for d, (x, y) in enumerate(zip(a.shape, b.shape, strict=False)) if x != y]
        if len(moving) == 1 and a.strides is not None:
            like = torch.empty_strided(a.shape, a.strides, dtype=a.dtype, device="meta")
            a.spec = BoundaryTensor.at(like, moving[0], a.shape[moving[0]], b.shape[moving[0]])
    for key, call in two.closed.items():
        other = three.closed[key]
        if call.structure != other.structure or any(
            a[0] != b[0] or (a[0] == "constant" and a[1] != b[1])
            for a, b in zip(call.leaves, other.leaves, strict=True)
        ):
            raise OpenInstead(call.name, "returns a value that depends on the number of samples in a batch")
        for number in call.shared:
            a, b = two.values[number], three.values[number]
            if a.spec is None and a.shape != b.shape:
                raise OpenInstead(call.name, "returns a table whose size depends on the number of samples in a batch")


def minimum_cut(
    recording: Recording, block: str, free: Collection[Place | None] = ()
) -> tuple[set[int], set[int], int | None]:
    """The cheapest values to keep at one boundary.

    Args:
        recording: With the values' specs.
        block: The boundary.
        free: Places that cost nothing.

    Returns:
        Numbers of the kept values and of those that the suffix computes again, and the number of a value that would
        have to be kept and cannot.
    """
    values = recording.values
    graph = nx.DiGraph()
    graph.add_nodes_from(["made", "used"])
    opaque: list[int] = []
    todo = list(recording.needed(block))
    outs = {number: _out(values[number], number, block) for number in todo}
    graph.add_edges_from((out, "used") for out in outs.values())
    while todo:  # what nothing behind the boundary needs is in no cut
        number = todo.pop()
        value, out = values[number], outs[number]
        if out != (number, "in"):
            graph.add_edge((number, "in"), out, capacity=0 if value.place in free else _spec(value).bytes_per_sample)
        for source in value.inputs:
            if source not in outs:
                outs[source] = _out(values[source], source, block)
                todo.append(source)
            graph.add_edge(outs[source], (number, "in"))
        if value.opaque:
            graph.add_edge("made", (number, "in"))
            opaque.append(number)
    try:
        # networkx gives the side of "used" as what still reaches it, so of equal cuts this is the deepest
        _, (_, near) = nx.minimum_cut(graph, "made", "used")
    except nx.NetworkXUnbounded:
        return set(), set(), min(number for number in opaque if not fits_a_row(values[number].spec))
    kept = {number for number, out in outs.items() if out in near and (number, "in") not in near}
    return kept, {number for number in outs if (number, "in") in near}, None


def _out(value: Value, number: int, block: str) -> tuple[int, str]:
    """The node behind a value, which is one with the value's own where it cannot be kept at a boundary."""
    foreign = value.place is not None and value.place[0] == "argument" and value.place[1] != block
    can = value.place is not None and fits_a_row(value.spec) and not value.random and not foreign
    return number, "out" if can else "in"


def _kept_in_both(
    train: Recording,
    evaluate: Recording,
    site: Site,
    example: Example,
    free: set[Place | None],
    others: set[Place | None],
) -> tuple[set[Place | None], set[tuple[str, int]]]:
    """Places to keep for both modes, and closed calls to make again.

    What is kept for one mode costs the other nothing, so the first one decides: where it is not the second's as well,
    both orders are tried. A place is as large in both.
    """
    sizes = {value.place: value.spec.bytes_per_sample for value in train.values if value.spec is not None}
    found: list[tuple[int, int, set[Place | None], set[tuple[str, int]]]] = []
    for first, second in ((train, evaluate), (evaluate, train)):
        kept, again = _kept(first, site, example, free)
        kept |= others
        more, again_too = _kept(second, site, example, kept)
        found.append((sum(sizes.get(place, 0) for place in kept | more), len(found), kept | more, again | again_too))
        if more <= kept:
            break
    _, _, kept, again = min(found)
    return kept, again


def _kept(
    recording: Recording, site: Site, example: Example, free: Collection[Place | None]
) -> tuple[set[Place | None], set[tuple[str, int]]]:
    """Places to keep, and closed calls to make again."""
    kept, live, obstacle = minimum_cut(recording, site.name, free)
    if obstacle is not None:
        place = recording.values[obstacle].place
        shape = recording.values[obstacle].shape
        if place is None or place[0] == "input":
            raise SplitError(
                f"replay: input {input_name(site, example, place[3] if place else 0)} of shape {shape} has no batch "
                f"dimension and is used after {site.name!r}, so no row can hold it; make it a constant of the model"
            )
        length = recording.values[obstacle].spec is not None
        what = "follows the padded length in a way that no row can" if length else "has no batch dimension"
        raise OpenInstead(place[1], f"returns a tensor {shape} that {what} and is used after {site.name!r}")
    again = {key for key, call in recording.closed.items() if call.made & live}
    return {recording.values[number].place for number in kept}, again


def _kept_otherwise(site: Site, example: Example, opened: frozenset[str], recorded: Recording) -> set[Place | None]:
    """Inputs that are used where ids and masks answer otherwise than the example's.

    A batch without padding skips its mask, and the next one has padding. Where the other way cannot be gone with these
    inputs, everything is kept that decides on it.
    """
    fitting = _asked(site, recorded)
    if not fitting:
        return set()
    try:
        other = record_at(site, example, 2, opened, train=False, live=frozenset(recorded.live), contrary=True)
        _take_specs(other, recorded)
        kept, _, obstacle = minimum_cut(other, site.name)
    except Exception:  # whatever the model's forward raises on inputs that do not go with the answer
        return fitting
    if obstacle is not None:
        return fitting
    return {other.values[number].place for number in kept} & fitting


def _asked(site: Site, recorded: Recording) -> set[Place | None]:
    """Inputs that glue before the boundary asks for a truth value, and that rows can hold."""
    asked = {("input", "", 0, at) for at in _glanced_inputs(recorded, site.name)}
    return {v.place for v in recorded.values if v.place in asked and fits_a_row(v.spec)}


def _glanced_inputs(recording: Recording, block: str) -> frozenset[int]:
    """Positions of the inputs behind what glue asks for a truth value before the boundary."""
    start = recording.boundaries[block]
    found = set(frozenset[int]().union(*(numbers for when, numbers in recording.glanced if when < start)))
    for number in range(len(recording.values) - 1, -1, -1):
        if number in found:
            found |= recording.values[number].inputs
    places = (recording.values[number].place for number in found)
    return frozenset(place[3] for place in places if place is not None and place[0] == "input")


def _is_raw_integer(value: Value) -> bool:
    raw = value.place is not None and value.place[0] == "input"
    return raw and not value.dtype.is_floating_point and not value.dtype.is_complex


def _take_specs(recording: Recording, specified: Recording) -> None:
    """Give the values of another mode the specs of the same places."""
    specs = {value.place: value.spec for value in specified.values if value.place is not None and not value.random}
    for value in recording.values:
        value.spec = specs.get(value.place) if value.place is not None else None


def input_name(site: Site, example: Example, leaf: int) -> str:
    """What a leaf of the inputs is called: its key, or its position."""
    paths, _ = pytree.tree_flatten_with_path((example.args, example.kwargs))
    return pytree.keystr(paths[leaf][0][1:])


def _spec(value: Value) -> BoundaryTensor:
    assert value.spec is not None
    return value.spec
