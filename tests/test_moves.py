"""When the cached boundary moves: the best path by exhaustive search, and an engine that follows it."""

from __future__ import annotations

import itertools
import random
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze import following, manager
from cachefreeze.following import Following
from cachefreeze.measuring import listed_blocks, look_at, measure
from cachefreeze.moves import Costs, best_path, staying, too_short, worthwhile
from cachefreeze.samples import View
from cachefreeze.schedules import Ladder
from cachefreeze.tracing import record_usage


def costs(forward, *, fetch=0.0, read=0.0, write=0.0, setup=0.0):
    count = len(forward)
    return Costs(forward=tuple(forward), fetch=fetch, read=(read,) * count, write=(write,) * count, setup=setup)


def spent(path, frozen, given, cached):
    """Seconds of a path, epoch by epoch, from the words of the promise."""
    total, now = 0.0, cached
    for place, count in zip(path, frozen, strict=True):
        if place not in (now, 0):
            promoted = 0 < now < place
            total += given.setup + given.write[place] + (given.read[now] if promoted else given.fetch)
            total += sum(given.forward[now if promoted else 0 : place])
        total += given.read[place] if place else given.fetch
        total += sum(given.forward[place:count])
        now = place
    return total


@pytest.mark.parametrize("seed", range(40))
def test_the_path_is_the_best_of_all(seed):
    draw = random.Random(seed)
    blocks, epochs = draw.randint(2, 5), draw.randint(1, 5)
    given = Costs(
        forward=tuple(draw.random() for _ in range(blocks)),
        fetch=draw.random(),
        read=tuple(0.3 * draw.random() for _ in range(blocks)),
        write=tuple(draw.random() for _ in range(blocks)),
        setup=draw.random(),
    )
    frozen = [draw.randint(0, blocks - 1) for _ in range(epochs)]
    cached = draw.randint(0, blocks - 1)
    path, seconds = best_path(frozen, given, cached)
    assert all(place <= count for place, count in zip(path, frozen, strict=True)), "no row of a block that trains"
    assert seconds == pytest.approx(spent(path, frozen, given, cached))
    every = itertools.product(*(range(count + 1) for count in frozen))
    possible = [p for p in every if set(p) <= {0, cached, *frozen}]
    assert seconds == pytest.approx(min(spent(p, frozen, given, cached) for p in possible))
    assert seconds <= staying(frozen, given, cached) + 1e-12


def test_a_move_that_does_not_pay_is_not_made():
    given = costs([1, 1, 1], write=0.5, setup=10)
    assert best_path([2, 2, 2], given, 0)[0] == [0, 0, 0]
    assert best_path([2] * 30, given, 0)[0] == [2] * 30
    free = costs([0, 0, 0])
    assert best_path([2, 2], free, 0)[0] == [0, 0], "nothing to gain: no move"


def test_the_boundary_lags_behind_a_schedule_that_freezes_a_block_an_epoch():
    frozen = [*range(1, 9), 8, 8, 8, 8]
    path, _ = best_path(frozen, costs([1] * 9, write=1, setup=1), 0)
    moves = [a for a, b in itertools.pairwise([0, *path]) if a != b]
    assert 1 <= len(moves) < 8
    assert all(place <= count for place, count in zip(path, frozen, strict=True))


def test_a_thaw_takes_the_boundary_back():
    path, _ = best_path([3, 3, 3, 1, 1, 1], costs([1] * 4, read=0.01), 3)
    assert path == [3, 3, 3, 1, 1, 1]


def test_stages_that_end_before_a_move_pays_are_found():
    """Two epochs of a stage do not repay ten seconds of a move, forty do; the last stage is the run's to end."""
    given = costs([1] * 4, setup=10)
    frozen = [0, 1, 1, *[2] * 40, 3, 3]
    path, _ = best_path(frozen, given, 0)
    assert path[1:3] == [0, 0]
    assert path[3] == 2
    assert too_short(frozen, path) == [(1, 2)]
    paid = [1] * 40 + [2]
    assert too_short(paid, best_path(paid, given, 0)[0]) == []


