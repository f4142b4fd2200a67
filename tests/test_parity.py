"""Cached training equals uncached training: losses, outputs, gradients, buffers, final weights, bit for bit.

This is the test that is never weakened: on the CPU, with the exact prefix, there is no tolerance.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf

torchvision = pytest.importorskip("torchvision")

# model, boundary, pixels; the last batch of an epoch is smaller than the others
CASES = [
    ("mobilenet_v2", "features.14", 32),
    ("mobilenet_v2", "classifier", 32),
    ("resnet18", "layer3", 32),
    ("resnet18", "layer4.1.conv2", 32),
    ("squeezenet1_1", "features.9", 64),
    ("densenet121", "features.denseblock4", 32),
]


def make_model(name, size):
    torch.manual_seed(0)
    if name == "vit_tiny":
        model = torchvision.models.VisionTransformer(
            image_size=size, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=5
        )
    else:
        model = getattr(torchvision.models, name)(num_classes=5)
    # statistics that differ from their start, as a pretrained network's do
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def make_data(size, count=11):
    torch.manual_seed(1)
    return TensorDataset(torch.randn(count, 3, size, size), torch.randint(0, 5, (count,)))


def train(model, boundary, data, store, *, epochs=3, optimizer="adamw", workers=0, dtype=None, stochastic="eval"):
    """Losses, outputs and gradients of every step, and the state of the model and of the random generators."""
    cf.freeze(model, boundary, stochastic=stochastic)
    torch.manual_seed(2)
    order = torch.Generator().manual_seed(3)
    engine = cf.Engine(model, store, dtype=dtype)
    loader = engine.loader(DataLoader(data, 4, shuffle=True, generator=order, num_workers=workers))
    trained = [p for p in model.parameters() if p.requires_grad]
    stepper = torch.optim.AdamW(trained, 1e-3) if optimizer == "adamw" else torch.optim.SGD(trained, 0.05, momentum=0.9)
    steps, sources = [], []
    for _ in engine.epochs(epochs):
        model.train()
        for x, y in loader:
            stepper.zero_grad()
            output = engine(x)
            loss = functional.cross_entropy(output, y)
            loss.backward()
            grads = [None if p.grad is None else p.grad.clone() for p in trained]
            stepper.step()
            steps.append((loss.detach(), output.detach().clone(), grads))
        sources.append(loader.source)
    engine.close()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return steps, state, torch.rand(3), sources


def assert_equal(got, expected):
    for (loss, output, grads), (loss2, output2, grads2) in zip(got[0], expected[0], strict=True):
        assert torch.equal(loss, loss2)
        assert torch.equal(output, output2)
        for a, b in zip(grads, grads2, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert got[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert torch.equal(got[1][name], value), name
    assert torch.equal(got[2], expected[2]), "another random state than uncached training leaves"


@pytest.mark.parametrize(("name", "boundary", "size"), CASES)
def test_cached_training_is_uncached_training(name, boundary, size, tmp_path):
    base, data = make_model(name, size), make_data(size)
    expected = train(copy.deepcopy(base), boundary, data, "off")
    assert expected[3] == ["frozen"] * 3
    for store in ("host", "device", f"hdf5:{tmp_path}"):
        got = train(copy.deepcopy(base), boundary, data, store)
        assert got[3] == ["fill", "cached", "cached"]
        assert_equal(got, expected)
    again = train(copy.deepcopy(base), boundary, data, f"hdf5:{tmp_path}")
    assert again[3] == ["cached"] * 3
    assert_equal(again, expected)


def test_frozen_layers_behind_a_live_dropout_run_at_every_step(tmp_path):
    """Rows are taken before the first module that draws; frozen statistics behind it stand still."""
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout2d(0.3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 5),
    )  # fmt: skip
    data = make_data(16)
    expected = train(copy.deepcopy(base), "9", data, "off", stochastic="train")
    rested = train(copy.deepcopy(base), "9", data, "host")
    assert not torch.equal(rested[0][0][1], expected[0][0][1])
    for store in ("host", f"hdf5:{tmp_path}"):
        got = train(copy.deepcopy(base), "9", data, store, stochastic="train")
        assert got[3] == ["fill", "cached", "cached"]
        assert_equal(got, expected)
    for name, value in base.state_dict().items():
        assert name.startswith("9.") or torch.equal(value, expected[1][name]), name


@pytest.mark.parametrize(
    ("name", "boundary", "dtype", "tolerance"),
    [
        ("vit_tiny", "encoder.layers.encoder_layer_10", torch.float32, 1e-5),
        # batch norm over a few values amplifies one ulp beyond 1e-5 in float32, so this one is exact to more digits
        ("efficientnet_b0", "features.6", torch.float64, 1e-10),
    ],
)
def test_parity_step_by_step_where_the_prefix_is_not_bit_invariant(name, boundary, dtype, tolerance):
    """These prefixes round by batch size: one ulp, which whole trajectories amplify.

    So every step is compared from equal weights: loss and gradients on the cached rows and on the raw batch.
    """
    model, data = make_model(name, 64).to(dtype), make_data(64)
    data = TensorDataset(data.tensors[0].to(dtype), data.tensors[1])
    cf.freeze(model, boundary)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01)
    engine = cf.Engine(model, "host")
    loader = engine.loader(DataLoader(TensorDataset(*data.tensors, torch.arange(len(data))), 4, shuffle=True))
    for _ in engine.epochs(3):
        model.train()
        for rows, y, index in loader:
            found = []
            for x in (rows, data.tensors[0][index]):
                kept = {name: value.clone() for name, value in model.state_dict().items()}
                torch.manual_seed(int(index[0]))
                loss = functional.cross_entropy(engine(x), y)
                found.append((loss.detach(), torch.autograd.grad(loss, trained)))
                model.load_state_dict(kept)
            (loss, grads), (expected, expected_grads) = found
            assert torch.allclose(loss, expected, rtol=tolerance)
            scale = max(float(g.abs().max()) for g in expected_grads)
            for a, b in zip(grads, expected_grads, strict=True):
                assert float((a - b).abs().max()) <= tolerance * scale
            for parameter, grad in zip(trained, expected_grads, strict=True):
                parameter.grad = grad
            optimizer.step()
    assert loader.source == "cached"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_parity_with_workers_and_optimizers(optimizer, workers):
    base, data = make_model("mobilenet_v2", 32), make_data(32, 23)
    expected = train(copy.deepcopy(base), "features.16", data, "off", optimizer=optimizer, workers=workers)
    got = train(copy.deepcopy(base), "features.16", data, "host", optimizer=optimizer, workers=workers)
    assert_equal(got, expected)


def test_parity_in_channels_last():
    """The memory format of the boundary survives the store."""
    base = make_model("resnet18", 32).to(memory_format=torch.channels_last)
    x, y = make_data(32).tensors
    data = TensorDataset(x.to(memory_format=torch.channels_last), y)
    expected = train(copy.deepcopy(base), "layer3", data, "off")
    got = train(copy.deepcopy(base), "layer3", data, "host")
    # the DataLoader's stack gives contiguous batches, so both start from the same layout
    assert_equal(got, expected)


def test_the_frozen_part_does_not_move():
    base, data = make_model("mobilenet_v2", 32), make_data(32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    _, after, _, _ = train(base, "features.14", data, "host")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    frozen = {n for n in before if n.startswith("features.") and int(n.split(".")[1]) < 14}
    assert not moved & frozen
    assert any("running_mean" in name for name in moved), "BN behind the boundary trains"


def test_half_precision_rows_differ_only_by_their_rounding():
    base, data = make_model("mobilenet_v2", 32), make_data(32)
    exact = train(copy.deepcopy(base), "classifier", data, "off", epochs=1)
    half = train(copy.deepcopy(base), "classifier", data, "host", epochs=1, dtype="float16")
    first_exact, first_half = exact[0][0][0], half[0][0][0]
    assert not torch.equal(first_exact, first_half), "a fill epoch yields what the store would return"
    assert torch.allclose(first_exact, first_half, atol=1e-2)


def test_whole_model_on_raw_inputs():
    """engine(raw) is the whole model, also while rows are cached."""
    model = make_model("mobilenet_v2", 32)
    cf.freeze(model, "classifier")
    engine = cf.Engine(model, "host")
    data = make_data(32)
    loader = engine.loader(DataLoader(data, 4))
    model.eval()
    raw = data.tensors[0][:4]
    with torch.no_grad():
        assert torch.equal(engine(raw), model(raw))
        rows, _ = next(iter(loader))
        assert torch.equal(engine(rows), model(raw))
