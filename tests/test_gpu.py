"""Each path that touches a CUDA device: stores, staging, splits, autocast, random states, and no hidden waiting.

Tolerances. Convolutions and matrix products on a GPU may use TF32 and another kernel for another batch size, so what
is compared here runs in plain float32 (``ieee_float32``) and deterministic kernels are not asked for: rows that were
computed in batches of another composition agree with the model's own activations to 1e-5 of the largest magnitude,
losses of a few steps from equal weights to 1e-4 relative.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze import optimized
from cachefreeze.errors import StaleCacheError
from cachefreeze.inference import relative_error
from cachefreeze.isolation import RandomState
from cachefreeze.portions import Portions
from cachefreeze.prefetch import ReadAhead
from cachefreeze.splitting import BoundaryTensor
from cachefreeze.testing.ragged import Pad, Running, Texts
from cachefreeze.tracing import Example

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

COUNT, BATCH = 40, 8
ROW_TOLERANCE, LOSS_TOLERANCE = 1e-5, 1e-4
TIERS = ["device", "host", "hdf5"]


@pytest.fixture(autouse=True)
def ieee_float32():
    """No TF32: its 10 bits of mantissa would hide what is compared here."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@contextmanager
def no_synchronisation():
    """Raise where torch would make the host wait for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")  # a prototype, as torch says once
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class SmallCNN(nn.Module):
    """A frozen part with batch norm, a trainable part with batch norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def made(seed=0):
    torch.manual_seed(seed)
    model = SmallCNN()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that a fresh module would not show to be used
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    return model.cuda()


def frozen(seed=0):
    model = made(seed)
    cf.freeze(model, train_from="body")
    return model


def samples():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(COUNT, 3, 8, 8, generator=generator), torch.randint(5, (COUNT,), generator=generator)
    )


