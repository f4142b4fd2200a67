"""cf.plan: what it predicts of every boundary, from which arithmetic, and that measuring leaves no trace."""

from __future__ import annotations

import copy
import json
import logging
import time
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import cachefreeze as cf
from cachefreeze import engine as engines
from cachefreeze import optimized
from cachefreeze.errors import RandomSampleError, UsageError
from cachefreeze.freezing import boundary_of
from cachefreeze.isolation import RandomState
from cachefreeze.judging import is_short, judge
from cachefreeze.measuring import Run, Training, first_look, measure, measured_tier
from cachefreeze.measuring.speeds import speed_of
from cachefreeze.moves import Costs, worthwhile
from cachefreeze.planning import _break_even
from cachefreeze.samples import View
from cachefreeze.stores import opening
from cachefreeze.testing.specs import one_field
from cachefreeze.tracing import Example, record_usage


class Sleeps(torch.autograd.Function):
    """The identity, which takes a while in both directions."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


class Slow(nn.Module):
    """A layer whose forward and backward take as long as they are told to, in any mode."""

    def __init__(self, forward, backward):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.seconds = forward, backward

    def forward(self, x):
        return Sleeps.apply(self.norm(x), *self.seconds)


FORWARD, BACKWARD = (0.002, 0.02, 0.01), (0.002, 0.03, 0.015)


def slow_model():
    torch.manual_seed(0)
    return nn.Sequential(
        *(Slow(f, b) for f, b in zip(FORWARD, BACKWARD, strict=True)), nn.Dropout(0.5), nn.Linear(3, 2)
    )


def batches(samples=8, size=4, **options):
    data = TensorDataset(torch.randn(samples, 3, generator=torch.Generator().manual_seed(1)), torch.arange(samples) % 2)
    return DataLoader(data, size, **options)


def traces(model):
    """All that measuring must not touch, copied."""
    return {
        "state": copy.deepcopy(model.state_dict()),
        "modes": [module.training for module in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("train_from", [None, "1"])
def test_planning_leaves_no_trace(train_from):
    model, loader = slow_model(), batches(shuffle=True)
    if train_from is not None:
        cf.freeze(model, train_from)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    fired = []
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: fired.append(p))
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    fired.clear()
    before, state, momentum = traces(model), RandomState.capture(), copy.deepcopy(optimizer.state_dict())
    cf.plan(model, loader)
    assert same(before, traces(model))
    assert state.moved() == []
    assert same(momentum, optimizer.state_dict())
    assert not fired, "an optimizer that steps in the backward would have stepped"


@pytest.mark.usefixtures("slept_time")
def test_a_step_from_each_block_on_is_its_forward_and_backward():
    """One instrumented pass gives the steps from all blocks on: those of a loop that trains from there."""
    model, loader = slow_model(), batches()
    view = View.of(loader, ["input"])
    usage = record_usage(model, view.example())
    names = ["0", "1", "2", "4"]
    found = measure(model, usage, names, [(loader, view)], tiers=[], training=Training())
    for at in range(3):
        expected = sum(FORWARD[at:]) + sum(BACKWARD[at:])
        assert expected <= found.steps[at] + 1e-3
        assert found.steps[at] < expected + 2e-3
    assert found.steps[3] < found.steps[2] - sum(BACKWARD[2:]), "nothing of the blocks before it"
    assert 4 * found.forward[1] == pytest.approx(FORWARD[1], rel=0.5)


class ByBatch(nn.Module):
    """A layer of which whole batches take less time than parts of them: other kernels compute them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        time.sleep(0.1 if len(x) >= 16 else 0.02 * len(x))
        return self.norm(x)


@pytest.mark.usefixtures("slept_time")
def test_whole_batches_are_measured_where_a_run_can_afford_two():
    """A run of 40 batches of 16 samples, of which a share of 1 in 25 would be a part of a batch thrice."""
    model, loader = nn.Sequential(ByBatch(), nn.Linear(3, 2)), batches(samples=80, size=16)
    view = View.of(loader, ["input"])
    usage = record_usage(model, view.example())
    for epochs, each in ((10, 0.1 / 16), (2, 0.02), (None, 0.1 / 16)):
        found = measure(model, usage, ["0", "1"], [(loader, view)], tiers=[], epochs=epochs)
        assert found.forward[0] == pytest.approx(each, rel=0.01)


