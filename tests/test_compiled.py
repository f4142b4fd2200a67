"""A compiled step trains as the eager step does, is replayed only where that is sure, and says why where it is not."""

from __future__ import annotations

import copy
import importlib
import random
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze.compiled import CompiledStep
from cachefreeze.errors import UsageError
from cachefreeze.recorded import CudaRecorder

COUNT, BATCH, CLASSES = 44, 8, 5


class StandIn:
    """Records and replays as a CUDA graph does, on a CPU: static memory, and nothing of what Python decides later.

    It runs the recorded function again at each replay, with the settings that the groups had while it was recorded.
    ``wrong`` damages what a replay does.
    """

    def __init__(self, optimizer, wrong=None):
        self.optimizer = optimizer
        self.wrong = wrong
        self.recorded = 0
        self.replayed = 0

    def warm(self, run):
        return run()

    def record(self, run):
        self.recorded += 1
        return StandInTape(self, run)


class StandInTape:
    def __init__(self, recorder, run):
        self.recorder, self.run = recorder, run
        self.loss = torch.zeros(())
        self.groups = [dict(group) for group in recorder.optimizer.param_groups]
        if recorder.wrong == "raise":
            raise RuntimeError("operation not permitted when stream is capturing")
        if recorder.wrong == "draw":
            random.random()

    def replay(self):
        self.recorder.replayed += 1
        groups = self.recorder.optimizer.param_groups
        now = [dict(group) for group in groups]
        for group, then in zip(groups, self.groups, strict=True):
            group.update(then)
        loss = self.run()
        for group, before in zip(groups, now, strict=True):
            group.update(before)
        self.loss = loss + 1 if self.recorder.wrong == "loss" else loss
        if self.recorder.wrong == "weights":
            with torch.no_grad():
                groups[0]["params"][0].add_(1.0)
        if self.recorder.wrong == "random":
            torch.rand(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.body = nn.Sequential(nn.Linear(12, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.body(self.stem(x).relu()))


def engine_and_loader(train_from="body", store="host"):
    torch.manual_seed(0)
    model = Net()
    if train_from is not None:
        cf.freeze(model, train_from=train_from)
    engine = cf.Engine(model, store)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(COUNT, 6, generator=generator), torch.randint(CLASSES, (COUNT,)))
    return engine, engine.loader(DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(2)))


def trained(engine):
    return [parameter for parameter in engine.model.parameters() if parameter.requires_grad]


def make(kind, engine):
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    }
    return kinds[kind](trained(engine))


def compute_of(engine):
    return lambda inputs, target: functional.cross_entropy(engine(inputs), target)


def run(engine, batches, optimizer, step, epochs=3, each=lambda epoch, i: None):
    """Losses of all steps, and how each ran."""
    losses, ways = [], []
    torch.manual_seed(5)
    for epoch in range(epochs):
        engine.model.train()
        for i, (x, y) in enumerate(batches):
            each(epoch, i)
            losses.append(step(x, y))
            ways.append(getattr(step, "how", None))
    return torch.stack([loss.detach() for loss in losses]), ways


