"""When the cache's boundary moves: a move costs a fill, and every epoch until the next move repays a part of it.

The cached boundary may lag behind the frozen one: blocks that are frozen between the two run without gradients. A
schedule that freezes a block an epoch would otherwise rewrite the store every epoch and never read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Costs are measured on one batch, and a move that turns out not to pay was made for nothing: it is made where it is
# predicted to leave at most this share of what staying costs.
_AHEAD = 0.9


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Measured seconds for all samples once. Boundary c is that before block c; 0 is no cache.

    Attributes:
        forward: Of each block, without gradients.
        fetch: Of getting the raw batches: decoding, collating.
        read: Of the rows of each boundary.
        write: Of the rows of each boundary, to the store.
        setup: Of a move, however many samples there are: splitting and verifying.
        fills: Epochs at a new boundary until all of its rows are there: one, or as many as a sample has variants.
    """

    forward: tuple[float, ...]
    fetch: float
    read: tuple[float, ...]
    write: tuple[float, ...]
    setup: float
    fills: int = 1

    def epoch(self, cached: int, frozen: int) -> float:
        """What an epoch spends on frozen blocks and on getting its inputs, when ``cached`` blocks are in the store."""
        inputs = self.fetch if cached == 0 else self.read[cached]
        return inputs + sum(self.forward[cached:frozen])

    def move(self, before: int, after: int, left: int) -> float:
        """What the first epochs at a boundary spend beside that: its rows are made from those before, or filled.

        With variants that is their number of epochs, or those that are ``left``: never less than what a move costs, if
        another one follows before all variants are there.
        """
        if after == 0:
            return 0.0
        inputs = self.read[before] if 0 < before < after else self.fetch
        start = before if before < after else 0
        return self.setup + min(self.fills, left) * (inputs + sum(self.forward[start:after]) + self.write[after])


@dataclass(frozen=True)
class Move:
    """One decision at the beginning of an epoch.

    Attributes:
        epoch: At its beginning.
        frozen: The frozen boundary then; None: nothing is frozen.
        before: The cached boundary until then.
        after: The cached boundary from then on.
        seconds_moving: What is left of the run is predicted to spend on frozen blocks and inputs on the best path.
        seconds_staying: The same without any further move.
    """

    epoch: int
    frozen: str | None
    before: str | None
    after: str | None
    seconds_moving: float
    seconds_staying: float


def best_path(frozen: Sequence[int], costs: Costs, cached: int) -> tuple[list[int], float]:
    """Where to have the cached boundary in each epoch that is left, by dynamic programming.

    Args:
        frozen: Frozen leading blocks at the beginning of each epoch that is left.
        costs: Measured.
        cached: The boundary of the store that is there now; 0: none.

    Returns:
        The cached boundary of each epoch, never deeper than what is frozen, and the seconds they take together. Of
        equal paths the one that moves less.
    """
    places = sorted({0, cached, *frozen})
    # seconds, moves and path of the epochs that follow, for a store at each place
    rest: dict[int, tuple[float, int, tuple[int, ...]]] = dict.fromkeys(places, (0.0, 0, ()))
    for left, count in enumerate(reversed(frozen), 1):
        reached = {
            place: (rest[place][0] + costs.epoch(place, count), rest[place][1], (place, *rest[place][2]))
            for place in places
            if place <= count
        }
        rest = {
            now: min(
                (seconds + (costs.move(now, place, left) if place != now else 0.0), moves + (place != now), path)
                for place, (seconds, moves, path) in reached.items()
            )
            for now in places
        }
    seconds, _, path = rest[cached]
    return list(path), seconds


def worthwhile(frozen: Sequence[int], costs: Costs, cached: int) -> tuple[list[int], float, float]:
    """:func:`best_path` where it is ahead by more than costs are known to, else the path without any further move.

    Returns:
        The cached boundary of each epoch, the seconds that they take, and the seconds without any further move.
    """
    held = staying(frozen, costs, cached)
    path, seconds = best_path(frozen, costs, cached)
    if seconds > _AHEAD * held:
        path, seconds = _kept(frozen, cached), held
    return path, seconds, held


def too_short(frozen: Sequence[int], path: Sequence[int]) -> list[tuple[int, int]]:
    """Stages that end before the best path's boundary has come to where they freeze: a move there would not pay.

    Args:
        frozen: As for :func:`best_path`.
        path: What it gave.

    Returns:
        Frozen leading blocks and epochs of each such stage; the last one, which only the run ends, is not among them.
    """
    stages: list[list[int]] = []
    for epoch, count in enumerate(frozen):
        if not epoch or count != frozen[epoch - 1]:
            stages.append([])
        stages[-1].append(epoch)
    return [
        (frozen[epochs[0]], len(epochs))
        for epochs in stages[:-1]
        if frozen[epochs[0]] and all(path[epoch] < frozen[epoch] for epoch in epochs)
    ]


def staying(frozen: Sequence[int], costs: Costs, cached: int) -> float:
    """Seconds without any further move, but for those that a thaw forces."""
    return sum((costs.epoch(place, count) for place, count in zip(_kept(frozen, cached), frozen, strict=True)), 0.0)


def _kept(frozen: Sequence[int], cached: int) -> list[int]:
    """The cached boundary of each epoch without any further move: a thaw lets it go for good."""
    path = []
    for count in frozen:
        cached = cached if cached <= count else 0
        path.append(cached)
    return path
