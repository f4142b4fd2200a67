"""One update of all heads trains each as its own group of the optimizer would."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler

from cachefreeze.errors import CheckpointError, UsageError
from tests.test_compiled import StandIn
from tests.test_heads import BATCH, RATES, TOLERANCE, loaded, made

EPOCHS = 3


def groups_of(heads, split=False):
    """A group for each head; or two, of which the biases have no weight decay."""
    groups = []
    for i, rate in enumerate(RATES):
        named = heads.named_parameters(i)
        if split:
            groups.append({"params": [named[name] for name in named if "bias" in name], "lr": rate, "weight_decay": 0})
            groups.append({"params": [named[name] for name in named if "bias" not in name], "lr": rate})
        else:
            groups.append({"params": list(named.values()), "lr": rate})
    return groups


def trained(kind, make, schedule=None, attach=True, split=False, clip=False, accumulate=1, late=False, resume=None):
    """Heads' losses and weights; ``resume`` says what happens to the optimizer after the second epoch."""
    engine, batches = loaded(made(kind))
    heads = engine.heads(len(RATES))
    optimizer = make(groups_of(heads, split))
    if attach and not late:
        heads.attach(optimizer)
    scheduler = schedule(optimizer) if schedule else None
    if attach and late:
        heads.attach(optimizer)
    losses = []
    torch.manual_seed(3)
    for epoch in range(EPOCHS):
        engine.model.train()
        if epoch == 2 and resume:
            optimizer = resume(heads, optimizer)
        for at, (x, y) in enumerate(batches):
            if at % accumulate == 0:
                optimizer.zero_grad()
            losses.append(heads.losses(functional.cross_entropy, x, y))
            losses[-1].sum().backward()
            if clip:
                for i in range(len(heads)):
                    nn.utils.clip_grad_norm_(heads.parameters(i), 0.05)
            if at % accumulate == accumulate - 1:
                optimizer.step()
        if scheduler:
            scheduler.step()
    return torch.stack(losses).detach(), heads


def assert_equal(one, other):
    (losses, heads), (wanted, alone) = one, other
    assert torch.allclose(losses, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    for i in range(len(heads)):
        pairs = zip(heads.parameters(i), alone.parameters(i), strict=True)
        assert all(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE) for a, b in pairs)


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups),
    "momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd, fused": lambda groups: torch.optim.SGD(groups, momentum=0.9, fused=True),
    "adam": lambda groups: torch.optim.Adam(groups, amsgrad=True, eps=1e-3),
    "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=0.1, eps=1e-3),
    "adamw, foreach": lambda groups: torch.optim.AdamW(groups, foreach=True, eps=1e-3),
    "adamw, fused": lambda groups: torch.optim.AdamW(groups, fused=True, eps=1e-3),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.9, eps=1e-2),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr_decay=0.1, eps=1e-3),
    "nadam": lambda groups: torch.optim.NAdam(groups, eps=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_head_is_as_in_a_group_of_its_own(name):
    """With rates of their own and a scheduler that adds a constant; what one group costs is another test's matter."""

    def schedule(optimizer):
        return lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS, eta_min=1e-3)

    ways = [trained("mlp", OPTIMIZERS[name], schedule, attach=attach) for attach in (True, False)]
    assert_equal(*ways)
    assert not torch.allclose(ways[0][0][-1, 0], ways[0][0][-1, 2], rtol=1e-3), "the rates made a difference"


@pytest.mark.parametrize(
    ("kind", "how"), [("linear", "stacked"), ("norm", "stacked"), ("in place", "stacked"), ("control", "loop")]
)
def test_however_heads_run(kind, how):
    ways = [trained(kind, OPTIMIZERS["momentum"], attach=attach) for attach in (True, False)]
    assert ways[0][1].how == how
    assert_equal(*ways)


@pytest.mark.parametrize(
    "settings",
    [{"split": True}, {"clip": True}, {"accumulate": 2}, {"late": True}],
    ids=["no decay of biases", "clipped", "accumulated", "scheduler first"],
)
def test_what_people_do_with_groups_and_gradients(settings):
    """Two groups a head, gradients clipped by head or summed over batches, a scheduler that is there already."""

    def schedule(optimizer):
        return lr_scheduler.ExponentialLR(optimizer, 0.5)

    make = OPTIMIZERS["momentum"]
    assert_equal(*[trained("mlp", make, schedule, attach=attach, **settings) for attach in (True, False)])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_checkpoint_is_that_of_the_groups(name, before, after):
    """Saved with one update of all or without, and resumed with or without."""

    def resume(heads, optimizer):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = OPTIMIZERS[name](groups_of(heads))
        if after:
            heads.attach(other)
        other.load_state_dict(torch.load(file, weights_only=True))
        return other

    def detached(heads, optimizer):
        heads._joint = None
        return resume(heads, optimizer)

    resumed = trained("mlp", OPTIMIZERS[name], attach=before, resume=resume if after else detached)
    assert_equal(resumed, trained("mlp", OPTIMIZERS[name], attach=False))


