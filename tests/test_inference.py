"""An optimized prefix: what is folded, how far its rows may be from the exact ones, and what is left as it was."""

from __future__ import annotations

import copy
import gc
import json
import logging
import types
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze import optimized, splitting
from cachefreeze.errors import StaleCacheError, UsageError
from cachefreeze.inference import Form, InferenceCopy, relative_error
from cachefreeze.isolation import RandomState
from cachefreeze.portions import EqualPortions, Portions
from cachefreeze.splitting import BoundaryTensor
from cachefreeze.splitting.replay_executor import ReplayExecutor
from cachefreeze.tracing import Example

COUNT, BATCH = 40, 8


class Residual(nn.Module):
    """A block as torchvision writes it: two folds, and a skip."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class SmallNet(nn.Module):
    """Three batch norms that can be folded."""

    def __init__(self, block=Residual):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = block(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def with_statistics(model, seed=0):
    """Statistics and weights that a batch norm which was left out, or folded wrongly, would show."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = 0.25  # the usual 1e-5 is below what the comparisons here allow
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def made(block=Residual, seed=0):
    torch.manual_seed(seed)
    model = with_statistics(SmallNet(block))
    cf.freeze(model, train_from="head", example_inputs=images(2))
    return model


def images(count=COUNT):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def dataset(count=COUNT):
    return TensorDataset(images(count), torch.arange(count) % 5)


def parts_of(model, executor=None, monkeypatch=None):
    if executor is not None:
        monkeypatch.setattr(splitting, "_EXECUTORS", (executor,))
    return cf.split(model, images(4))


def error_of(parts, form=None):
    """Of a copy against the prefix, and the copy."""
    some = Example.of(images(6))
    found = InferenceCopy(parts, Form() if form is None else form, some)
    exact = parts.prefix(images(6))
    return relative_error(parts.boundary.tensors, [exact], list(found(images(6)))), found


@pytest.fixture(autouse=True)
def few_rows_suffice(monkeypatch):
    monkeypatch.setattr(optimized, "_FEWEST_ROWS", 0)
    monkeypatch.setattr(optimized, "_SHORTEST_SECONDS", 0.0)


@pytest.fixture
def never_exact(monkeypatch):
    """The choice without its noise: on inputs this small an exact prefix may well be the fastest."""
    fastest = optimized._Trial._fastest
    monkeypatch.setattr(optimized, "_WORTHWHILE", 0.0)
    monkeypatch.setattr(
        optimized._Trial, "_fastest", staticmethod(lambda found: fastest([c for c in found if c.form] or found))
    )


# --- the copy ---