@pytest.mark.usefixtures("slept_time")
def test_a_stage_too_short_to_pay_is_a_warning(caplog):
    engine = cf.Engine(
        slow_model(), "host", schedule=cf.Stages([{"train_from": "1", "epochs": 1}, {"train_from": "2"}])
    )
    loader = engine.loader(batches())
    for _ in engine.epochs(60):
        list(loader)
    found = [record.getMessage() for record in caplog.records if "too short to pay" in record.getMessage()]
    assert len(found) == 1
    assert "trains from '1' lasts 1 epoch(s)" in found[0]


# --- measured, and followed ---


class Slow(nn.Module):
    """A layer that takes as long as it is told to, in eval mode and in train mode."""

    def __init__(self, seconds):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x * self.weight


def slow_model():
    torch.manual_seed(0)
    return nn.Sequential(Slow(0.0), Slow(0.02), Slow(0.001), nn.Linear(3, 2))


def batches():
    data = TensorDataset(torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 2)
    return DataLoader(data, 4)


@pytest.mark.usefixtures("slept_time")
def test_costs_are_those_of_the_blocks_and_measuring_leaves_no_trace():
    model, loader = slow_model(), batches()
    model.train()
    torch.manual_seed(5)
    view = View.of(loader, ["input"])
    usage = record_usage(model, view.example())
    names = Ladder.of_usage(model, usage).names
    found = measure(model, usage, names, [(loader, view)], tiers=["host"]).costs("host")
    # two batches of four: each block's sleep twice
    assert 0.04 <= found.forward[1] < 0.041
    assert found.forward[1] > 5 * found.forward[0]
    assert found.forward[1] > 5 * found.forward[3]
    assert found.setup > 0
    assert len(found.forward) == len(found.read) == len(found.write) == 4
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(5)))


def test_a_run_that_is_evidently_too_short_is_not_measured(monkeypatch):
    """Three samples show it: blocks are neither listed nor timed, and nothing is cached."""
    computed = []
    for name in ("measure", "listed_blocks"):
        monkeypatch.setattr(following, name, lambda *_, **__: pytest.fail("measured"))
    engine = cf.Engine(slow_model(), "host", schedule=cf.Stages(EACH_EPOCH))
    loader = engine.loader(batches())
    engine.model[1].register_forward_hook(lambda _m, given, _o: computed.append(len(given[0])))
    for epoch in engine.epochs(4):
        assert sum(computed) == (3 if epoch else 0), "a look, once something is frozen"
        list(loader)
    assert loader.source == "frozen"
    assert [(move.frozen, move.after) for move in engine.decisions] == [("1", None)]


@pytest.mark.usefixtures("slept_time")
def test_blocks_are_listed_only_where_the_cache_would_move(monkeypatch):
    listed = []
    monkeypatch.setattr(following, "listed_blocks", lambda *given: listed.append(1) or listed_blocks(*given))
    for epochs, expected in ((30, 0), (400, 1)):
        model = nn.Sequential(Slow(0.004), Slow(0.02), nn.Linear(3, 2))
        engine = cf.Engine(model, "host", schedule=cf.Stages([{"epochs": 1}, {"train_from": "1"}]))
        loader = engine.loader(batches())
        for _ in engine.epochs(epochs):
            list(loader)
        assert (len(listed), loader.source) == (expected, "cached" if expected else "frozen")


def follow(given, monkeypatch, *, epochs, schedule, store="host"):
    """Cached boundary of every epoch, and the engine, with costs that are given rather than measured."""
    monkeypatch.setattr(Following, "_measured", lambda *_: given)
    engine = cf.Engine(slow_model(), store, schedule=schedule)
    loader = engine.loader(batches())
    seen = []
    for _ in engine.epochs(epochs):
        for x, _y in loader:
            engine(x)
        seen.append((None if engine.parts is None else engine.parts.boundary.name, engine.boundary, loader.source))
    return seen, engine


EACH_EPOCH = [{"epochs": 1}, {"train_from": "1", "epochs": 1}, {"train_from": "2", "epochs": 1}, {"train_from": "3"}]