def loader(**options):
    return DataLoader(samples(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(2), **options)


def store_of(tier, tmp_path):
    return f"hdf5:{tmp_path}" if tier == "hdf5" else tier


def train(engine, batches, epochs):
    """Losses of every step, and where each epoch's rows came from."""
    trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    losses, sources = [], []
    for _ in engine.epochs(epochs):
        engine.model.train()
        for x, y in batches:
            optimizer.zero_grad()
            loss = functional.cross_entropy(engine(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        sources.append(batches.source)
    return torch.stack(losses).cpu(), sources


# --- the tiers ---


@pytest.mark.parametrize("tier", TIERS)
def test_rows_are_the_prefix(tier, tmp_path):
    """Filled or cached, what arrives is on the model's device and is what the prefix makes of that sample."""
    engine = cf.Engine(frozen(), store_of(tier, tmp_path))
    batches = engine.loader(loader())
    assert next(iter(engine.cache.info().values()))["tier"] == tier
    dataset = samples()
    with torch.no_grad():
        expected = engine.model.stem(dataset.tensors[0].cuda())
    for source in ("fill", "cached"):
        order = DataLoader(dataset, BATCH, shuffle=True, generator=batches.dataloader.generator.clone_state())
        for (x, y), (raw, label) in zip(batches, order, strict=True):
            assert x.tensors[0].device == y.device == next(engine.model.parameters()).device
            assert torch.equal(y.cpu(), label)
            index = (dataset.tensors[0].unsqueeze(0) == raw.unsqueeze(1)).flatten(2).all(2).int().argmax(1)
            wanted = expected[index.cuda()]
            assert torch.allclose(x.tensors[0], wanted, rtol=0, atol=ROW_TOLERANCE * float(wanted.abs().max()))
        assert batches.source == source
    engine.close()


@pytest.mark.parametrize("tier", TIERS)
def test_training_agrees_with_no_cache(tier, tmp_path):
    """Three epochs, cached and uncached, from equal weights and seeds: the same losses within the tolerance."""
    model = frozen()
    reference = cf.Engine(copy.deepcopy(model), "off")
    wanted, sources = train(reference, reference.loader(loader()), 3)
    assert sources == ["frozen"] * 3
    engine = cf.Engine(model, store_of(tier, tmp_path))
    got, sources = train(engine, engine.loader(loader()), 3)
    assert sources == ["fill", "cached", "cached"]
    assert torch.allclose(got, wanted, rtol=LOSS_TOLERANCE, atol=0)
    engine.close()
    # running statistics of what trains moved alike; of what is frozen, not at all
    for (name, a), (_, b) in zip(reference.model.named_buffers(), model.named_buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4), name
    assert torch.equal(model.stem[1].running_mean, made().stem[1].running_mean)


@pytest.mark.parametrize("tier", TIERS)
def test_rows_of_different_lengths_are_promoted(tier, tmp_path):
    """Under a schedule, through a move: the losses of the run without a cache."""
    stages = [{"train_from": "blocks.1", "epochs": 2}, {"train_from": "blocks.3"}]

    def run(store):
        torch.manual_seed(0)
        model = Running().cuda()
        engine = cf.Engine(model, store, schedule=cf.Stages(stages), moves="always")
        pad = Pad(labels="tags", multiple=4, positions=True)
        batches = engine.loader(
            DataLoader(Texts(COUNT), BATCH, shuffle=True, generator=torch.Generator().manual_seed(1), collate_fn=pad)
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        losses, seen = [], []
        for _ in engine.epochs(4):
            for batch in batches:
                loss = engine(**batch)["loss"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            seen.append((batches.source, batches.counts.promoted))
        engine.close()
        return torch.stack(losses), seen

    wanted, _ = run("off")
    got, seen = run(store_of(tier, tmp_path))
    assert seen == [("fill", 0), ("cached", 0), ("fill", COUNT), ("cached", 0)]
    assert torch.allclose(got, wanted, rtol=LOSS_TOLERANCE, atol=0)


def test_hdf5_is_reused_by_a_cuda_model(tmp_path):
    """A second engine on the same device finds the file's rows and computes none."""
    first = cf.Engine(frozen(), f"hdf5:{tmp_path}")
    for _ in first.loader(loader(), name="train"):
        pass
    first.close()
    second = cf.Engine(frozen(), f"hdf5:{tmp_path}")
    batches = second.loader(loader(), name="train")
    for _ in batches:
        pass
    assert (batches.source, batches.counts.cached) == ("cached", COUNT)
    second.close()


def test_workers_and_pinned_batches():
    """Batches that workers fetched and the pin thread pinned fill the store as any others do."""
    engine = cf.Engine(frozen(), "device")
    batches = engine.loader(loader(num_workers=2, pin_memory=True))
    sources = []
    for _ in range(2):
        for x, y in batches:
            assert x.tensors[0].is_cuda
            assert y.is_cuda
        sources.append(batches.source)
    assert sources == ["fill", "cached"]


def test_a_batch_is_the_caller_s():
    """Writing into a batch, as an in-place ReLU would, leaves the rows of the device store as they were."""
    engine = cf.Engine(frozen(), "device")
    batches = engine.loader(DataLoader(samples(), BATCH))
    first = [x.tensors[0].clone() for x, _ in batches]
    for x, _ in batches:
        x.tensors[0].zero_()
    assert all(torch.equal(x.tensors[0], wanted) for (x, _), wanted in zip(batches, first, strict=True))


def test_staged_batches_outlive_their_staging():
    """Many batches queued at once through reused pinned buffers each arrive with their own rows."""
    count, width = 4096, 1024
    store = cf.HostStore(
        cf.StoreSpec(rows=count, fields=(cf.FieldSpec(name="activation.0", shape=(width,), dtype=torch.float32),))
    )
    store.write(torch.arange(count), {"activation.0": torch.arange(count).float().unsqueeze(1).expand(-1, width)})
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).split(64)
    busy = torch.randn(2048, 2048, device="cuda")
    arrived = []
    for rows in order:
        busy = busy @ busy * 1e-3  # the copies queue up behind this, so a buffer reused too early would show
        batch = store.read(rows)["activation.0"]
        assert batch.is_pinned()
        arrived.append(batch.to("cuda", non_blocking=True))
        del batch
    for rows, got in zip(order, arrived, strict=True):
        assert torch.equal(got.cpu(), rows.float().unsqueeze(1).expand(-1, width))


@pytest.mark.parametrize("tier", ["host", "hdf5"])
def test_batches_that_are_read_ahead_are_right_and_travel_beside_the_step(tier, tmp_path, monkeypatch):
    """While the device is busy with one batch the next arrives; none is overwritten while a step has it queued."""
    engine = cf.Engine(made_wide(), store_of(tier, tmp_path))
    count = 1024
    data = TensorDataset(torch.randn(count, 64, generator=torch.Generator().manual_seed(3)), torch.arange(count))
    batches = engine.loader(DataLoader(data, 64, shuffle=True))
    for _ in range(2):
        for _ in batches:
            pass
    with torch.no_grad():
        expected = engine.parts.prefix(data.tensors[0].cuda())
    busy, kept = torch.randn(2048, 2048, device="cuda"), []
    for x, y in batches:
        for _ in range(8):
            busy = busy @ busy * 1e-3
        kept.append((x.tensors[0] * 1.0, y.clone()))  # queued behind the products; then the batch itself is dropped
        del x, y
    for rows, labels in kept:
        wanted = expected[labels]
        assert torch.allclose(rows, wanted, rtol=0, atol=ROW_TOLERANCE * float(wanted.abs().max()))

    asked, ask = [], ReadAhead.ask
    monkeypatch.setattr(ReadAhead, "ask", lambda self, rows: ask(self, rows) or asked.append(self._asked))
    remaining = iter(batches)
    next(remaining)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second, of the stream that the step runs on
    behind = torch.cuda.Event()
    behind.record()
    next(remaining)
    (_, done) = asked[1].result()
    done.synchronize()  # the copy ended
    assert not behind.query()  # before the step did
    torch.cuda.synchronize()
    remaining.close()
    engine.close()


# --- autocast ---


def test_rows_under_autocast():
    """The engine's autocast makes bfloat16 rows; the suffix takes them under the same autocast and under no other."""
    engine = cf.Engine(frozen(), "device", autocast=torch.bfloat16)
    batches = engine.loader(loader())
    engine.model.train()
    x, y = next(iter(batches))
    assert x.tensors[0].dtype == torch.bfloat16
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = functional.cross_entropy(engine(x), y)
    loss.backward()
    assert engine.model.head.weight.grad.isfinite().all()
    with pytest.raises(StaleCacheError, match="autocast"):
        engine(x)
    with torch.autocast("cuda", dtype=torch.float16), pytest.raises(StaleCacheError, match="autocast"):
        engine(x)


def test_ambient_autocast_does_not_reach_the_prefix():
    """Rows of an engine without autocast are float32 whatever is ambient, and then refused under autocast."""
    engine = cf.Engine(frozen(), "device")
    batches = engine.loader(loader())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        x, _ = next(iter(batches))
        assert x.tensors[0].dtype == torch.float32
        with pytest.raises(StaleCacheError, match="autocast"):
            engine(x)


# --- random states ---


def test_random_states_are_preserved():
    """Splitting, probing and filling leave CUDA's random state, and the others, as they were."""
    torch.cuda.init()
    model = frozen()
    torch.cuda.manual_seed_all(7)
    torch.rand(3, device="cuda")
    before = RandomState.capture()
    assert before.torch_cuda
    engine = cf.Engine(model, "device")
    batches = engine.loader(loader())
    assert before.moved() == []
    engine.cache.fill(batches)
    assert before.moved() == []
    cf.split(model, samples().tensors[0][:3].cuda())
    assert before.moved() == []
    engine.cache.verify()
    assert before.moved() == []


# --- waiting ---


@pytest.mark.parametrize("tier", TIERS)
def test_no_step_of_a_cached_epoch_waits(tier, tmp_path):
    """After the pass has begun, reading rows, forward, backward and optimizer step never wait for the device.

    A pass begins with one comparison of the prefix's weights with those that the rows were made of, which reads them:
    one wait per epoch, before the first batch.
    """
    engine = cf.Engine(frozen(), store_of(tier, tmp_path))
    batches = engine.loader(loader())
    trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)
    engine.model.train()

    def step(x, y):
        optimizer.zero_grad()
        functional.cross_entropy(engine(x), y).backward()
        optimizer.step()

    for x, y in batches:
        step(x, y)
    remaining = iter(batches)
    step(*next(remaining))
    steps = 1
    with no_synchronisation():
        for x, y in remaining:
            step(x, y)
            steps += 1
    assert steps == COUNT // BATCH
    assert batches.source == "cached"
    engine.close()


@pytest.mark.parametrize("tier", TIERS)
def test_batches_do_not_wait_behind_queued_work(tier, tmp_path):
    """Handing out a batch returns while the device is still busy with earlier work.

    The sync debug mode does not see a copy from pageable memory wait in the driver, so this watches an event.
    """
    engine = cf.Engine(made_wide(), store_of(tier, tmp_path))
    wide = TensorDataset(torch.randn(256, 64), torch.randint(5, (256,)))
    batches = engine.loader(DataLoader(wide, 64))
    for _ in range(2):  # the fill; then a cached pass, so that buffers are there: allocating them waits
        for _ in batches:
            pass
    remaining = iter(batches)
    next(remaining)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    done = torch.cuda.Event()
    done.record()
    x, _ = next(remaining)
    assert not done.query()
    torch.cuda.synchronize()
    assert x.tensors[0].is_cuda
    engine.close()


def made_wide():
    """Rows of 16 kB, batches of 1 MB: beyond the 64 kB up to which pageable copies do not wait anyway."""
    model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 5)).cuda()
    cf.freeze(model, train_from="2")
    return model


@pytest.mark.parametrize("prefix", ["optimized", "optimized:bfloat16", "optimized:float16"])
def test_an_optimized_prefix_is_within_its_tolerance(prefix, monkeypatch):
    """On the device, in every precision; the model's own weights stay as they are."""
    monkeypatch.setattr(optimized, "_FEWEST_ROWS", 0)
    monkeypatch.setattr(optimized, "_SHORTEST_SECONDS", 0.0)
    monkeypatch.setattr(optimized, "_WORTHWHILE", 0.0)
    model = frozen()
    before = copy.deepcopy(model.state_dict())
    engine = cf.Engine(model, "device", prefix=prefix)
    images = torch.randn(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loader = engine.loader(DataLoader(TensorDataset(images, torch.zeros(COUNT, dtype=torch.int64)), BATCH))
    rows = torch.cat([rows.tensors[0] for rows, _ in loader])
    facts = engine.cache.made_by
    assert facts["choice"].startswith("1 batch norms folded")
    assert 0 < facts["error"] < facts["tolerance"]
    exact = engine.parts.prefix(images.cuda())
    assert relative_error(engine.parts.boundary.tensors, [exact], [rows]) < 2 * facts["tolerance"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_out_of_memory_in_the_prefix_halves_the_batch(caplog):
    """A batch whose activations do not fit is computed in smaller ones, with equal rows."""
    wide = nn.Conv2d(3, 64, 3, padding=1).cuda()
    images = torch.randn(64, 3, 256, 256, generator=torch.Generator().manual_seed(0)).cuda()
    spec = (BoundaryTensor(shape=(64,), dtype=torch.float32, batch_dim=0, layout=(0, 1)),)
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 7e8  # the activations of all images are 1.07 GB
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    portions = Portions()
    try:
        with torch.no_grad():
            (rows,) = portions.run(lambda x: wide(x).mean((2, 3)), Example.of(images), 64, spec)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert portions.size is not None
    assert portions.size <= 32
    assert "ran out of memory on 64 samples" in caplog.text
    with torch.no_grad():
        exact = torch.cat([wide(images[i : i + 8]).mean((2, 3)) for i in range(0, 64, 8)])
    assert (rows - exact).abs().max() <= ROW_TOLERANCE * exact.abs().max()


# --- whole steps ---


def optimizer_of(kind, parameters):
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=1e-3)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_recorded_step_trains_as_the_eager_one(kind, tier):
    """Whole and last batches, a learning rate that moves at every step: the same losses and weights, from a graph."""
    losses, models, ways = [], [], []
    for compiled in (False, True):
        engine = cf.Engine(frozen(), tier)
        batches = engine.loader(DataLoader(samples(), 12, shuffle=True, generator=torch.Generator().manual_seed(2)))
        trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
        optimizer = optimizer_of(kind, trained)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        step = engine.compile_step(functional.cross_entropy, optimizer)
        for _ in engine.epochs(4):
            engine.model.train()
            for x, y in batches:
                if compiled:
                    losses.append(step(x, y))
                    ways.append((step.how, step.reason))
                else:
                    optimizer.zero_grad()
                    losses.append(functional.cross_entropy(engine(x), y))
                    losses[-1].backward()
                    optimizer.step()
                schedule.step()
        models.append(engine.model)
    wanted, got = torch.stack(losses).detach().chunk(2)
    assert ways[-1] == ways[-2] == ("graph", None), ways
    assert torch.allclose(got, wanted, rtol=1e-3, atol=0)
    # the convolution's bias before a batch norm has a gradient of rounding alone, which AdamW makes whole steps of
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert name == "body.0.bias" or torch.allclose(a, b, rtol=1e-2, atol=1e-4), name


def test_a_recorded_step_draws_as_the_eager_one():
    """Dropout in the suffix draws other numbers at every replay, those of the eager step."""
    outcomes = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 5)).cuda()
        cf.freeze(model, train_from="1")
        engine = cf.Engine(model, "device")
        data = TensorDataset(torch.randn(8, 64), torch.randint(5, (8,)))
        x, y = next(iter(engine.loader(DataLoader(data, 8))))
        optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
        step = engine.compile_step(functional.cross_entropy, optimizer)
        model.train()
        torch.cuda.manual_seed_all(3)
        for _ in range(6):
            if compiled:
                loss = step(x, y)
            else:
                optimizer.zero_grad()
                loss = functional.cross_entropy(engine(x), y)
                loss.backward()
                optimizer.step()
            outcomes.append(loss.detach())
    assert (step.how, step.reason) == ("graph", None)
    wanted, got = torch.stack(outcomes).chunk(2)
    assert torch.allclose(got, wanted, rtol=LOSS_TOLERANCE, atol=0)