def eager_step(engine, optimizer):
    def step(x, y):
        optimizer.zero_grad()
        loss = functional.cross_entropy(engine(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def stand_in(engine, optimizer, **options):
    recorder = StandIn(optimizer, **options)
    return CompiledStep(compute_of(engine), optimizer, engine.model, lambda: engine.parts, recorder=recorder), recorder


@pytest.mark.parametrize("train_from", ["body", None])
def test_on_a_cpu_it_is_the_eager_step(train_from, caplog):
    """Bit for bit: losses, weights, buffers, draws; with rows as with raw inputs. The reason is said once."""
    engine, batches = engine_and_loader(train_from)
    optimizer = make("adamw", engine)
    wanted, _ = run(engine, batches, optimizer, eager_step(engine, optimizer))
    drawn = torch.rand(3)
    other, batches = engine_and_loader(train_from)
    step = other.compile_step(functional.cross_entropy, make("adamw", other))
    with caplog.at_level("INFO", "cachefreeze"):
        got, ways = run(other, batches, None, step)
    assert torch.equal(got, wanted)
    assert torch.equal(torch.rand(3), drawn)
    for (name, a), b in zip(engine.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert set(ways) == {"eager"}
    assert "CPU" in step.reason
    assert sum("runs eagerly" in record.message for record in caplog.records) == 1
    assert not step(*next(iter(batches))).requires_grad


def test_dict_batches():
    """A dict batch is its own target; keys that the model does not take reach the loss alone."""
    torch.manual_seed(0)
    model = Net()
    cf.freeze(model, train_from="head")
    engine = cf.Engine(model, "host")
    data = [{"x": torch.randn(6), "labels": torch.tensor(i % CLASSES)} for i in range(16)]
    batches = engine.loader(DataLoader(data, 8))
    before = model.head.weight.detach().clone()
    step = engine.compile_step(
        lambda output, batch: functional.cross_entropy(output, batch["labels"]),
        torch.optim.SGD(model.head.parameters(), lr=0.1),
    )
    for batch in batches:
        assert step(batch).isfinite()
    assert not torch.equal(model.head.weight, before)


@pytest.fixture
def capturable_on_cpu(monkeypatch):
    """Torch refuses capturable=True on a CPU only because nothing is captured there; what it computes it can."""
    for name in ("adam", "rmsprop"):
        module = importlib.import_module(f"torch.optim.{name}")
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda **_: ["cpu"])


@pytest.mark.parametrize("kind", ["sgd", "adamw", "rmsprop"])
def test_replays_train_as_eager_steps_do(kind, capturable_on_cpu):
    """With dropout and batch norm, a last smaller batch, and a learning rate that moves at every step.

    No bias before a batch norm: its gradient is zero but for rounding, which Adam makes a whole step of.
    """

    def decay(optimizer):
        return lambda epoch, i: optimizer.param_groups[0].update(lr=0.01 * 0.99 ** (6 * epoch + i))

    still = {"rmsprop": lambda optimizer: lambda epoch, i: None}  # its rate is kept by a recording
    move = still.get(kind, decay)
    engine, batches = engine_and_loader()
    optimizer = make(kind, engine)
    wanted, _ = run(engine, batches, optimizer, eager_step(engine, optimizer), each=move(optimizer))
    other, batches = engine_and_loader()
    optimizer = make(kind, other)
    step, recorder = stand_in(other, optimizer)
    got, ways = run(other, batches, optimizer, step, each=move(optimizer))
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(engine.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6), name
    assert recorder.recorded == 2, "one for whole batches, one for the last"
    assert ways[-1] == ways[-2] == "graph"
    assert isinstance(optimizer.param_groups[0]["lr"], float), "the user's own number"
    assert not optimizer.param_groups[0].get("fused")


def test_a_loss_is_the_callers():
    """A later replay leaves the losses that were handed out as they were."""
    engine, batches = engine_and_loader()
    step, _ = stand_in(engine, make("sgd", engine))
    losses = [(loss := step(x, y), loss.clone()) for _ in range(2) for x, y in batches]
    assert all(torch.equal(kept, then) for kept, then in losses)


@pytest.mark.parametrize(
    ("change", "back"),
    [
        (lambda engine, optimizer: engine.model.body[3].eval(), lambda engine, optimizer: engine.model.body[3].train()),
        (
            lambda engine, optimizer: engine.model.head.bias.requires_grad_(False),
            lambda engine, optimizer: engine.model.head.bias.requires_grad_(True),
        ),
        (
            lambda engine, optimizer: optimizer.param_groups[0].update(momentum=0.5),
            lambda engine, optimizer: optimizer.param_groups[0].update(momentum=0.9),
        ),
    ],
    ids=["mode", "flag", "setting"],
)
def test_what_a_recording_depends_on(change, back):
    """A changed mode, flag or setting is another kind of step; when it is back, so is the recording."""
    engine, batches = engine_and_loader()
    engine.model.train()
    optimizer = make("sgd", engine)
    step, recorder = stand_in(engine, optimizer)
    x, y = next(iter(batches))
    ways = []
    for times, before in ((4, None), (3, change), (1, back)):
        if before is not None:
            before(engine, optimizer)
        for _ in range(times):
            step(x, y)
            ways.append(step.how)
    assert ways == ["eager", "eager", "graph", "graph", "eager", "graph", "graph", "graph"]
    assert recorder.recorded == 2


def test_loaded_state_is_not_missed():
    """After optimizer.load_state_dict the old recording, which writes into the old state, is not used."""
    engine, batches = engine_and_loader()
    optimizer = make("sgd", engine)
    step, recorder = stand_in(engine, optimizer)
    x, y = next(iter(batches))
    for _ in range(4):
        step(x, y)
    assert step.how == "graph"
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(x, y)
    assert step.how == "eager"
    for parameter in trained(engine):
        parameter.data = parameter.data.clone()
    step(x, y)
    assert step.how == "eager"
    assert recorder.recorded == 1


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("raise", "capturing"),
        ("draw", "draws from random on the CPU"),
        ("loss", "off the eager one's"),
        ("weights", "otherwise than the eager one"),
        ("random", "other random numbers"),
    ],
)
def test_what_cannot_be_replayed_falls_back(wrong, why):
    """A recording that fails, or does something else, leaves exactly the eager training behind, and its reason."""
    engine, batches = engine_and_loader()
    optimizer = make("sgd", engine)
    wanted, _ = run(engine, batches, optimizer, eager_step(engine, optimizer))
    other, batches = engine_and_loader()
    optimizer = make("sgd", other)
    step, recorder = stand_in(other, optimizer, wrong=wrong)
    got, ways = run(other, batches, optimizer, step)
    assert torch.equal(got, wanted)
    for a, b in zip(engine.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert set(ways) == {"eager"}
    assert why in step.reason
    assert recorder.recorded == 2, "each kind is tried once"


class Streams:
    """torch.cuda as far as it knows of streams: a recording that fails leaves the one that it was made on current."""

    def __init__(self):
        self.current = "the user's"
        self.recorded = []

    def Stream(self, device):
        return "the recorder's"

    def CUDAGraph(self):
        return object()

    def current_stream(self, device):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        before, self.current = self.current, stream
        yield
        self.recorded.append(graph)
        self.current = before


def test_a_failed_recording_leaves_the_users_stream(monkeypatch):
    """And ends with one that succeeds, without which older CUDA generators would refuse to draw."""
    streams = Streams()
    for name in ("Stream", "CUDAGraph", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    recorder = CudaRecorder(torch.device("cpu"))

    def reads():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        recorder.record(reads)
    assert streams.current == "the user's"
    assert len(streams.recorded) == 1
    assert recorder.record(lambda: torch.ones(())).loss == 1
    assert streams.current == "the user's"


def test_optimizers_that_compute_in_python(caplog):
    """Adagrad counts its steps in Python: refused by name. Step hooks, as a schedule has them, would not be called."""
    engine, batches = engine_and_loader()
    step, recorder = stand_in(engine, make("adagrad", engine))
    run(engine, batches, None, step, epochs=2)
    assert "Adagrad has no capturable=True" in step.reason
    optimizer = make("sgd", engine)
    optimizer.register_step_pre_hook(lambda *_: None)
    step, recorder = stand_in(engine, optimizer)
    run(engine, batches, optimizer, step, epochs=2)
    assert "hooks" in step.reason
    assert recorder.recorded == 0
    with pytest.raises(UsageError, match="LBFGS"):
        engine.compile_step(functional.cross_entropy, torch.optim.LBFGS(trained(engine)))
    with pytest.raises(UsageError, match="made already"):
        engine.compile_step(functional.cross_entropy, torch.optim.SGD)


def test_many_shapes_are_not_all_kept():
    """Eight shapes are recorded, further ones run eagerly; a changed setting makes room again."""
    engine, _ = engine_and_loader(None)
    engine.model.train()
    optimizer = make("sgd", engine)
    step, recorder = stand_in(engine, optimizer)
    shapes = [(torch.randn(n, 6), torch.randint(CLASSES, (n,))) for n in range(2, 12)]
    step(*shapes[0])  # makes the optimizer's state
    for x, y in shapes:
        for _ in range(2):
            step(x, y)
    assert recorder.recorded == 8
    assert "8 shapes" in step.reason
    optimizer.param_groups[0]["momentum"] = 0.5
    for _ in range(3):
        step(*shapes[9])
    assert (step.how, step.reason) == ("graph", None)


def test_other_batches_run_eagerly():
    """What is no tensor and no constant, or lies on another device, is never recorded."""
    engine, batches = engine_and_loader()
    optimizer = make("sgd", engine)
    recorder = StandIn(optimizer)
    step = CompiledStep(
        lambda x, y, note: functional.cross_entropy(engine(x), y), optimizer, engine.model, recorder=recorder
    )
    for x, y in batches:
        step(x, y, object())
    assert "object" in step.reason
    for x, y in batches:
        step(x, y, torch.empty(0, device="meta"))
    assert "on meta" in step.reason
    assert recorder.recorded == 0