class Heavy(torch.optim.SGD):
    """A step takes a while, however large the batch was."""

    def step(self, closure=None):
        time.sleep(0.2)


@pytest.mark.usefixtures("slept_time")
def test_of_a_part_of_a_batch_only_what_grows_with_it_is_scaled():
    model, loader = nn.Sequential(Slow(0.5, 0.5), nn.Linear(3, 2)), batches(samples=64, size=64)
    view = View.of(loader, ["input"])
    usage = record_usage(model, view.example())
    training = Training(optimizer=lambda parameters: Heavy(parameters, lr=0.1))
    found = measure(model, usage, ["0", "1"], [(loader, view)], tiers=[], training=training)
    assert found.steps[1] == pytest.approx(0.2, abs=0.01)
    assert found.steps[0] == pytest.approx(64 / 3 * 1.0 + 0.2, rel=0.01), "three samples of 64 were measured"


@pytest.mark.usefixtures("slept_time")
def test_the_table_is_the_arithmetic_of_its_measurement():
    model, loader = slow_model(), batches(samples=40)
    plan = cf.plan(model, loader, epochs=5)
    assert [row.boundary for row in plan.rows] == ["1", "2", "4"]
    one = plan.at("4")
    assert one.tier == "host"
    assert one.bytes_per_sample == 3 * 4 + 8, "the row and the label beside it"
    assert one.nbytes == 40 * one.bytes_per_sample
    assert one.frozen_seconds > 10 * sum(FORWARD), "ten batches, all three slow forwards in each"
    assert one.cached_seconds < 0.2 * one.frozen_seconds
    assert one.fill_seconds > one.frozen_seconds - one.cached_seconds
    assert one.speedup == one.frozen_seconds / one.cached_seconds
    assert one.total_seconds(3) == pytest.approx(one.setup_seconds + one.fill_seconds + 2 * one.cached_seconds)
    assert plan.live_seconds > plan.at("1").frozen_seconds
    assert plan.boundary is None


@pytest.mark.parametrize("copied_seconds", [0.001, 0.004])
def test_what_an_optimized_prefix_would_gain(monkeypatch, copied_seconds):
    """The choice that a fill would make at the advised boundary, and nothing where it would be the exact prefix."""
    timed = optimized._Trial._timed

    def as_told(trial, target, size):
        return 0.004 if target is trial._prefix.parts.prefix else copied_seconds, timed(trial, target, size)[1]

    monkeypatch.setattr(optimized, "_FEWEST_ROWS", 0)
    monkeypatch.setattr(optimized, "_SHORTEST_SECONDS", 0.0)
    monkeypatch.setattr(optimized._Trial, "_timed", as_told)
    model = nn.Sequential(nn.Linear(3, 3), *slow_model().train()).train()
    before, state = traces(model), RandomState.capture()
    plan = cf.plan(model, batches(samples=40), epochs=50)
    assert same(before, traces(model))
    assert state.moved() == []
    found, best = plan.optimized, plan.best
    if copied_seconds == 0.004:
        assert found is None
        assert "optimized" not in plan.advice
        assert json.loads(plan.to_json())["optimized"] is None
        return
    assert found.choice == "1 batch norms folded"
    assert found.gain == 4
    assert 0 < found.error < 1e-3
    saved = best.fill_seconds - found.fill_seconds
    assert 0.75 * 10 * sum(FORWARD) <= saved <= 0.75 * best.frozen_seconds, "of the forwards of ten batches"
    assert "; with prefix='optimized' the fill takes " in str(plan)
    assert json.loads(plan.to_json())["optimized"]["gain"] == 4


@pytest.mark.parametrize(
    ("first", "cached", "frozen", "expected"),
    [(1.0, 0.5, 1.0, 1), (1.5, 0.5, 1.0, 2), (1.6, 0.5, 1.0, 3), (3.0, 0.0, 1.0, 3), (2.0, 1.0, 1.0, None)],
)
def test_break_even_is_the_first_epoch_in_which_the_sum_is_no_more(first, cached, frozen, expected):
    assert _break_even(first, cached, frozen) == expected
    if expected is not None:
        assert first + (expected - 1) * cached <= expected * frozen + 1e-9
        assert expected == 1 or first + (expected - 2) * cached > (expected - 1) * frozen


