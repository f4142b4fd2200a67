"""A schedule put into effect: parameters freeze on the step, learning rates per block, an optimizer never rebuilt."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze.errors import CacheFreezeError, CheckpointError, LoaderError, ScheduleError, UsageError
from cachefreeze.schedules import Clock

STEPS, EPOCHS = 5, 4


class Scale(nn.Module):
    """Rounds alike in every batch, which a small matrix product does not."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x * self.weight + self.bias


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(Scale(6), nn.BatchNorm1d(6), nn.ReLU())
        self.b = nn.Sequential(Scale(6), nn.BatchNorm1d(6), nn.Dropout(0.2))
        self.c = nn.Sequential(Scale(6), nn.ReLU())
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x))))


def data(count=20):
    generator = torch.Generator().manual_seed(4)
    return TensorDataset(torch.randn(count, 6, generator=generator), torch.arange(count) % 3)


def loader(shuffle=True, **options):
    return DataLoader(data(), 4, shuffle=shuffle, generator=torch.Generator().manual_seed(1), **options)


def net():
    torch.manual_seed(0)
    return Net()


def made(schedule, store="off", model=None):
    model = net() if model is None else model
    engine = cf.Engine(model, store, schedule=schedule, moves="always")
    return model, engine, engine.loader(loader())


def step(engine, optimizer, x, y):
    optimizer.zero_grad()
    functional.cross_entropy(engine(x), y).backward()
    optimizer.step()


def train(engine, batches, optimizer, epochs=EPOCHS, each=lambda: None):
    for _ in engine.epochs(epochs):
        engine.model.train()
        for x, y in batches:
            step(engine, optimizer, x, y)
            each()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adam-tensor-lr": lambda p: torch.optim.Adam(p, torch.tensor(0.01), foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
}


# --- learning rates ---


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_block_steps_with_its_factor_as_separate_groups_would(kind):
    """Against a plain optimizer whose four groups are given lr x factor by hand before every step."""
    schedule = cf.FreezeOut(0.7)
    model, engine, batches = made(schedule)
    other = copy.deepcopy(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    engine.attach(optimizer)
    by_hand = OPTIMIZERS[kind]([{"params": child.parameters()} for child in other.children()])
    rate = by_hand.param_groups[0]["lr"]
    done = 0
    for _ in engine.epochs(EPOCHS):
        model.train()
        for x, y in batches:
            other.train()
            decided = schedule.at(Clock(step=done, steps=STEPS * EPOCHS, epochs=EPOCHS), engine.ladder)
            for at, (child, group) in enumerate(zip(other.children(), by_hand.param_groups, strict=True)):
                if at < decided.frozen:
                    child.eval().requires_grad_(False)
                group["lr"] = rate * decided.factors[at]
            state = torch.get_rng_state()
            step(engine, optimizer, x, y)
            torch.set_rng_state(state)
            by_hand.zero_grad()
            functional.cross_entropy(other(x), y).backward()
            by_hand.step()
            done += 1
            assert {float(group["lr"]) for group in optimizer.param_groups} == {float(rate)}, "between steps"
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, EPOCHS),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=EPOCHS + 1),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_any_scheduler_on_top_moves_the_users_rate_only(kind):
    """Its course is the one that it has without any schedule of ours; nothing compounds."""
    _, engine, batches = made(cf.FreezeOut(0.7))
    optimizer = torch.optim.SGD(engine.model.parameters(), 0.1, momentum=0.9)
    engine.attach(optimizer)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
    ours, theirs = SCHEDULERS[kind](optimizer), SCHEDULERS[kind](plain)
    argument = (1.0,) if kind == "plateau" else ()
    for _ in engine.epochs(EPOCHS):
        for x, y in batches:
            step(engine, optimizer, x, y)
        plain.step()
        ours.step(*argument)
        theirs.step(*argument)
        assert {group["lr"] for group in optimizer.param_groups} == {plain.param_groups[0]["lr"]}


def test_groups_of_the_user_keep_their_settings_and_the_order_of_their_parameters():
    model, engine, _ = made(cf.FreezeOut())
    decay = [p for n, p in model.named_parameters() if n.endswith("weight")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("weight")]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.3}, {"params": rest, "lr": 0.5}], 0.01, weight_decay=0
    )
    engine.attach(optimizer)
    found = [(g["block"], g["weight_decay"], g["lr"], len(g["params"])) for g in optimizer.param_groups]
    blocks = ["a", "b", "c", "fc"]
    assert found == [(b, 0.3, 0.01, n) for b, n in zip(blocks, (2, 2, 1, 1), strict=True)] + [
        (b, 0, 0.5, n) for b, n in zip(blocks, (2, 2, 1, 1), strict=True)
    ]
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in (*decay, *rest)]
    named = torch.optim.SGD(engine.model.named_parameters(), 0.1)
    from cachefreeze.rates import BlockRates, parameter_blocks
    from cachefreeze.tracing import usage_of

    BlockRates(named, parameter_blocks(model, engine.ladder, usage_of(model)), engine.ladder.names)
    names = [(g["block"], name.split(".")[0]) for g in named.param_groups for name in g["param_names"]]
    assert all(block == name for block, name in names)


