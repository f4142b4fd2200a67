"""The cache of a run under a schedule: its boundary follows what is frozen, between epochs and where that pays."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

from cachefreeze.errors import LoaderError, SplitError, UsageError
from cachefreeze.loader import PassingLoader, StagedLoader
from cachefreeze.manager import CacheManager, next_name, split_on
from cachefreeze.measuring import FirstLook, Run, listed_blocks, look_at, measure
from cachefreeze.moves import Costs, Move, too_short, worthwhile
from cachefreeze.observing import probe_rows
from cachefreeze.running import model_device
from cachefreeze.samples import View
from cachefreeze.schedules import Stages
from cachefreeze.sides import Place
from cachefreeze.splitting import Parts
from cachefreeze.staging import Staging
from cachefreeze.tracing import Example

_LOG = logging.getLogger("cachefreeze")

Moves = Literal["measured", "always"]


class MakeCache(Protocol):
    """Makes the stores of a split."""

    def __call__(self, parts: Parts, *, below: CacheManager | None = None) -> CacheManager:
        """The stores of ``parts``, from rows of a shallower boundary where ``below`` is given."""


@dataclass(frozen=True)
class _Followed:
    """A loader that follows a schedule, and what its stores are made of."""

    loader: StagedLoader
    view: View
    name: str
    version: str | None


class Following:
    """One run's loaders and stores under a schedule.

    Args:
        model: The user's own model.
        staging: The schedule in effect.
        make: Makes the stores of each boundary.
        store: As for the engine.
        moves: ``measured`` or ``always``.
        autocast: Of the prefix.
        now: The epoch that runs; None outside of the clock.

    Attributes:
        parts: The verified split at the boundary of the cache; None while nothing is cached.
        cache: Its stores; None likewise.
        boundary: The first block that trains, at the beginning of this epoch; None while all do.
        place: How many leading blocks the cache stands for; None before the first epoch.
        decisions: Where the boundary of the cache went, and what was predicted.
    """

    def __init__(
        self,
        model: nn.Module,
        staging: Staging,
        make: MakeCache,
        store: str,
        moves: Moves,
        autocast: torch.dtype | None,
        now: Callable[[], int | None],
    ) -> None:
        self.parts: Parts | None = None
        self.cache: CacheManager | None = None
        self.boundary: str | None = None
        self.place: int | None = None
        self.decisions: list[Move] = []
        self._model = model
        self._staging = staging
        self._make = make
        self._store = store
        self._moves = moves
        self._autocast = autocast
        self._now = now
        self._followed: list[_Followed] = []
        self._look: FirstLook | None = None
        self._costs: Costs | None = None
        self._below: CacheManager | None = None
        self._left: int | None = None
        self._path: list[tuple[int, int]] = []

    @property
    def padded(self) -> frozenset[Place]:
        """Input leaves and their dimensions in which samples of the first loader differ: so may those of the others."""
        return self._followed[0].view.padded if self._followed else frozenset()

    def add(self, dataloader: DataLoader[Any], view: View, name: str | None, version: str | None) -> StagedLoader:
        """A loader whose batches follow the schedule; the first one's length is that of an epoch.

        Raises:
            LoaderError: It gives the model something else than the first one, and a boundary moves for all.
        """
        first = self._followed[0].view if self._followed else view
        if view.kind != first.kind and self._store != "off":
            raise LoaderError(
                f"the batches of this loader give the model {view.kind}, those of the first one {first.kind}, and the "
                "boundary moves for all loaders at once: use the same collate function and inputs, labels included, "
                "for all of them, or pad to a fixed length"
            )
        if not self._followed:  # samples of a further loader may be too few, or too much alike, to be an example
            self._staging.read(view.example().to(model_device(self._model)), partial(self._probe, view))
        name = name if name is not None else next_name(followed.name for followed in self._followed)
        made = StagedLoader(dataloader)
        self._followed.append(_Followed(made, view, name, version))
        return made

    def resume(self, place: int | None) -> None:
        """Begin where the cache of an interrupted run stood, if it is on disk: its rows may be promoted."""
        self._left = place

    def start_epoch(self, epoch: int, total: int, steps: int | None) -> None:
        """Freeze what the schedule says, then move the boundary of the cache where that pays.

        Args:
            epoch: That begins, counted from 0.
            total: Epochs of the whole run.
            steps: Optimizer steps of an epoch; None: the batches of the first loader.
        """
        if not self._followed:
            raise UsageError("make the loaders first (engine.loader): they follow the schedule from epoch to epoch")
        staging = self._staging
        staging.start_epoch(epoch, total, len(self._followed[0].loader) if steps is None else steps)
        left, self._left = self._left, None
        if left and left <= staging.frozen and self._store.startswith("hdf5:"):
            self._move(left)  # a resumed run finds its rows where it left them
        place = self._next_place(epoch)
        if place != self.place or (place == 0 and staging.boundary != self.boundary):
            began = time.perf_counter()
            self._move(place)
            if self._costs is not None and place:
                self._costs = replace(self._costs, setup=time.perf_counter() - began)
                self._path = []  # now that it is known, what is left is decided anew
        self.boundary = staging.boundary

    def end_epoch(self) -> None:
        """Let the stores of the boundary before go, once nothing is made from them any more."""
        if self.cache is not None and not self.cache.promoting:
            self._drop_below()

    def close(self) -> None:
        """Close the stores of the boundary before; their files stay, an interrupted promotion goes on from them."""
        if self._below is not None:
            self._below.close()
            self._below = None

    def _next_place(self, epoch: int) -> int:
        """How many leading blocks the cache stands for in the epoch that begins."""
        staging, now = self._staging, self.place or 0
        if self._store == "off" or not staging.frozen:
            return 0
        if self._moves == "always":
            return staging.frozen
        upcoming = staging.upcoming()
        if [frozen for frozen, _ in self._path] != upcoming:
            first = self._costs is None
            if self._costs is None:
                self._costs = self._measured(upcoming, now)
            path, seconds, held = [0] * len(upcoming), 0.0, 0.0
            if self._costs is not None:
                path, seconds, held = worthwhile(upcoming, self._costs, now)
            self._path = list(zip(upcoming, path, strict=True))
            if first and isinstance(staging.schedule, Stages):
                self._warn_of_short_stages(upcoming, path)
            frozen, before, after = (staging.ladder.boundary(count) for count in (staging.frozen, now, path[0]))
            self.decisions.append(Move(epoch, frozen, before, after, seconds, held))
        _, place = self._path.pop(0)
        return place

    def _warn_of_short_stages(self, upcoming: list[int], path: list[int]) -> None:
        for count, epochs in too_short(upcoming, path):
            _LOG.warning(
                "the stage that trains from %r lasts %d epoch(s), too short to pay for moving the cache there: "
                "what it freezes beyond the boundary before runs in every epoch; freeze in longer stages",
                *(self._staging.ladder.boundary(count), epochs),
            )

    def _measured(self, upcoming: list[int], now: int) -> Costs | None:
        """What the epochs under the schedule are made of; None where they are evidently too few to cache anything.

        A first move takes as long as it is predicted to, or twice as long, and one that gains nothing then would gain
        next to nothing at best. Where there is none left, that is all that is measured: to find the fewest bytes of a
        row takes as long as a part of a move.
        """
        loaders = [(followed.loader.dataloader, followed.view) for followed in self._followed]
        view, device = loaders[0][1], model_device(self._model)
        samples = sum(each.samples for _, each in loaders)
        run = Run.of(loaders[0][0], samples, sum(map(bool, upcoming)), thawed=True)
        if self._look is None:
            self._look = look_at(self._model, view, self._autocast, run)
        if not now and self._look.shows_short(run):
            return None
        seen = measure(
            self._model,
            self._staging.usage,
            self._staging.ladder.names,
            loaders,
            tiers=(),
            autocast_dtype=self._autocast,
            epochs=len(upcoming),
            look=self._look,
        )
        estimated = seen.costs_in(self._store, device, run.batch_size)
        longer = replace(estimated, setup=2 * estimated.setup)
        if set(worthwhile(upcoming, longer, now)[0]) == {now}:
            return longer
        sizes = {block.name: block.bytes_per_sample for block in listed_blocks(self._model, view)}
        return replace(seen.with_rows(sizes).costs_in(self._store, device, run.batch_size), setup=longer.setup)

    def _move(self, place: int) -> None:
        """Move the boundary of the cache: rows of the new one are filled while the epoch trains."""
        boundary = self._staging.ladder.boundary(place)
        self._drop_below()
        before, self._below = self.place or 0, self.cache
        self.parts, self.cache, self.place = None, None, place
        if boundary is not None:
            # in the very order that decided what is frozen
            view, usage = self._followed[0].view, self._staging.usage
            self.parts = split_on(self._model, view, self._autocast, boundary, usage)
            self.cache = self._promoting(self.parts, self._below if before < place else None)
        if self.cache is None or not self.cache.has_below:
            self._drop_below()
        for followed in self._followed:
            dataloader = followed.loader.dataloader
            if self.cache is None:
                source: Literal["frozen", "live"] = "frozen" if self._staging.frozen else "live"
                followed.loader.follow(PassingLoader(dataloader, model_device(self._model), source))
            else:
                inner = self.cache.loader_for(dataloader, followed.view, followed.name, followed.version, self._now)
                followed.loader.follow(inner)

    def _promoting(self, parts: Parts, below: CacheManager | None) -> CacheManager:
        """The stores of a new boundary, made from those below where the model allows it."""
        try:
            return self._make(parts, below=below)
        except SplitError as error:
            if below is None:
                raise
            _LOG.warning("rows at %r are filled from the samples: %s", parts.boundary.name, error)
            return self._make(parts)

    def _drop_below(self) -> None:
        if self._below is None:
            return
        if self.cache is not None:
            self.cache.let_go()
        self._below.drop()
        self._below = None

    def _probe(self, view: View) -> Example:
        """Samples that a schedule's checks look at, the same ones throughout."""
        return view.layout.example(view.fetch(probe_rows(len(view)))).to(model_device(self._model))