@pytest.mark.usefixtures("slept_time")
def test_advice_is_for_where_the_model_is_frozen():
    model = slow_model()
    cf.freeze(model, "2")
    plan = cf.plan(model, batches(samples=40), epochs=50)
    assert plan.boundary == "2"
    assert plan.advice.startswith("train_from=2 on host: ")
    assert plan.advice.endswith(f"pays after {plan.at('2').break_even_epochs} epochs")
    text = str(plan)
    assert [line.split()[0] for line in text.splitlines()[2:5]] == ["1", "2", "4"]
    assert text.splitlines()[-1] == plan.advice
    assert json.loads(plan.to_json())["rows"][1]["boundary"] == "2"
    never = replace(plan, epochs=1)
    assert never.best is None
    assert "does not pay at '2' within 1 epochs" in never.advice


class Centres(nn.Module):
    """Its rows depend on the rest of their batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        time.sleep(0.01)
        h = self.layer(x)
        return h - h.mean(dim=0)


@pytest.mark.usefixtures("slept_time")
def test_a_boundary_that_cannot_be_cut_is_shown_with_the_reason():
    model = nn.Sequential(Slow(0.01, 0.0), Centres(), nn.Linear(3, 2))
    plan = cf.plan(model, batches(samples=40), epochs=1000)
    row = plan.at("2")
    assert "batch" in row.reason
    assert (row.bytes_per_sample, row.tier, row.cached_seconds, row.break_even_epochs) == (None, None, None, None)
    assert f"2: {row.reason}" in str(plan)
    assert row.frozen_seconds > 0
    assert plan.best.boundary == "1", "the next best, which can be"
    cf.freeze(model, "2")
    assert f"({plan.at('2').reason})" in cf.plan(model, batches(samples=40), epochs=1000).advice


@pytest.mark.usefixtures("slept_time")
def test_a_boundary_within_a_block_is_among_the_rows():
    model = nn.Sequential(Slow(0.01, 0.0), nn.TransformerEncoderLayer(4, 1, 8, batch_first=True), nn.Linear(4, 2))
    model[0].norm = nn.BatchNorm1d(4)
    data = TensorDataset(torch.randn(8, 4, 4), torch.zeros(8, 4, dtype=torch.int64))
    cf.freeze(model, "1.linear1", example_inputs=torch.randn(2, 4, 4))
    plan = cf.plan(model, DataLoader(data, 4), epochs=1000)
    assert plan.boundary == "1.linear1"
    assert [row.boundary for row in plan.rows] == ["1", "1.linear1", "2"]
    assert 0 < plan.at("1.linear1").forward_removed < 1
    assert plan.best.boundary == "1.linear1"


class Augmented(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.randn(3), index % 2


def test_what_cannot_be_planned():
    with pytest.raises(RandomSampleError):
        cf.plan(slow_model(), DataLoader(Augmented(), 4))
    with pytest.raises(UsageError, match="'tape'"):
        cf.plan(slow_model(), batches(), store="tape")
    with pytest.raises(UsageError, match="has no boundary '7'"):
        cf.plan(slow_model(), batches()).at("7")


class SumOfWords(nn.Module):
    """A classifier of samples of any length."""

    def __init__(self):
        super().__init__()
        self.words, self.layer, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.words(x)).sum(1))


def test_samples_of_different_lengths_are_measured_with_their_labels():
    data = [(torch.arange(1, 2 + i % 7), i % 3) for i in range(40)]
    lengths: list[tuple[int, int]] = []

    def padded(items):
        x, y = zip(*items, strict=True)
        return nn.utils.rnn.pad_sequence(x, batch_first=True), torch.tensor(y)

    def loss_fn(output, target):
        lengths.append((len(output), len(target)))
        return nn.functional.cross_entropy(output, target)

    plan = cf.plan(SumOfWords(), DataLoader(data, 4, collate_fn=padded), store="host", loss_fn=loss_fn)
    assert [row.boundary for row in plan.rows] == ["layer", "head"]
    assert lengths
    assert all(outputs == targets for outputs, targets in lengths)


def test_the_tier_is_the_one_that_fits(monkeypatch, tmp_path):
    monkeypatch.setattr(opening, "free_host_bytes", lambda: 0)
    nowhere = cf.plan(slow_model(), batches())
    assert {row.tier for row in nowhere.rows} == {None}
    assert "store='auto:DIR'" in nowhere.rows[0].reason
    on_disk = cf.plan(slow_model(), batches(), store=f"auto:{tmp_path}")
    assert {row.tier for row in on_disk.rows} == {f"hdf5:{tmp_path}"}
    assert list(tmp_path.iterdir()) == [], "what was written to measure is gone"
    assert measured_tier(f"hdf5:{tmp_path}/one.h5", 1, torch.device("cpu")) == f"hdf5:{tmp_path}"


@pytest.mark.usefixtures("slept_time")
def test_rows_that_auto_would_spread(monkeypatch, tmp_path):
    """Where no tier has room for all rows, and together they have: shown as the store would be made."""
    model, samples = slow_model(), 40
    rows = cf.plan(model, batches(samples=samples), epochs=50).rows
    room = rows[-1].nbytes
    monkeypatch.setattr(opening, "free_host_bytes", lambda: int(room * 0.6 / opening._HOST_SHARE))
    monkeypatch.setattr(opening, "free_disk_bytes", lambda folder: int(room * 0.7 / opening._DISK_SHARE))
    folder = tmp_path / "not" / "made"
    plan = cf.plan(model, batches(samples=samples), epochs=50, store=f"auto:{folder}")
    row = plan.rows[-1]
    assert row.tier == "mixed"
    assert list(row.shares) == ["host", f"hdf5:{folder}"]
    assert sum(row.shares.values()) == 1
    assert list(folder.iterdir()) == [], "what was written to measure is gone"
    assert " host+hdf5 " in str(plan)
    advised = replace(plan, rows=(row,))
    share = row.shares["host"]
    assert f"on host ({share:.0%} of the rows) and hdf5:{folder} ({1 - share:.0%} of the rows)" in advised.advice
    spec = one_field(shape=(row.bytes_per_sample,), rows=samples, dtype=torch.uint8)
    wanted = opening.Wanted(
        spec=spec, fingerprint={}, attributes={}, device=torch.device("cpu"), name="a", boundary="b"
    )
    with closing(opening.open_store(f"auto:{folder}", wanted)) as store:
        assert {tier.tier: tier.spec.rows / samples for tier in store.tiers} == {"host": share, "hdf5": 1 - share}


def test_speeds_are_of_the_store(tmp_path):
    """A byte and a batch cost something in every tier; to write a batch to a file is several system calls more."""

    def fastest(tier):
        """Of several measurements, so that the machine may do something else meanwhile."""
        found = [speed_of.__wrapped__(tier, torch.device("cpu"), 16) for _ in range(3)]
        return min(found, key=lambda speed: speed.write_batch)

    host, disk = fastest("host"), fastest(f"hdf5:{tmp_path}")
    assert host.read_byte > 0
    assert disk.write_byte > 0
    assert host.read_batch > 0
    assert disk.write_batch > host.write_batch


# --- auto ---


def costs(before, *, read=0.0, write=0.0, setup=0.0):
    return Costs(forward=(before, 1.0), fetch=0.0, read=(0.0, read), write=(0.0, write), setup=setup)


def test_auto_declines_by_the_epochs_that_there_are():
    given = costs(1.0, write=3.0)
    assert not judge(given, "b", 0, 4).pays
    assert judge(given, "b", 0, 5).pays
    assert judge(given, "b", 0, None).pays, "unknown: it is ahead in the long run"
    assert not judge(costs(1.0, read=2.0), "b", 0, None).pays, "never ahead"
    assert not judge(None, "b", 0, 1).pays, "one epoch reads nothing again"


def test_what_is_ahead_by_less_than_figures_are_known_to_is_left():
    nearly = costs(1.0, read=0.95)
    assert worthwhile([1] * 100, nearly, 0)[0] == [0] * 100
    assert worthwhile([1] * 100, costs(1.0, read=0.5), 0)[0] == [1] * 100
    path, seconds, held = worthwhile([1, 0, 1], nearly, 1)
    assert path == [1, 0, 0], "a thaw moves it whatever that costs"
    assert seconds == held


def train(model, store, epochs, *, known=False, samples=8):
    engine = cf.Engine(model, store, epochs=epochs if known else None)
    loader, val = engine.loader(batches(samples)), engine.loader(batches())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    torch.manual_seed(3)
    for _ in engine.epochs(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(engine(x), y).backward()
            optimizer.step()
        for x, _y in val:
            engine(x)
    engine.close()
    return engine, loader, val


def frozen_model():
    model = slow_model()
    cf.freeze(model, "4")
    return model


@pytest.mark.usefixtures("slept_time")
@pytest.mark.parametrize("known", [True, False])
def test_a_short_run_is_frozen_without_a_cache(known, caplog):
    """Two epochs do not pay back sixty forwards: said before the split, or when the epochs begin."""
    with caplog.at_level(logging.WARNING, "cachefreeze"):
        engine, loader, val = train(frozen_model(), "auto", 2, known=known)
    assert (loader.source, val.source) == ("frozen", "frozen")
    assert engine.cache is None
    assert engine.parts is None
    reason = "splitting the model takes longer than 2 epochs could save" if known else "2 epochs would spend"
    assert f"store='auto' does not cache at '4': {reason}" in caplog.text
    assert [move.after for move in engine.decisions] == ([None] if known else ["4", None])


class Fetched(Dataset):
    """Samples that take a while to fetch; which ones were."""

    def __init__(self, size, seconds=0.0):
        self.size, self.seconds, self.fetched = size, seconds, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        time.sleep(self.seconds)
        self.fetched.append(index)
        return torch.full((3,), float(index)), index % 2


@pytest.mark.usefixtures("slept_time")
@pytest.mark.parametrize(("epochs", "size", "samples"), [(1, 300, 0), (2, 138, 0), (2, 200, 3)])
def test_a_short_run_is_declined_before_anything_is_probed(epochs, size, samples, monkeypatch):
    """What a look costs is bounded by three samples and one forward of them, which stands for the trace as well.

    Where rows of hardly more samples than a split computes would be read there is no forward.
    """
    computed, data = [], Fetched(size)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    cf.freeze(model, "2")
    model[0].register_forward_hook(lambda _m, given, _o: computed.append(len(given[0])))
    before, state = traces(model), RandomState.capture()
    if samples:
        monkeypatch.setattr(engines, "trace_usage", lambda _: pytest.fail("traced"))
    engine = cf.Engine(model, "auto", epochs=epochs)
    loaders = [engine.loader(DataLoader(data, 4)) for _ in range(2)]
    assert data.fetched == [0, 1, 2]
    assert sum(computed) == samples
    assert [loader.source for loader in loaders] == ["frozen", "frozen"]
    assert [(move.frozen, move.after) for move in engine.decisions] == [("2", None)]
    assert not state.moved()
    assert same(traces(model), before)


@pytest.mark.usefixtures("slept_time")
def test_few_samples_that_take_long_to_decode_are_cached():
    """What no forward is needed for is a decision against the cache: decoding that rows spare is no part of it."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    cf.freeze(model, "2")
    for seconds, source in ((1e-5, "frozen"), (0.1, "fill")):
        data = Fetched(138, seconds)
        loader = cf.Engine(model, "auto", epochs=2).loader(DataLoader(data, 4))
        list(loader)
        assert loader.source == source