def test_momentum_survives_and_what_is_frozen_leaves_the_step():
    """Not a bit of a frozen block moves, its momentum is kept, the others' goes on, and no gradient is computed."""
    model, engine, batches = made(cf.Stages([{"epochs": 2}, {"train_from": "b"}]))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    engine.attach(optimizer)
    kept = {}
    for epoch in engine.epochs(EPOCHS):
        model.train()
        if epoch == 2:
            kept = {n: (p.clone(), optimizer.state[p]["momentum_buffer"].clone()) for n, p in model.named_parameters()}
            buffers = {n: b.clone() for n, b in model.a.named_buffers()}
        for x, y in batches:
            step(engine, optimizer, x, y)
            if epoch >= 2:
                assert all(p.grad is None and not p.requires_grad for p in model.a.parameters())
    for name, p in model.named_parameters():
        same = torch.equal(p, kept[name][0]), torch.equal(optimizer.state[p]["momentum_buffer"], kept[name][1])
        assert same == ((True, True) if name.startswith("a.") else (False, False))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.a.named_buffers())


def test_parameters_freeze_on_the_step_within_an_epoch():
    model, engine, batches = made(cf.FreezeOut(0.5, "linear"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    seen = []
    train(engine, batches, optimizer, each=lambda: seen.append(sum(not p.requires_grad for p in model.parameters())))
    # r = 1/2, 2/3, 5/6 of 20 steps: 10, which is an epoch's first, 14, 17; step 13 is followed by 14, step 16 by 17
    assert seen == [0] * 10 + [4] * 3 + [8] * 3 + [10] * 4
    assert not model.a.training
    assert model.fc.training


def test_state_of_an_attached_optimizer_round_trips(tmp_path):
    def prepared():
        model, engine, batches = made(cf.FreezeOut(0.7))
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        engine.attach(optimizer)
        return engine, batches, optimizer

    engine, batches, optimizer = prepared()
    train(engine, batches, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    _, _, again = prepared()
    again.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    for (_, a), (_, b) in zip(optimizer.state.items(), again.state.items(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert [g["block"] for g in again.param_groups] == ["a", "b", "c", "fc"]


def test_attach_refuses_what_would_go_wrong_later():
    model, engine, _ = made(cf.FreezeOut())
    scheduled = torch.optim.SGD(model.parameters(), 0.1)
    torch.optim.lr_scheduler.StepLR(scheduled, 1)
    with pytest.raises(UsageError, match="first, then make the scheduler"):
        engine.attach(scheduled)
    with pytest.raises(UsageError, match="LBFGS"):
        engine.attach(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(UsageError, match=r"lacks a\.0\.weight"):
        engine.attach(torch.optim.SGD(model.fc.parameters(), 0.1))
    with pytest.raises(UsageError, match="1 parameters that are not"):
        engine.attach(torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(1))], 0.1))
    with pytest.raises(UsageError, match="make the loaders first"):
        cf.Engine(model, schedule=cf.FreezeOut()).attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(UsageError, match="no schedule"):
        cf.Engine(model).attach(torch.optim.SGD(model.parameters(), 0.1))
    good = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(good)
    with pytest.raises(UsageError, match="an optimizer already"):
        engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(UsageError, match="steps outside"):
        good.step()


def test_groups_changed_after_attach_are_refused():
    model, engine, batches = made(cf.FreezeOut())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(CheckpointError, match="add groups before"):
        train(engine, batches, optimizer)


def test_a_step_that_raises_leaves_the_users_rates():
    model, engine, batches = made(cf.FreezeOut())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)

    def broken():
        raise RuntimeError("out of memory")

    for _ in engine.epochs(1):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(broken)
        for x, y in batches:
            step(engine, optimizer, x, y)
            assert {group["lr"] for group in optimizer.param_groups} == {0.1}


# --- the clock ---


def test_zero_rates_of_a_scheduler_freeze():
    model, engine, batches = made(cf.FreezeAtZeroLR())
    optimizer = torch.optim.SGD([{"params": c.parameters()} for c in model.children()], 0.1)
    engine.attach(optimizer)
    ends = (1, 2, 2, 9)
    torch_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda e, end=end: float(e < end) for end in ends])
    frozen = []
    for _ in engine.epochs(EPOCHS):
        for x, y in batches:
            step(engine, optimizer, x, y)
        torch_scheduler.step()
        frozen.append([not next(c.parameters()).requires_grad for c in model.children()])
    assert [sum(f) for f in frozen] == [0, 1, 3, 3]
    assert not frozen[-1][3]