def test_one_update_is_made(monkeypatch):
    """The optimizer sees one group of stacked tensors, and its own groups afterwards."""
    engine, batches = loaded(made("mlp"))
    heads = engine.heads(len(RATES))
    optimizer = torch.optim.SGD(groups_of(heads), momentum=0.9)
    heads.attach(optimizer)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append([len(group["params"]) for group in o.param_groups]))
    x, y = next(iter(batches))

    def closure():
        optimizer.zero_grad()
        loss = heads.losses(functional.cross_entropy, x, y).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert seen == [[4]]
    assert [group["lr"] for group in optimizer.param_groups] == list(RATES)
    assert all("momentum_buffer" in optimizer.state[p] for i in range(len(heads)) for p in heads.parameters(i))
    untouched = copy.deepcopy(heads.parameters(0))
    optimizer.zero_grad()
    optimizer.step()  # as torch's optimizers, which leave what has no gradient alone
    assert all(torch.equal(a, b) for a, b in zip(untouched, heads.parameters(0), strict=True))


def test_a_head_at_rest():
    """A rate of 0 moves nothing, of one head and of all."""
    engine, batches = loaded(made("mlp"))
    heads = engine.heads(2)
    optimizer = torch.optim.AdamW([{"params": heads.parameters(i), "lr": rate} for i, rate in enumerate((0.1, 0.0))])
    heads.attach(optimizer)
    before = copy.deepcopy([heads.parameters(0), heads.parameters(1)])
    for x, y in batches:
        optimizer.zero_grad()
        heads.losses(functional.cross_entropy, x, y).sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before[1], heads.parameters(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before[0], heads.parameters(0), strict=True))


class Normed(torch.optim.SGD):
    """Scales a parameter's update by the norm of its gradient, as LARS does."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad / parameter.grad.norm(), alpha=group["lr"])


@pytest.mark.parametrize(
    "kind", [torch.optim.ASGD, torch.optim.Rprop, torch.optim.Adafactor, torch.optim.LBFGS, Normed]
)
def test_an_optimizer_it_would_be_wrong_for_is_refused(kind):
    engine, _ = loaded(made("mlp"))
    heads = engine.heads(3)
    optimizer = kind(heads.parameters(0), lr=0.1) if kind is torch.optim.LBFGS else kind(groups_of(heads))
    drawn = torch.get_rng_state()
    with pytest.raises(UsageError, match=rf"attach\({kind.__name__}\)"):
        heads.attach(optimizer)
    assert torch.equal(drawn, torch.get_rng_state())
    assert not optimizer.state


def test_refusals():
    engine, batches = loaded(made("mlp"))
    heads = engine.heads(2)
    own = [{"params": heads.parameters(i)} for i in range(2)]
    with pytest.raises(UsageError, match="has 8 of them and 1 others"):
        heads.attach(torch.optim.SGD([*own, {"params": [nn.Parameter(torch.ones(2))]}], lr=0.1))
    with pytest.raises(UsageError, match="has 4 of them and 0 others"):
        heads.attach(torch.optim.SGD(own[:1], lr=0.1))
    optimizer = torch.optim.SGD([own[0], {**own[1], "momentum": 0.5}], lr=0.1)
    with pytest.raises(UsageError, match=r"heads 0 and 1 have momentum=0 and 0\.5"):
        heads.attach(optimizer)
    optimizer = torch.optim.SGD(own, lr=0.1, momentum=0.9)
    heads.attach(optimizer)
    x, y = next(iter(batches))
    heads.losses(functional.cross_entropy, x, y).sum().backward()
    for parameter in heads.parameters(1):
        parameter.grad = None
    with pytest.raises(UsageError, match="head 1 is frozen or has no gradient"):
        optimizer.step()
    heads.losses(functional.cross_entropy, x, y).sum().backward()
    optimizer.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(UsageError, match="3 groups, and 2 when it was attached"):
        optimizer.step()


def test_heads_that_have_taken_other_steps():
    """A state that cannot be that of one update is refused before it is used."""
    engine, batches = loaded(made("mlp"))
    heads = engine.heads(2)
    optimizer = torch.optim.AdamW([{"params": heads.parameters(i)} for i in range(2)])
    x, y = next(iter(batches))
    heads.losses(functional.cross_entropy, x, y)[0].backward()
    for parameter in heads.parameters(1):
        parameter.grad = None
    optimizer.step()
    heads.attach(optimizer)
    optimizer.zero_grad()
    heads.losses(functional.cross_entropy, x, y).sum().backward()
    with pytest.raises(CheckpointError, match="the same for all heads"):
        optimizer.step()


@pytest.mark.parametrize("name", ["momentum", "adamw, fused"])
def test_a_recorded_step_of_all_heads(name):
    """Recorded once, also while rates change: a recording reads each head's rate anew."""
    found = []
    for attach in (True, False):
        engine, batches = loaded(made("mlp"))
        heads = engine.heads(len(RATES))
        optimizer = OPTIMIZERS[name](groups_of(heads))
        if attach:
            heads.attach(optimizer)
        step = heads.compile_step(functional.cross_entropy, optimizer)
        if attach:
            step._recorder = recorder = StandIn(optimizer)
        losses = []
        for epoch in range(EPOCHS):
            for group, rate in zip(optimizer.param_groups, RATES, strict=True):
                group["lr"] = rate / (epoch + 1)
            losses += [step(x, y) for x, y in batches if len(y) == BATCH]
        found.append((torch.stack(losses), heads))
    assert recorder.recorded == 1
    assert recorder.replayed == len(losses) - 2  # the first makes state, the second is the first of its kind
    assert_equal(*found)