class Fused(nn.Module):
    """One kernel for all that is in it: no child is called."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


class Backwards(nn.Module):
    """Registered in another order than used; ``scale`` is its own, and used last but one."""

    def __init__(self, own=False):
        super().__init__()
        self.head, self.body = nn.Linear(3, 2), nn.Sequential(Fused(), Fused(), nn.Linear(3, 3))
        self.scale = nn.Parameter(torch.ones(3)) if own else 1.0

    def forward(self, x):
        return self.head(self.body(x) * self.scale)


@pytest.mark.usefixtures("slept_time")
@pytest.mark.parametrize("train_from", ["body.1", "body.2", "head"])
def test_a_look_shows_the_order_of_use(train_from):
    """As a recording does; but for parameters of a module whose children train in part it is not known when."""

    def look(model):
        before = traces(model)
        found = first_look(model, Example((torch.ones(3, 3),), {}), 0.0).usage
        assert same(traces(model), before)
        return found

    model = Backwards()
    cf.freeze(model, train_from)
    recorded = record_usage(model, Example((torch.ones(3, 3),), {}))
    noted = look(model)
    assert boundary_of(model, noted) == boundary_of(model, recorded) == train_from
    assert sorted(noted.parameters, key=noted.parameters.get) == sorted(
        recorded.parameters, key=recorded.parameters.get
    )
    own = Backwards(own=True)
    own.body.requires_grad_(False)
    assert look(own) is None
    model.head.compile(backend="eager")
    assert look(model) is None, "it would be compiled once more with hooks"


@pytest.mark.usefixtures("slept_time")
def test_rows_spare_what_runs_before_something_trains():
    """Where that is not seen, for parameters of a container or a compiled model, it is all of the forward at most."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.scale = slow_model(), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.blocks(x) * self.scale

    def look(model):
        return first_look(model, Example((torch.ones(3, 3),), {}), 0.0)

    model, scaled = slow_model(), Scaled()
    cf.freeze(model, "2")
    scaled.blocks.requires_grad_(False)
    before = traces(model)
    found = look(model)
    assert found.frozen == pytest.approx(sum(FORWARD[:2]) / 3, rel=0.01)
    assert found.each == pytest.approx(sum(FORWARD) / 3, rel=0.01)
    assert found.forward == pytest.approx(sum(FORWARD), rel=0.01)
    run = Run(samples=400, epochs=2, batch_size=8)
    larger = first_look(model, Example((torch.ones(3, 3),), {}), 0.0, run=run)
    assert larger.frozen == pytest.approx(sum(FORWARD[:2]) / 8, rel=0.01)
    assert larger.setup == pytest.approx(found.setup, rel=0.01)
    short = Run(samples=60, epochs=2, batch_size=8)
    assert (found.shows_short(short), found.shows_short(run)) == (True, False)
    assert first_look(model, Example((torch.ones(3, 3),), {}), 0.0, run=short).each == pytest.approx(found.each)
    scarce = replace(found, frozen=0.0)
    assert (scarce.shows_short(run), scarce.shows_short(replace(run, thawed=True))) == (True, False)
    assert same(traces(model), before)
    for whole in (scaled, nn.Sequential(model, nn.Identity())):
        if whole is not scaled:
            whole[1].compile(backend="eager")
        assert look(whole).frozen == pytest.approx(look(whole).each, rel=0.01)