def test_a_recorded_step_never_waits():
    """Once recorded, no step makes the host wait for the device, also when the learning rate has changed."""
    engine = cf.Engine(frozen(), "device")
    batches = engine.loader(loader())
    engine.model.train()
    trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    step = engine.compile_step(functional.cross_entropy, optimizer)
    for _ in range(2):
        for x, y in batches:
            step(x, y)
    assert (step.how, step.reason) == ("graph", None)
    remaining = iter(batches)
    step(*next(remaining))
    with no_synchronisation():
        for x, y in remaining:
            optimizer.param_groups[0]["lr"] *= 0.9
            step(x, y)


def test_a_step_that_reads_the_device_runs_eagerly():
    """A loss that reads a value cannot be recorded: the training is the eager one, and the reason says so.

    What a recording that failed could leave behind is not there: another current stream, and a generator that draws no
    more.
    """

    def loss_fn(output, target):
        loss = functional.cross_entropy(functional.dropout(output), target)
        return loss * 2 if float(loss.detach()) > 1e9 else loss

    engine = cf.Engine(frozen(), "device")
    batches = engine.loader(loader())
    engine.model.train()
    trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    step = engine.compile_step(loss_fn, torch.optim.SGD(trained, lr=0.01))
    stream = torch.cuda.current_stream()
    for _ in range(2):
        for x, y in batches:
            assert step(x, y).isfinite()
    assert step.how == "eager"
    assert step.reason
    assert torch.cuda.current_stream() == stream


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_heads_train_as_each_alone(compiled, attached):
    """Three learning rates from one pass, compiled, with one update or neither: a head's losses are as alone."""
    rates = (0.1, 0.03, 0.01)
    alone = []
    for rate in rates:
        engine = cf.Engine(frozen(), "device")
        batches = engine.loader(loader())
        trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=rate)
        engine.model.train()
        losses = []
        for _ in engine.epochs(2):
            for x, y in batches:
                optimizer.zero_grad()
                losses.append(functional.cross_entropy(engine(x), y))
                losses[-1].backward()
                optimizer.step()
        alone.append(torch.stack(losses).detach())
    engine = cf.Engine(frozen(), "device")
    batches = engine.loader(loader())
    heads = engine.heads(len(rates))
    optimizer = torch.optim.SGD([{"params": heads.parameters(i), "lr": rate} for i, rate in enumerate(rates)])
    if attached:
        heads.attach(optimizer)
    step = heads.compile_step(functional.cross_entropy, optimizer)
    engine.model.train()
    together = []
    for _ in engine.epochs(2):
        for x, y in batches:
            if compiled:
                together.append(step(x, y))
            else:
                optimizer.zero_grad()
                together.append(heads.losses(functional.cross_entropy, x, y))
                together[-1].sum().backward()
                optimizer.step()
    assert heads.how == "stacked", heads.reason
    assert not compiled or (step.how, step.reason) == ("graph", None)
    assert torch.allclose(torch.stack(together).detach().T, torch.stack(alone), rtol=1e-3, atol=0)


def test_engines_share_a_device_store():
    """The second engine finds the rows that the first one put on the device."""
    first = cf.Engine(frozen(), "device")
    for _ in first.loader(loader()):
        pass
    second = cf.Engine(frozen(), first.cache)
    batches = second.loader(loader())
    for _ in batches:
        pass
    assert (batches.source, batches.counts.cached) == ("cached", COUNT)
