"""Heads train as each would alone, from one pass over the rows."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze.errors import UsageError
from cachefreeze.heads import _Heads

COUNT, BATCH, CLASSES = 36, 8, 5
RATES = (0.3, 0.1, 0.01)
# Of losses and weights after two epochs: matrix products of all heads round otherwise than those of one.
TOLERANCE = 1e-5


class Net(nn.Module):
    """A frozen layer and a trainable part of one of several kinds."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.stem = nn.Linear(6, 12)
        middle = {
            "linear": [],
            "mlp": [nn.Linear(12, 12), nn.ReLU(inplace=True)],
            "norm": [nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5)],
            "in place": [nn.ReLU6(inplace=True), nn.Linear(12, 12)],
            "replayed": [nn.Linear(12, 12), nn.Dropout(0.5)],
            "control": [nn.Linear(12, 12), nn.Dropout(0.5)],
        }[kind]
        self.body = nn.Sequential(*middle)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = self.body(self.stem(x))
        if self.kind in ("replayed", "control") and isinstance(x, fx.Proxy):
            raise TypeError("not to be traced")
        if self.kind == "control" and float(x.detach().sum()) > 1e9:  # a value read into Python: not for vmap
            x = x * 2
        return self.head(x)


def made(kind, frozen=True):
    torch.manual_seed(0)
    model = Net(kind)
    if frozen:
        cf.freeze(model, train_from="head" if kind == "linear" else "body.0", example_inputs=torch.randn(2, 6))
    return model


def loaded(model):
    engine = cf.Engine(model, "host")
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(COUNT, 6, generator=generator), torch.randint(CLASSES, (COUNT,), generator=generator)
    )
    return engine, engine.loader(DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(2)))


def solo(kind, rate, frozen=True):
    """Losses and the model of a head that trains alone, and the draws left after it."""
    engine, batches = loaded(made(kind, frozen))
    trained = [p for p in engine.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9)
    losses = []
    torch.manual_seed(3)
    for _ in engine.epochs(2):
        engine.model.train()
        for x, y in batches:
            optimizer.zero_grad()
            losses.append(functional.cross_entropy(engine(x), y))
            losses[-1].backward()
            optimizer.step()
    return torch.stack(losses).detach(), engine.model, torch.rand(3)


def together(kind, frozen=True, compiled=False):
    engine, batches = loaded(made(kind, frozen))
    heads = engine.heads(len(RATES))
    groups = [{"params": heads.parameters(i), "lr": rate} for i, rate in enumerate(RATES)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    step = heads.compile_step(functional.cross_entropy, optimizer)
    losses = []
    torch.manual_seed(3)
    for _ in engine.epochs(2):
        engine.model.train()
        for x, y in batches:
            if compiled:
                losses.append(step(x, y))
                continue
            optimizer.zero_grad()
            losses.append(heads.losses(functional.cross_entropy, x, y))
            losses[-1].sum().backward()
            optimizer.step()
    return torch.stack(losses).detach(), heads, engine, batches, torch.rand(3)


@pytest.mark.parametrize("compiled", [False, True], ids=["loop", "compiled"])
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("linear", "stacked"), ("mlp", "stacked"), ("norm", "stacked"), ("in place", "stacked"),
        ("replayed", "stacked"), ("control", "loop"),
    ],
)  # fmt: skip
def test_each_head_is_its_solo_run(kind, how, compiled):
    """Losses, weights, buffers and draws, with learning rates of their own; bit for bit one after the other."""
    losses, heads, engine, _, drawn = together(kind, compiled=compiled)
    assert heads.how == how
    assert (heads.reason is None) == (how == "stacked")
    untouched = made(kind).state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in engine.model.state_dict().items())
    for i, rate in enumerate(RATES):
        wanted, model, drawn_alone = solo(kind, rate)
        assert torch.equal(drawn, drawn_alone)
        heads.load(i)
        pairs = [("losses", losses[:, i], wanted)]
        pairs += [(name, value, model.state_dict()[name]) for name, value in engine.model.state_dict().items()]
        for name, got, alone in pairs:
            if how == "loop":
                assert torch.equal(got, alone), name
            assert torch.allclose(got.double(), alone.double(), rtol=TOLERANCE, atol=TOLERANCE), name
    assert not torch.allclose(losses[-1, 0], losses[-1, 2], rtol=1e-2), "the rates made a difference"