@pytest.mark.usefixtures("slept_time")
@pytest.mark.parametrize("epochs", [1, 2])
def test_three_samples_tell_nothing_of_others_that_are_longer(epochs):
    """Nor of a detector's lists: what ``auto`` says of a run is for samples of one shape."""

    def padded(items):
        x, y = zip(*items, strict=True)
        return nn.utils.rnn.pad_sequence(x, batch_first=True), torch.tensor(y)

    for spread, short in ((1, True), (3, False)):
        data = [(torch.arange(1, 2 + i % spread), i % 3) for i in range(40)]
        loader = DataLoader(data, 4, collate_fn=padded)
        assert is_short(SumOfWords(), loader, None, None, epochs)[0] is short


@pytest.mark.usefixtures("slept_time")
def test_a_long_run_is_cached_and_computes_the_same():
    """320 slow forwards are worth the sixty or so of a split, and those of a fill."""

    def model():
        torch.manual_seed(0)
        made = nn.Sequential(Slow(0.005, 0.0), nn.Linear(3, 2))
        cf.freeze(made, "1")
        return made

    models = model(), model()
    (engine, loader, val), (_, plain, _) = (
        train(made, store, 20, known=True, samples=64) for made, store in zip(models, ("auto", "off"), strict=True)
    )
    assert same(dict(models[0].state_dict()), dict(models[1].state_dict()))
    assert (loader.source, val.source, plain.source) == ("cached", "cached", "frozen")
    assert [move.after for move in engine.decisions] == ["1"]
    assert engine.decisions[0].seconds_moving < engine.decisions[0].seconds_staying


def test_declining_changes_no_weight():
    models = [frozen_model(), frozen_model(), frozen_model()]
    for model, store in zip(models, ("auto", "off", "host"), strict=True):
        train(model, store, 2)
    expected = models[1].state_dict()
    for model in models:
        assert same(dict(model.state_dict()), dict(expected))


@pytest.mark.gpu
def test_a_plan_on_cuda(tmp_path):
    """The same table on a GPU: rows lie on the device, and its memory is among what is free."""
    model = nn.Sequential(nn.Linear(3, 64), nn.Linear(64, 64), nn.Linear(64, 2)).cuda()
    plan = cf.plan(model, batches(samples=256, size=64), store=f"auto:{tmp_path}")
    assert {row.tier for row in plan.rows} == {"device"}
    assert plan.free_bytes.keys() == {"device", "host", "disk"}
    assert all(row.cached_seconds > 0 for row in plan.rows)
