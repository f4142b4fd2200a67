"""Segments: rows at one boundary -> rows at a deeper one, without the raw inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cachefreeze.errors import SplitError
from cachefreeze.isolation import eval_mode, preserved_state
from cachefreeze.splitting.boundary import Uncopied, as_returned, as_tuple, rows_of
from cachefreeze.splitting.fx_segment import fx_segment
from cachefreeze.splitting.padded_verification import as_stored
from cachefreeze.splitting.planner import Plan, plan
from cachefreeze.splitting.replay_prefix import Notes, Reached, ReplayPrefix
from cachefreeze.splitting.replay_suffix import ReplaySuffix
from cachefreeze.splitting.verification import close_rows

if TYPE_CHECKING:
    from cachefreeze.splitting import Parts


class Segment(Uncopied, nn.Module):
    """What lies between two boundaries: the model's own forward, from the rows of one to the rows of the other.

    Shapes:
        rows: One tensor per tensor of the shallower boundary, and after them a detector's lists -> one tensor, or a
            tuple, of the deeper boundary.
    """

    def __init__(self, shallower: Parts, deeper: Parts) -> None:
        super().__init__()
        site, example = shallower.origin
        end = deeper.origin[0]
        before, after = plan_of(shallower), plan_of(deeper)
        self._count = len(shallower.boundary.tensors)
        self._taken = _matched(shallower, before, "taken")
        self._given = _matched(deeper, after, "made")
        self._notes = Notes(after)
        names = {name for name, _ in after.closed.keys() | after.constant}
        around = {name: self._notes.around(name) for name in names}
        around[end.known_as] = self._notes.arriving(end.name, around.get(end.known_as))
        self._after = after
        # neither is registered: both hold what trains as well
        self.__dict__["_suffix"] = ReplaySuffix(site, before, example, around)
        self.__dict__["_model"] = site.model

    def forward(self, *rows: Any) -> Tensor | tuple[Tensor, ...]:
        """Run what lies between, in eval mode and without gradients; rows may be written into."""
        suffix: ReplaySuffix = self.__dict__["_suffix"]
        model: nn.Module = self.__dict__["_model"]
        notes = self._notes
        notes.begin()
        kept = [rows[at] for at in self._taken]
        with eval_mode(model), preserved_state(model), torch.no_grad(), suppress(Reached):
            suffix.run(kept, see_inputs=notes.inputs, given=rows[self._count :])
        found, tensors = notes.found, self._after.tensors
        notes.begin()
        if len(found) < len(tensors):
            raise SplitError("a row of the deeper boundary is not made from rows of this one; fill it from the samples")
        made = [spec.unfold(found[place]) for place, spec in zip(self._after.kept, tensors, strict=True)]
        return as_returned([made[at] for at in self._given])


def make_segment(shallower: Parts, deeper: Parts) -> nn.Module:
    """A verified segment.

    Raises:
        SplitError: The two are not splits of one model, the second is not deeper, or the rows of the first do not hold
            what the second needs.
    """
    site, end = shallower.origin[0], deeper.origin[0]
    if site.model is not end.model:
        raise SplitError("segment_to() takes a split of the same model object; split both from one model")
    if end.event <= site.event:
        raise SplitError(
            f"segment_to({end.name!r}): expected a boundary deeper than {site.name!r}; rows are made in the order of "
            "the forward, so a shallower boundary is filled from the samples"
        )
    segment = _between(shallower, deeper)
    for got, wanted in _made(segment, shallower, deeper):
        if not all(close_rows(a, b) for a, b in zip(wanted, got, strict=True)):
            raise SplitError(
                f"rows at {end.name!r} that are made from rows at {site.name!r} are not those made from the samples; "
                "fill the deeper boundary from the samples"
            )
    return segment


def _made(segment: nn.Module, shallower: Parts, deeper: Parts) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Rows of the deeper boundary: as the segment makes them, and as they are made from the samples."""
    example = shallower.origin[1]
    if not shallower.batches:
        for count in (2, 3):
            some = example.take([i % example.batch for i in range(count)])
            rows = rows_of(shallower.prefix, some.fresh())
            yield as_tuple(segment(*rows, *some.beside)), as_tuple(some.fresh().call(deeper.prefix))
    for batch, _ in shallower.batches:
        rows = as_stored(shallower.boundary.tensors, rows_of(shallower.prefix, batch.example.fresh()), batch)
        made = as_tuple(segment(*rows)), as_tuple(batch.example.fresh().call(deeper.prefix))
        got, wanted = (as_stored(deeper.boundary.tensors, tensors, batch) for tensors in made)
        yield got, wanted


def _between(shallower: Parts, deeper: Parts) -> nn.Module:
    """One graph where both cuts were traced; else, and where no graph leads from one to the other, a replay."""
    if shallower.executor == deeper.executor == "fx":
        (site, example), (end, _) = shallower.origin, deeper.origin
        some = example.take([0, 1])
        made = [rows_of(parts.prefix, some.fresh()) for parts in (shallower, deeper)]
        with suppress(SplitError):
            return fx_segment(site, end, some, *made)
    return Segment(shallower, deeper)


def plan_of(parts: Parts) -> Plan:
    """What a replay of a split keeps, whichever executor made the split."""
    return parts.suffix.plan if isinstance(parts.suffix, ReplaySuffix) else plan(*parts.origin)


def _matched(parts: Parts, planned: Plan, what: str) -> list[int]:
    """Which of a replay's values each row is, or which row each of a replay's values: told by content.

    Another executor may keep what it keeps in another order, or something else.
    """
    if isinstance(parts.suffix, ReplaySuffix):
        return list(range(len(planned.kept)))
    site, example = parts.origin
    some = example.take([0, 1])
    rows = as_tuple(some.fresh().call(parts.prefix))
    with site.mode(train=False):
        values = as_tuple(some.fresh().call(ReplayPrefix(site, planned)))
    wanted, have = (values, rows) if what == "taken" else (rows, values)
    found = []
    for tensor in wanted:
        equal = [at for at, other in enumerate(have) if other.shape == tensor.shape and torch.equal(other, tensor)]
        if not equal:
            raise SplitError(
                f"the rows at {site.name!r} were cut by {parts.executor!r}, and are not what a segment needs; fill the "
                "deeper boundary from the samples"
            )
        found.append(equal[0])
    return found