def test_thawing_waits_for_the_next_epoch():
    model, engine, batches = made(cf.GradualUnfreezing(0.5), store="host")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    seen = []
    for _ in engine.epochs(3):
        for at, (x, y) in enumerate(batches):
            step(engine, optimizer, x, y)
            if at in (0, STEPS - 1):
                seen.append((engine.boundary, [next(c.parameters()).requires_grad for c in model.children()]))
                assert [c.training for c in model.children()] == seen[-1][1], "and back to train mode with it"
        model.train()
    last, two, every = ("fc", [False] * 3 + [True]), ("b", [False] + [True] * 3), (None, [True] * 4)
    assert seen == [last, last, two, two, every, every]


@pytest.mark.parametrize("workers", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_the_order_of_samples_is_kept_when_live_batches_give_way_to_rows(workers):
    """Persistent workers draw in their first pass only, and that one was live."""

    def run(store):
        torch.manual_seed(7)
        model = net()
        engine = cf.Engine(model, store, schedule=cf.AllButLast(1, start=0.5), moves="always")
        indexed = TensorDataset(*data().tensors, torch.arange(20))
        batches = engine.loader(DataLoader(indexed, 4, shuffle=True, **workers))
        seen = [index.tolist() for _ in engine.epochs(4) for _, _, index in batches]
        return seen, torch.rand(3).tolist(), batches.source

    (order, drawn, source), (expected, expected_drawn, plain) = run("host"), run("off")
    assert (source, plain) == ("cached", "frozen")
    assert order == expected
    assert drawn == expected_drawn


def test_without_attach_decisions_wait_for_the_next_epoch_and_rates_cannot_be_driven():
    model, engine, batches = made(cf.FreezeOut(0.5, "linear", anneal=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    frozen = []
    train(engine, batches, optimizer, each=lambda: frozen.append(sum(not p.requires_grad for p in model.parameters())))
    assert frozen == [0] * 10 + [4] * 5 + [8] * 5, "7.5 and 10 of 20 steps are decided at 10, 15 at 15"
    _, engine, _ = made(cf.FreezeOut())
    with pytest.raises(UsageError, match="drives learning rates"):
        next(engine.epochs(2))


def test_accumulated_gradients_need_their_own_count():
    def run(**options):
        model, engine, batches = made(cf.FreezeOut(0.5, "linear"))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        engine.attach(optimizer)
        for _ in engine.epochs(EPOCHS, **options):
            for at, (x, y) in enumerate(batches):
                functional.cross_entropy(engine(x), y).backward()
                if at in (2, 4):
                    optimizer.step()
                    optimizer.zero_grad()
        return engine

    with pytest.warns(UserWarning, match="steps_per_epoch=2"):
        run()
    assert run(steps_per_epoch=2).clock.steps == 8


def test_a_schedule_that_the_run_cannot_follow_is_refused_before_the_first_step():
    _, engine, _ = made(cf.Stages([{"epochs": 2}, {"train_from": "nowhere"}]))
    with pytest.raises(ScheduleError, match="'nowhere' is no block"):
        next(engine.epochs(4))
    _, engine, _ = made(cf.Stages([{"epochs": 4}, {"train_from": "fc"}]))
    with pytest.raises(ScheduleError, match="never reached"):
        next(engine.epochs(4))


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.fc = nn.Linear(6, 6, bias=False)
        self.fc.weight = self.first.weight

    def forward(self, x):
        return self.fc(self.c(self.first(x)))


def test_a_tied_classifier_that_would_freeze_with_the_embedding_is_refused_at_once():
    torch.manual_seed(0)
    _, engine, _ = made(cf.FreezeOut(anneal=False), model=Tied())
    with pytest.raises(ScheduleError, match="tied to earlier blocks"):
        next(engine.epochs(2))
    _, engine, _ = made(cf.Stages([{"epochs": 1}, {"train_from": "c"}]), model=Tied())
    assert len(list(engine.epochs(2))) == 2


def test_wrong_use_is_named():
    model = net()
    with pytest.raises(UsageError, match="expected a schedule"):
        cf.Engine(model, schedule="freezeout")
    with pytest.raises(UsageError, match="a store for every boundary"):
        cf.Engine(model, "hdf5:one.h5", schedule=cf.FreezeOut())
    engine = cf.Engine(model, schedule=cf.AllButLast(1))
    with pytest.raises(UsageError, match="make the loaders first"):
        next(engine.epochs(1))
    batches = engine.loader(loader())
    with pytest.raises(LoaderError, match="inside `for epoch"):
        next(iter(batches))
    with pytest.raises(UsageError, match="begins with the first epoch"):
        _ = engine.clock
    cf.freeze(model, "b")
    with pytest.raises(UsageError, match="froze some already"):
        cf.Engine(model, schedule=cf.AllButLast(1))


@pytest.mark.parametrize("last", range(EPOCHS - 1))
@pytest.mark.parametrize("schedule", [cf.FreezeOut(0.3), cf.Stages([{"epochs": 1}, {"train_from": "b"}])])
def test_a_loop_of_ones_own_resumes_from_a_state_saved_at_an_epochs_end(schedule, last, tmp_path):
    """Saved inside the loop, where a script saves: the next run goes on with the epoch after."""
    saved, store = {}, f"hdf5:{tmp_path}"

    def run(state=None, until=EPOCHS, store="host"):
        model, engine, batches = made(schedule, store)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        engine.attach(optimizer)
        parts = {"model": model, "optimizer": optimizer, "engine": engine}
        torch.manual_seed(2)
        if state is not None:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["random"])
            batches.dataloader.generator.set_state(state["order"])
        for epoch in engine.epochs(EPOCHS):
            model.train()
            for x, y in batches:
                step(engine, optimizer, x, y)
            if epoch == until:
                saved.update({name: copy.deepcopy(part.state_dict()) for name, part in parts.items()})
                saved.update(random=torch.get_rng_state(), order=batches.dataloader.generator.get_state())
                break
        engine.close()
        return model.state_dict()

    wanted = run()
    run(until=last, store=store)
    got = run(saved, store=store)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("schedule", [None, cf.FreezeOut(0.3)])
def test_a_state_saved_before_an_epoch_trains_is_of_its_beginning(schedule):
    """Also after a validation pass; from the first training step on it is of the epoch's end."""
    model, engine, batches = made(schedule or cf.FreezeOut(0.3), "host")
    if schedule is None:
        engine = cf.Engine(model, "off")
        batches = engine.loader(batches.dataloader)
    else:
        engine.attach(OPTIMIZERS["adamw"](model.parameters()))
    for epoch in engine.epochs(2):
        assert engine.state_dict()["epoch"] == epoch
        with torch.no_grad():
            for x, _ in batches:
                engine(x)
        assert engine.state_dict()["epoch"] == epoch
        engine(next(iter(batches))[0])
        assert engine.state_dict()["epoch"] == epoch + 1
    assert engine.state_dict()["epoch"] == 2


def test_a_state_of_another_length_or_schedule_is_refused():
    def at(schedule):
        return made(schedule)[1]

    engine = at(cf.AllButLast(1, start=0.5))
    list(engine.epochs(4))
    state = engine.state_dict()
    other = at(cf.AllButLast(1, start=0.5))
    other.load_state_dict({**state, "epoch": 2})
    with pytest.raises(CheckpointError, match="same length"):
        next(other.epochs(8))
    with pytest.raises(ScheduleError, match="same schedule"):
        at(cf.AllButLast(2)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="with a schedule"):
        cf.Engine(net()).load_state_dict(state)
    with pytest.raises(CheckpointError, match="with a schedule"):
        at(cf.AllButLast(1)).load_state_dict({"epoch": 1})
    assert issubclass(ScheduleError, CacheFreezeError)


def test_random_augmentation_is_refused_before_training_under_a_schedule_too():
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.rand(1), y

    model = net()
    noisy = DataLoader(Noisy(*data().tensors), 4)
    engine = cf.Engine(model, "host", schedule=cf.AllButLast(1, start=0.5), moves="always")
    with pytest.raises(cf.CacheFreezeError, match="view="):
        engine.loader(noisy)
    batches = engine.loader(noisy, view=data())
    raw = data().tensors[0][:4]
    seen = []
    for _ in engine.epochs(4):
        for x, _y in batches:
            seen.append(isinstance(x, cf.Rows))
            if len(seen) == 1:
                assert not torch.equal(x, raw), "live epochs see the augmented samples"
            if len(seen) == 11:
                with torch.no_grad():
                    assert torch.equal(engine(x), model.eval()(raw)), "and cached ones the view"
    assert seen == [False] * 10 + [True] * 10


def test_the_model_is_left_with_its_random_states():
    _, engine, _ = made(cf.FreezeOut(anneal=False), store="host")
    torch.manual_seed(3)
    for _ in engine.epochs(2):
        pass
    expected = torch.Generator().manual_seed(3)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected)), "a move of the boundary draws nothing"
