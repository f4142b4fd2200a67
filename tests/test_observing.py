"""Schedules that decide by observing are shown what they want to see, at even intervals and without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze.errors import ScheduleError, UsageError
from cachefreeze.isolation import RandomState
from cachefreeze.observing import probe_rows

SAMPLES, BATCH, STEPS = 40, 4, 10


def data():
    generator = torch.Generator().manual_seed(4)
    return TensorDataset(torch.randn(SAMPLES, 6, generator=generator), torch.arange(SAMPLES) % 3)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.1), nn.Tanh()) for _ in range(3)]
        return nn.Sequential(*blocks, nn.Linear(6, 3))


def made(schedule, store="host"):
    model = net()
    engine = cf.Engine(model, store, schedule=schedule, moves="always")
    batches = engine.loader(DataLoader(data(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(1)))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    engine.attach(optimizer)
    return model, engine, batches, optimizer


def train(engine, batches, optimizer, epochs, before=lambda: None):
    for _ in engine.epochs(epochs):
        engine.model.train()
        for x, y in batches:
            optimizer.zero_grad()
            functional.cross_entropy(engine(x), y).backward()
            before()
            optimizer.step()


class Watched(cf.Plasticity):
    """Notes what it is shown, beside what the front block makes of the probe at that moment."""

    def observe(self, clock, ladder, activations, rate=None):
        front = [*ladder.names].index(self.front(ladder))
        twin = copy.deepcopy(self.model).eval()
        with torch.no_grad():
            expected = twin[: front + 1](data().tensors[0][list(probe_rows(SAMPLES))])
        self.shown.append((clock.step, front, torch.equal(activations, expected), rate))
        return super().observe(clock, ladder, activations, rate)


@pytest.mark.parametrize(("checks", "steps"), [(1, [10, 20]), (4, [3, 5, 8, 10, 13, 15, 18, 20]), (10, range(1, 21))])
def test_plasticity_sees_the_front_block_on_the_same_samples_at_even_steps(checks, steps):
    schedule = Watched(checks=checks, start=1.0)
    schedule.shown = []
    schedule.model, engine, batches, optimizer = made(schedule)
    train(engine, batches, optimizer, 2)
    assert schedule.shown == [(step, 0, True, 0.05) for step in steps]


def test_blocks_freeze_and_are_cached_without_a_line_in_the_loop():
    schedule = cf.Plasticity(window=2, patience=1, threshold=1.0, start=0.0, checks=5)
    torch.manual_seed(7)
    model, engine, batches, optimizer = made(schedule)
    reached = []
    train(engine, batches, optimizer, 6, lambda: reached.append(sum(not p.requires_grad for p in model.parameters())))
    assert reached[0] == 0
    assert reached[-1] > 0
    assert reached == sorted(reached)
    assert batches.source in ("fill", "cached")


def test_a_check_leaves_no_trace():
    """Same weights, buffers and random draws as a run whose schedule observes nothing and freezes nothing."""
    ends = []
    for schedule in (cf.Plasticity(start=1.0, checks=10), cf.GradientChange(start=1.0, checks=3), cf.FreezeOut(1.0)):
        schedule = schedule if not isinstance(schedule, cf.FreezeOut) else cf.AllButLast(1, start=1.0)
        torch.manual_seed(7)
        model, engine, batches, optimizer = made(schedule)
        state = RandomState.capture()
        train(engine, batches, optimizer, 2)
        assert state.moved() == ["torch"], "the model's dropout draws, nothing else"
        hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert not hooks
        ends.append(([v.clone() for v in model.state_dict().values()], torch.rand(1)))
    for state, drawn in ends[:-1]:
        assert all(torch.equal(a, b) for a, b in zip(state, ends[-1][0], strict=True))
        assert torch.equal(drawn, ends[-1][1])


@pytest.mark.parametrize("checks", [1, 3])
def test_gradient_change_sees_the_norm_of_the_summed_gradients(checks):
    """Against sums that the loop keeps by itself."""
    schedule = cf.GradientChange(start=1.0, checks=checks)
    seen, sums, expected = [], {}, []
    schedule.observe = lambda clock, ladder, norms: seen.append((clock.step, norms))
    model, engine, batches, optimizer = made(schedule)
    ends = {-(-STEPS * (check + 1) // checks) for check in range(checks)}
    steps = [0]

    def keep():
        for name, parameter in model.named_parameters():
            sums[name] = sums.get(name, 0) + parameter.grad.double()
        steps[0] += 1
        if (steps[0] - 1) % STEPS + 1 in ends:
            norms = [0.0] * 4
            for name, total in sums.items():
                norms[int(name[0])] += float(total.abs().sum())
            expected.append((steps[0], norms))
            sums.clear()

    train(engine, batches, optimizer, 2, keep)
    assert [step for step, _ in seen] == [step for step, _ in expected]
    for (_, found), (_, norms) in zip(seen, expected, strict=True):
        assert found == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda: cf.Plasticity(window=2, patience=1, threshold=1.0, start=0.0, checks=3),
        lambda: cf.GradientChange(60, start=0.0, checks=3),
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(schedule, tmp_path):
    ends = []
    for stops in ([6], [2, 6]):
        for epochs in stops:
            torch.manual_seed(7)
            model, engine, batches, optimizer = made(schedule())
            trainer = cf.Trainer(engine, functional.cross_entropy, optimizer, out=tmp_path / str(len(stops)))
            iterated = engine.epochs
            if epochs != 6:
                # cut off within the run of six, after two epochs
                engine.epochs = lambda total, run=iterated: (e for e, _ in zip(run(6), range(2), strict=False))
            trainer.fit(batches, epochs=6, resume=True)
            engine.close()
        ends.append(([v.clone() for v in model.state_dict().values()], engine.boundary))
    assert ends[0][1] is not None, "something froze"
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))


def test_an_optimizer_has_to_be_attached_or_the_loop_observes():
    engine = cf.Engine(net(), "host", schedule=cf.Plasticity())
    engine.loader(DataLoader(data(), BATCH))
    with pytest.raises(UsageError, match=r"attach.*checks=0"):
        next(engine.epochs(1))
    engine = cf.Engine(net(), "host", schedule=cf.Plasticity(checks=0))
    engine.loader(DataLoader(data(), BATCH))
    assert next(engine.epochs(1)) == 0


class Uncalled(nn.Module):
    """Its first block's weight is used by the model itself."""

    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(functional.linear(x, self.first.weight, self.first.bias))


def test_a_block_that_is_never_called_cannot_be_watched():
    model = Uncalled()
    engine = cf.Engine(model, "host", schedule=cf.Plasticity())
    batches = engine.loader(DataLoader(data(), BATCH))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    with pytest.raises(ScheduleError, match="'first' is not called"):
        train(engine, batches, optimizer, 1)