def test_the_engine_caches_where_the_path_says_and_keeps_the_figures(monkeypatch):
    """Blocks freeze an epoch apart; the store is written once, where it is read for long."""
    given = costs([1, 1, 1, 1], fetch=0.1, write=5)
    seen, engine = follow(given, monkeypatch, epochs=8, schedule=cf.Stages(EACH_EPOCH))
    assert [frozen for _, frozen, _ in seen] == [None, "1", "2", "3", "3", "3", "3", "3"]
    assert seen[0] == (None, None, "live")
    assert seen[1][2] == "frozen", "declined: there is one epoch to read it in"
    assert [cached for cached, _, _ in seen][3:] == ["3"] * 5
    assert [source for _, _, source in seen][3:] == ["fill"] + ["cached"] * 4
    first = engine.decisions[0]
    assert (first.epoch, first.frozen, first.before, first.after) == (1, "1", None, None)
    assert first.seconds_moving < first.seconds_staying


def test_the_engine_declines_where_caching_does_not_pay(monkeypatch):
    given = costs([1, 1, 1, 1], write=1000)
    seen, engine = follow(given, monkeypatch, epochs=5, schedule=cf.Stages(EACH_EPOCH))
    assert [(cached, source) for cached, _, source in seen] == [(None, "live")] + [(None, "frozen")] * 4
    assert all(decision.after is None for decision in engine.decisions)


def test_the_cached_boundary_may_lag_behind_the_frozen_one(monkeypatch):
    """A store that is there is read on, and what is frozen behind it runs, where the next move is too dear."""
    given = Costs(forward=(9, 0.01, 0.01, 1), fetch=0, read=(0,) * 4, write=(0, 1, 50, 50), setup=0)
    seen, _ = follow(given, monkeypatch, epochs=6, schedule=cf.Stages(EACH_EPOCH))
    assert [cached for cached, _, _ in seen] == [None, "1", "1", "1", "1", "1"]
    assert seen[-1][1:] == ("3", "cached")


def test_what_a_move_took_decides_about_the_next_one(monkeypatch):
    """Splitting was predicted to take longer than the blocks behind the first one could ever save."""
    given = costs([100, 1, 1, 1], setup=1000)
    monkeypatch.setattr(manager, "recorded", lambda *_: pytest.fail("the schedule knows the order of use"))
    seen, engine = follow(given, monkeypatch, epochs=60, schedule=cf.Stages(EACH_EPOCH))
    assert seen[1][0] == "1"
    assert seen[-1][0] == "3"
    assert [decision.epoch for decision in engine.decisions][:2] == [1, 2]


@pytest.mark.usefixtures("slept_time")
def test_a_first_move_is_decided_as_if_it_took_twice_as_long(monkeypatch):
    looks, setups = [], []
    monkeypatch.setattr(following, "look_at", lambda *given: looks.append(look_at(*given)) or looks[-1])
    monkeypatch.setattr(
        following,
        "worthwhile",
        lambda upcoming, given, now: setups.append(given.setup) or worthwhile(upcoming, given, now),
    )
    engine = cf.Engine(slow_model(), "host", schedule=cf.AllButLast(1, start=0.05))
    loader = engine.loader(batches())
    for _ in engine.epochs(80):
        list(loader)
    assert loader.source == "cached"
    assert setups[:2] == [2 * looks[0].setup] * 2, "before blocks are listed, and after"


@pytest.mark.usefixtures("slept_time")
def test_measured_moves_are_real():
    """Unpatched: forty epochs of a slow prefix are worth a store, and the run without one computes the same."""

    def run(store, model):
        engine = cf.Engine(model, store, schedule=cf.AllButLast(1, start=0.05))
        loader = engine.loader(batches())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in engine.epochs(40):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(engine(x), y).backward()
                optimizer.step()
        return loader.source, [value.clone() for value in model.state_dict().values()]

    (source, got), (plain, expected) = run("auto", slow_model()), run("off", slow_model())
    assert (source, plain) == ("cached", "frozen")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