@pytest.mark.parametrize("executor", [None, ReplayExecutor()], ids=["fx", "replay"])
@pytest.mark.parametrize("form", [Form(), Form(channels_last=True)], ids=str)
def test_a_copy_computes_what_the_prefix_does_with_its_batch_norms_folded(executor, form, monkeypatch):
    """By either executor and within blocks of any code, and the user's model is as before: weights, modes, modules."""
    model = made()
    model.train()
    parts = parts_of(model, executor, monkeypatch)
    state = copy.deepcopy(model.state_dict())
    modules = [
        (name, module, module.training, len(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]
    pointers = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    strides = [tensor.stride() for tensor in model.parameters()]
    error, found = error_of(parts, form)
    assert found.folded == 3
    assert error < 1e-5
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert modules == [
        (n, module, module.training, len(module._forward_pre_hooks)) for n, module in model.named_modules()
    ]
    assert pointers == [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    assert strides == [tensor.stride() for tensor in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_copy_in_half_precision_gives_the_boundary_s_own_dtype(dtype):
    error, found = error_of(parts_of(made()), Form(dtype=dtype))
    (rows,) = found(images(6))
    assert rows.dtype == torch.float32
    assert 1e-5 < error < 2e-2


def test_what_trains_is_not_copied(monkeypatch):
    """The copy of a replay holds the whole model; it shares what lies behind the boundary, unchanged."""
    model = made()
    parts = parts_of(model, ReplayExecutor(), monkeypatch)
    found = error_of(parts, Form(dtype=torch.bfloat16))[1]
    assert found._kind.root.head.weight is model.head.weight
    assert model.head.weight.dtype == torch.float32


class ReadTwice(nn.Module):
    """The batch norm is not all that reads the convolution."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)

    def forward(self, x):
        x = self.conv(x)
        return self.bn(x) + x


class CalledTwice(ReadTwice):
    def forward(self, x):
        return self.bn(self.conv(self.bn(self.conv(x))))


class WeightReadTwice(ReadTwice):
    """The weight is used by a function as well."""

    def forward(self, x):
        return self.bn(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight)


class NoStatistics(ReadTwice):
    """Of each sample and channel, in eval mode too."""

    def __init__(self, width):
        super().__init__(width)
        self.bn = nn.InstanceNorm2d(width, affine=True)

    def forward(self, x):
        return self.bn(self.conv(x)).square()


class Subclass(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnNorm(NoStatistics):
    def __init__(self, width):
        super().__init__(width)
        self.bn = Subclass(width)


class OverSteps(nn.Module):
    """The norm after a Linear over a sequence normalises steps, not features."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.bn = nn.Linear(12, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.bn(self.linear(x[:, :, 0])).unsqueeze(2)


@pytest.mark.parametrize("block", [ReadTwice, CalledTwice, WeightReadTwice, NoStatistics, OwnNorm, OverSteps])
def test_what_cannot_be_folded_is_not(block):
    """Only the stem's norm is; and the copy still computes what the prefix does."""
    error, found = error_of(parts_of(made(block)))
    assert found.folded == 1
    assert error < 1e-5


class Features(nn.Module):
    """A Linear of features with its norm, without affine weights, under two names."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.bn = nn.Linear(width, width, bias=False), nn.BatchNorm1d(width, affine=False)
        self.again = self.bn

    def forward(self, x):
        return self.again(self.linear(x.mean((2, 3))))[:, :, None, None]


def test_a_linear_layer_s_norm_is_folded_under_every_name():
    error, found = error_of(parts_of(made(Features)))
    assert found.folded == 2
    assert error < 1e-5


def test_a_hooked_layer_is_not_folded():
    """A hook sees what it saw before: the layer's own output."""
    model = made()
    seen = []
    model.block.conv1.register_forward_hook(lambda *call: seen.append(call[2].clone()))
    parts = parts_of(model)
    parts.prefix(images(6))
    error, found = error_of(parts)
    assert found.folded == 2
    assert error < 1e-5
    whole = [value for value in seen if len(value) == 6]
    assert len(whole) == 3
    assert torch.allclose(whole[0], whole[-1], atol=1e-5)


# --- the choice ---


def test_rows_are_within_the_tolerance_and_the_choice_is_reported(never_exact, caplog):
    """Of a training pass: rows, labels, random states, weights; and ``info()`` and the log say what was chosen."""
    caplog.set_level(logging.INFO, "cachefreeze")
    model = made()
    engine = cf.Engine(model, "host", prefix="optimized")
    loader = engine.loader(DataLoader(dataset(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(3)))
    assert engine.cache.made_by == {"choice": "optimized", "tolerance": 1e-3}
    state = RandomState.capture()
    batches = list(loader)
    drawn = state.moved()
    plain = DataLoader(dataset(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(3))
    for (rows, labels), (x, y) in zip(batches, plain, strict=True):
        exact = engine.parts.prefix(x)
        assert torch.equal(labels, y)
        assert not torch.equal(rows.tensors[0], exact)
        assert relative_error(engine.parts.boundary.tensors, [exact], [rows.tensors[0]]) < 1e-5
    assert drawn == []
    facts = engine.cache.info()["train"]["prefix"]
    assert facts["choice"].startswith("3 batch norms folded")
    assert 0 < facts["error"] < 1e-5
    assert facts["gain"] == facts["exact_seconds"] / facts["seconds"]
    assert facts["size"] in (4, 8)
    assert "not compiled: the fill is predicted to take 0 s" in facts["declined"]
    assert f"error {facts['error']:.1e} (allowed 1e-03)" in caplog.text
    json.dumps(facts)


def test_an_error_beyond_the_tolerance_gives_exact_rows_and_says_so(caplog):
    parts = parts_of(made())
    manager = cf.CacheManager(parts, "host", prefix=cf.Optimized(dtype=torch.bfloat16, tolerance=1e-12))
    loader = manager.loader(DataLoader(dataset(), BATCH))
    found = torch.cat([rows.tensors[0] for rows, _ in loader])
    assert relative_error(parts.boundary.tensors, [parts.prefix(images())], [found]) < 1e-6
    facts = manager.info()["train"]["prefix"]
    assert facts["choice"] == "exact"
    for form in ("folded, bfloat16", "folded, bfloat16, channels_last", "folded", "folded, channels_last"):
        assert any(r.startswith(f"refused {form}: error ") and r.endswith("beyond 1e-12") for r in facts["declined"])
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_where_a_half_precision_is_not_near_enough_the_model_s_own_is_tried(never_exact):
    manager = cf.CacheManager(parts_of(made()), "host", prefix=cf.Optimized(dtype=torch.bfloat16, tolerance=1e-5))
    list(manager.loader(DataLoader(dataset(), BATCH)))
    facts = manager.info()["train"]["prefix"]
    assert facts["choice"].startswith("3 batch norms folded")
    assert "bfloat16" not in facts["choice"]
    assert any(reason.startswith("refused folded, bfloat16: error ") for reason in facts["declined"])


class NotCopied(Residual):
    def __deepcopy__(self, memo):
        raise RuntimeError("holds a file")


def test_a_prefix_that_cannot_be_copied_stays_exact(caplog):
    parts = parts_of(made(NotCopied))
    manager = cf.CacheManager(parts, "host", prefix="optimized")
    list(manager.loader(DataLoader(dataset(), BATCH)))
    facts = manager.info()["train"]["prefix"]
    assert facts["choice"] == "exact"
    assert "refused folded: RuntimeError: holds a file" in facts["declined"]
    assert "holds a file" in caplog.text


def test_a_few_rows_are_exact_without_a_measurement(monkeypatch):
    """Measuring would cost more than it saves."""
    monkeypatch.setattr(optimized, "_FEWEST_ROWS", COUNT + 1)
    parts = parts_of(made())
    manager = cf.CacheManager(parts, "host", prefix="optimized")
    found = torch.cat([rows.tensors[0] for rows, _ in manager.loader(DataLoader(dataset(), BATCH))])
    assert torch.equal(found, parts.prefix(images()))
    declined = ["only 40 rows were to be computed"]
    assert manager.made_by == {"choice": "exact", "tolerance": 1e-3, "declined": declined}


def test_a_short_fill_is_exact(monkeypatch):
    monkeypatch.setattr(optimized, "_SHORTEST_SECONDS", 1e9)
    parts = parts_of(made())
    manager = cf.CacheManager(parts, "host", prefix="optimized")
    found = torch.cat([rows.tensors[0] for rows, _ in manager.loader(DataLoader(dataset(), BATCH))])
    assert torch.equal(found, parts.prefix(images()))
    assert manager.made_by["choice"] == "exact"
    assert manager.made_by["declined"][0].startswith("the exact fill is predicted to take ")


def test_where_the_choice_is_exact_rows_are_made_as_without_a_choice(monkeypatch):
    """A few at a time, where that gives the same bits: who asked for the fastest prefix must not get the slower one."""
    monkeypatch.setattr(optimized, "_FEWEST_ROWS", COUNT + 1)
    asked, run = [], EqualPortions.run
    monkeypatch.setattr(EqualPortions, "run", lambda own, *given: asked.append(given[2]) or run(own, *given))
    counts = {}
    for prefix in ("exact", "optimized"):
        asked.clear()
        list(cf.CacheManager(parts_of(made()), "host", prefix=prefix).loader(DataLoader(dataset(), BATCH)))
        counts[prefix] = list(asked)
    assert counts["optimized"] == counts["exact"]
    assert sum(counts["exact"]) == COUNT


def test_a_batch_of_one_can_be_the_first(never_exact):
    parts = parts_of(made())
    manager = cf.CacheManager(parts, "host", prefix="optimized")
    found = torch.cat([rows.tensors[0] for rows, _ in manager.loader(DataLoader(dataset(5), 1))])
    assert relative_error(parts.boundary.tensors, [parts.prefix(images(5))], [found]) < 1e-5


def test_a_file_is_not_shared_with_exact_rows(never_exact, tmp_path):
    """Neither way; with the same choice it is reused, checked against the exact prefix, and nothing is measured."""
    parts = parts_of(made())
    counts = {}
    for number, prefix in enumerate(["exact", "optimized", "optimized:bfloat16", "exact", "optimized:bfloat16"]):
        manager = cf.CacheManager(parts, f"hdf5:{tmp_path}", prefix=prefix)
        loader = manager.loader(DataLoader(dataset(), BATCH))
        list(loader)
        counts[number] = loader.counts.computed
        if number == 4:
            assert manager.made_by == {"choice": "optimized", "tolerance": 2e-2}
        manager.close()
    assert counts == {0: COUNT, 1: COUNT, 2: COUNT, 3: 0, 4: 0}
    assert len(list(tmp_path.glob("*.h5"))) == 3


def test_wrong_optimized_rows_are_caught_when_a_file_is_opened(never_exact, tmp_path):
    parts = parts_of(made())
    manager = cf.CacheManager(parts, f"hdf5:{tmp_path}", prefix="optimized")
    loader = manager.loader(DataLoader(dataset(), BATCH))
    manager.fill(loader)
    store = loader.rows.store
    values = store.read(torch.arange(COUNT))
    store.write(torch.arange(COUNT), {**values, "activation.0": values["activation.0"] * 1.1})
    manager.close()
    again = cf.CacheManager(parts, f"hdf5:{tmp_path}", prefix="optimized")
    with pytest.raises(StaleCacheError, match="differs from what is computed now"):
        again.loader(DataLoader(dataset(), BATCH))


def test_a_prefix_weight_that_changed_is_still_caught(never_exact):
    model = made()
    engine = cf.Engine(model, "host", prefix="optimized")
    loader = engine.loader(DataLoader(dataset(), BATCH))
    next(iter(loader))
    with torch.no_grad():
        model.stem[0].weight.mul_(1.01)
    with pytest.raises(StaleCacheError, match="changed since the cache was opened"):
        next(iter(loader))


def test_the_copy_is_freed_once_every_row_is_there(never_exact):
    """And made again for a row that is computed again."""
    parts = parts_of(made())
    manager = cf.CacheManager(parts, "host", prefix="optimized")
    loader = manager.loader(DataLoader(dataset(), BATCH))
    next(iter(loader))
    manager.commit()
    held = weakref.ref(manager._prefix._copy)
    assert held() is not None
    manager.fill(loader)
    gc.collect()
    assert held() is None
    (again,) = manager._prefix.run(Example.of(images(4)), 4)
    assert relative_error(parts.boundary.tensors, [parts.prefix(images(4))], [again]) < 1e-5


def test_compiling_is_tried_where_asked_for_and_falls_back_with_the_reason(never_exact, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    manager = cf.CacheManager(parts_of(made()), "host", prefix=cf.Optimized(compile=True))
    list(manager.loader(DataLoader(dataset(), BATCH)))
    assert "compiled: RuntimeError: no C++ compiler" in caplog.text
    assert manager.made_by["choice"].startswith("3 batch norms folded")


def test_a_long_fill_is_compiled_for_where_that_is_faster(never_exact, monkeypatch):
    """The predicted time decides, and a portion of another size than was compiled for runs as it is."""
    sizes = []

    class Compiled(nn.Module):
        def __init__(self, graph):
            super().__init__()
            self.graph = graph

        def forward(self, x):
            sizes.append(len(x))
            return self.graph(x)

    monkeypatch.setattr(torch, "compile", lambda graph, **_: Compiled(graph))
    monkeypatch.setattr(optimized, "_COMPILE_FROM_SECONDS", 0.0)
    monkeypatch.setattr(optimized._Trial, "_fastest", staticmethod(lambda found: found[-1]))
    parts = parts_of(made())
    manager = cf.CacheManager(parts, "host", prefix="optimized")
    found = torch.cat([rows.tensors[0] for rows, _ in manager.loader(DataLoader(dataset(11), 11))])
    assert manager.made_by["choice"].endswith("compiled")
    assert relative_error(parts.boundary.tensors, [parts.prefix(images(11))], [found]) < 1e-5
    assert len(set(sizes)) == 1


@pytest.mark.slow
def test_compiled_code_computes_what_the_prefix_does():
    """With the real compiler, where there is one."""
    error, found = error_of(parts_of(made()), Form(channels_last=True, compiled=True))
    assert found.folded == 3
    assert error < 1e-5


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: cf.Engine(made(), prefix="fast"), "prefix='fast': expected one of exact, optimized,"),
        (lambda: cf.Engine(made(), "off", prefix="optimized"), "store='off' keeps none"),
        (lambda: cf.Optimized(dtype=torch.float32), r"expected None, torch\.bfloat16 or torch\.float16"),
        (lambda: cf.Optimized(tolerance=0.0), "expected a share"),
        (
            lambda: cf.CacheManager(parts_of(made()), prefix="optimized:float16", autocast=torch.bfloat16),
            "both say in which precision",
        ),
    ],
)
def test_wrong_use_is_refused(wrong, match):
    with pytest.raises(UsageError, match=match):
        wrong()


def test_under_autocast_the_tolerance_is_that_of_its_precision():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert cf.Optimized().allowed(None, cpu) == 1e-3
    assert cf.Optimized().allowed(torch.bfloat16, cpu) == 2e-2
    assert cf.Optimized(dtype=torch.float16).allowed(None, cpu) == 5e-3
    assert cf.Optimized(tolerance=0.1).allowed(None, cpu) == 0.1
    assert cf.Optimized().allowed(None, cuda) == (5e-3 if torch.backends.cudnn.allow_tf32 else 1e-3)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch 2.9 brought it")
@pytest.mark.parametrize(("precision", "allowed"), [("ieee", 1e-3), ("tf32", 5e-3)])
def test_convolutions_have_a_precision_of_their_own(precision, allowed):
    """One that differs from that of recurrent layers, of which torch's older setting knows nothing."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        assert cf.Optimized().allowed(None, torch.device("cuda")) == allowed
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


# --- the error ---


def spec_of(tensor, batch_dim=0):
    return (BoundaryTensor.of(tensor, batch_dim),)


def test_the_error_is_relative_to_each_sample():
    """A small sample beside a large one keeps its digits; one that is all but zero has none to lose."""
    exact = torch.tensor([[100.0, 0.0], [1.0, 0.5], [0.0, 0.0]])
    off = exact.clone()
    off[1, 1] += 0.01
    assert relative_error(spec_of(exact), [exact], [off]) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(spec_of(exact.T, 1), [exact.T], [off.T]) == pytest.approx(0.01, rel=1e-4)
    off[2, 0] = 0.001
    assert relative_error(spec_of(exact), [exact], [off]) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_an_error_unless_the_exact_one_is_not_either(value):
    exact, off = torch.ones(2, 2), torch.ones(2, 2)
    off[0, 0] = value
    assert relative_error(spec_of(exact), [exact], [off]) == float("inf")
    assert relative_error(spec_of(exact), [off], [exact]) == float("inf")


def test_integers_must_be_equal():
    exact = torch.arange(4).view(2, 2)
    assert relative_error(spec_of(exact), [exact], [exact.clone()]) == 0
    assert relative_error(spec_of(exact), [exact], [exact + 1]) == float("inf")


# --- memory that is too small ---


class Limited(nn.Module):
    """Has memory for ``most`` samples."""

    def __init__(self, most, *, writes=False):
        super().__init__()
        self.most, self.writes, self.sizes = most, writes, []

    def forward(self, x):
        self.sizes.append(len(x))
        if self.writes:
            x.add_(1)
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x * 2


def test_out_of_memory_halves_the_portions_for_good(caplog):
    model, portions = Limited(5), Portions()
    x = torch.randn(13, 3)
    (rows,) = portions.run(model, Example.of(x), 13, spec_of(x))
    assert torch.equal(rows, x * 2)
    assert (portions.size, model.sizes) == (3, [13, 6, 3, 3, 3, 3, 2])  # a single sample is computed as two
    portions.run(model, Example.of(x[:4]), 4, spec_of(x))
    assert model.sizes[7:] == [3, 2]
    assert "ran out of memory on 13 samples at once; from now on it runs on 6" in caplog.text


class Paced(nn.Module):
    """Of more than four samples each takes some time and memory, and the sum of a row may be made in another order."""

    now, pages = 0.0, 0

    def __init__(self, seconds, *, rounding=0.0, mapping=1_000_000):
        super().__init__()
        self.seconds, self.rounding, self.mapping, self.sizes = seconds, rounding, mapping, []

    def forward(self, x):
        self.sizes.append(len(x))
        few = len(x) <= 4
        Paced.now += len(x) * (1 if few else self.seconds)
        Paced.pages += len(x) * self.mapping
        return x * 2 + (0.0 if few else self.rounding)


@pytest.mark.parametrize(
    ("model", "ahead", "trial", "later"),
    [
        (Paced(2), 48, [4] * 4, [4] * 4),
        (Paced(2, rounding=1e-6), 48, [4], [16]),
        (Paced(1), 48, [4] * 2, [16]),
        (Paced(2), 47, [], [16]),
        (Paced(2, mapping=1000), 48, [], [16]),
    ],
    ids=["equal and sooner", "not equal", "not sooner", "too few rows", "little memory mapped"],
)
def test_exact_rows_are_made_a_few_at_a_time_where_they_are_the_same(model, ahead, trial, later, monkeypatch):
    """Each batch size is tried once, on real samples; what is then made is bit for bit what a whole batch gives."""
    monkeypatch.setattr("cachefreeze.portions.time", types.SimpleNamespace(perf_counter=lambda: Paced.now))
    monkeypatch.setattr("cachefreeze.portions._pages_mapped", lambda: Paced.pages)
    portions, x = EqualPortions(), torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    for sizes in ([16, *trial], later, later):
        model.sizes.clear()
        (rows,) = portions.run(model, Example.of(x), 16, spec_of(x), ahead)
        assert torch.equal(rows, x * 2 + model.rounding)
        assert model.sizes == sizes
    (rows,) = portions.run(model, Example.of(x[:7]), 7, spec_of(x), ahead)
    assert model.sizes[-1] == 7


def test_two_samples_that_are_too_many_raise():
    with pytest.raises(torch.OutOfMemoryError):
        Portions().run(Limited(1), Example.of(torch.ones(8, 3)), 8, spec_of(torch.ones(8, 3)))


def test_inputs_that_were_written_are_not_run_again():
    """They are no longer what the loader gave."""
    model = Limited(4, writes=True)
    with pytest.raises(torch.OutOfMemoryError):
        Portions().run(model, Example.of(torch.ones(8, 3)), 8, spec_of(torch.ones(8, 3)))
    assert model.sizes == [8]


def test_a_fill_goes_on_with_smaller_portions(monkeypatch):
    """With the exact prefix: rows of a batch half as large, equal within what another batch size rounds."""
    parts = parts_of(made())
    whole = type(parts.prefix).forward
    sizes = []

    def limited(self, x):
        sizes.append(len(x))
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, x)

    manager = cf.CacheManager(parts, "host")
    loader = manager.loader(DataLoader(dataset(), BATCH))
    monkeypatch.setattr(type(parts.prefix), "forward", limited)
    manager.fill(loader)
    monkeypatch.undo()
    assert sizes == [8] + [4] * 10
    stored = loader.rows.store.read(torch.arange(COUNT))["activation.0"]
    assert torch.allclose(stored, parts.prefix(images()), rtol=1e-5, atol=1e-6)