def test_with_nothing_cached():
    """Heads over raw inputs are copies of the whole model."""
    losses, heads, *_ = together("mlp", frozen=False)
    assert heads.how == "stacked"
    wanted, _, _ = solo("mlp", RATES[0], frozen=False)
    assert torch.allclose(losses[:, 0], wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_outputs_and_gradients():
    """A call gives every head's outputs; a head whose loss is left out gets no gradient of its own."""
    _, heads, engine, batches, _ = together("mlp")
    engine.model.eval()
    x, y = next(iter(batches))
    with torch.no_grad():
        outputs = heads(x)
    assert outputs.shape == (len(RATES), len(y), CLASSES)
    for i in range(len(heads)):
        heads.load(i)
        assert torch.allclose(engine(x), outputs[i], rtol=TOLERANCE, atol=TOLERANCE)
    for i in range(len(heads)):
        for parameter in heads.parameters(i):
            parameter.grad = None
    heads.losses(functional.cross_entropy, x, y)[1].backward()
    assert all(p.grad.abs().sum() > 0 for p in heads.parameters(1))
    assert all(not p.grad.any() for p in heads.parameters(0))
    assert set(heads.named_parameters(0)) == {"body.0.weight", "body.0.bias", "head.weight", "head.bias"}


def test_rows_stay_for_every_head(monkeypatch):
    """A suffix that writes into its rows spoils them for no other head, one after the other as at once."""
    engine, batches = loaded(made("in place"))
    x, y = next(iter(batches))
    alone = functional.cross_entropy(engine(x.to(torch.float32, copy=True)), y)
    heads = engine.heads(2)
    monkeypatch.setattr(_Heads, "side_by_side", _Heads.one_by_one)
    losses = heads.losses(functional.cross_entropy, x, y)
    assert torch.equal(losses, torch.stack([alone, alone]))


def test_refusals():
    engine, _ = loaded(made("mlp"))
    for count in (0, 2.5):
        with pytest.raises(UsageError, match="1 or more"):
            engine.heads(count)
    heads = engine.heads(2)
    for head in (2, -1):
        with pytest.raises(UsageError, match="0 to 1"):
            heads.load(head)
    engine.model.head.weight.requires_grad_(False)
    heads = engine.heads(2)
    engine.model.head.weight.requires_grad_(True)
    with pytest.raises(UsageError, match="make them anew"):
        heads(torch.randn(4, 6))
    for parameter in engine.model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing of the model trains"):
        engine.heads(2)
    with pytest.raises(UsageError, match="without a schedule"):
        cf.Engine(made("mlp", frozen=False), "host", schedule=cf.FreezeOut()).heads(2)


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=1), nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.arange(1.0, CLASSES + 1)), nn.CrossEntropyLoss(reduction="sum"),
        lambda output, y: functional.cross_entropy(output, functional.one_hot(y, CLASSES).float()),
        lambda output, y: functional.cross_entropy(output[:, :, None], y[:, None]),
        lambda output, y: functional.cross_entropy(output, output.argmax(1)),
        lambda output, y: functional.cross_entropy(output.detach(), y) + output.square().mean(),
    ],
    ids=["plain", "ignoring", "smoothed", "weighted", "sum", "shares", "pixels", "own targets", "not trained"],
)  # fmt: skip
def test_a_loss_is_each_head_s_own(loss_fn):
    """Cross entropies of all heads with one target are computed at once; every other one as vmap does it."""
    _, heads, engine, batches, _ = together("mlp")
    engine.model.eval()
    x, y = next(iter(batches))
    for i in range(len(heads)):
        for parameter in heads.parameters(i):
            parameter.grad = None
    losses = heads.losses(loss_fn, x, y)
    losses.sum().backward()
    assert heads.how == "stacked"
    for i in range(len(heads)):
        heads.load(i)
        engine.model.zero_grad()
        alone = loss_fn(engine(x), y)
        alone.backward()
        assert torch.allclose(losses[i], alone, rtol=TOLERANCE, atol=TOLERANCE)
        for name, parameter in heads.named_parameters(i).items():
            wanted = engine.model.get_parameter(name).grad
            assert torch.allclose(parameter.grad, wanted, rtol=TOLERANCE, atol=TOLERANCE), name


class Calls(TorchFunctionMode):
    """Shapes of the first arguments that functions are called with."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (functional.linear, functional.cross_entropy, torch.baddbmm):
            self.shapes.append((func.__name__, tuple(args[1 if func is torch.baddbmm else 0].shape)))
        return func(*args, **(kwargs or {}))


def test_linear_layers_and_cross_entropies_of_all_heads_are_one():
    """Not by vmap: one product on what heads share, a batch of products on what they do not, and one loss."""
    _, heads, _, batches, _ = together("mlp")
    x, y = next(iter(batches))
    with Calls() as calls:
        heads.losses(functional.cross_entropy, x, y)
    assert calls.shapes == [
        ("linear", (BATCH, 12)),
        ("baddbmm", (len(heads), BATCH, 12)),
        ("cross_entropy", (BATCH * len(heads), CLASSES)),
    ]


def test_a_loss_of_what_no_head_makes_has_its_gradient():
    _, heads, _, batches, _ = together("mlp")
    x, y = next(iter(batches))
    shared, alone = (torch.ones(BATCH, CLASSES, requires_grad=True) for _ in range(2))
    heads.losses(lambda output, y: functional.cross_entropy(shared, y) + 0 * output.sum(), x, y).sum().backward()
    (len(heads) * functional.cross_entropy(alone, y)).backward()
    assert torch.allclose(shared.grad, alone.grad)


class _Forked(nn.Module):
    """Goes another way through what trains while ``scaled`` is set."""

    def __init__(self):
        super().__init__()
        self.stem, self.head, self.scaled = nn.Linear(6, 12), nn.Linear(12, CLASSES), False

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            raise TypeError("not to be traced")
        x = self.head(self.stem(x))
        return x * 2 if self.scaled else x


def test_a_batch_that_goes_another_way_than_the_first():
    """An operation that heads side by side do not know, met in a later batch: another way is found, and used."""
    torch.manual_seed(0)
    model = _Forked()
    cf.freeze(model, "head", example_inputs=torch.randn(2, 6))
    engine, batches = loaded(model)
    heads = engine.heads(3)
    outputs = []
    for number, (x, _) in enumerate(batches):
        model.scaled = number > 0
        outputs.append((heads(x), engine(x)))
    assert heads.how == "stacked"
    assert all(torch.allclose(found[head], wanted) for found, wanted in outputs for head in range(3))
