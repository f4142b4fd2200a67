"""Segments: rows at one boundary become the rows of a deeper one, without the samples."""

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import cachefreeze as cf
from cachefreeze import splitting
from cachefreeze.errors import SplitError
from cachefreeze.splitting import ReplayExecutor
from cachefreeze.splitting.fx_segment import FxSegment
from cachefreeze.testing.traps import TRAPS, Dense, Masked, Skip, images, vectors
from cachefreeze.tracing import Example


def rows_of(parts, inputs):
    made = Example.of(inputs).fresh().call(parts.prefix)
    return [row.clone() for row in (made if isinstance(made, tuple) else (made,))]


def assert_segment(model, inputs, first, second, others=None):
    """What the segment makes of rows is what the deeper prefix makes of samples: bit for bit, other samples too."""
    model.eval()
    shallower, deeper = (cf.split(model, inputs, name) for name in (first, second))
    segment = shallower.segment_to(deeper)
    for some in (inputs, others if others is not None else inputs):
        made = segment(*rows_of(shallower, some))
        for got, wanted in zip(made if isinstance(made, tuple) else (made,), rows_of(deeper, some), strict=True):
            assert torch.equal(got, wanted)
            assert not got.requires_grad
    return segment


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("resnet18", "layer2", "layer4"),
        ("resnet18", "layer2.1", "fc"),
        ("mobilenet_v2", "features.4", "features.14"),
        ("mobilenet_v2", "features.4", "classifier"),
        ("densenet121", "features.denseblock2", "features.denseblock3.denselayer4"),
        ("squeezenet1_1", "features.6", "features.9"),
    ],
)
def test_of_image_models(name, first, second):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=3)
    size = 64 if name == "squeezenet1_1" else 32
    assert_segment(model, torch.randn(3, 3, size, size), first, second, torch.randn(2, 3, size, size))


@pytest.mark.parametrize(
    ("make", "inputs", "first", "second"),
    [
        (Skip, vectors, "second", "third"),
        (Dense, images, "layers.1", "layers.2"),
        (Masked, TRAPS["masked_mid"].inputs, "layers.1", "head"),
    ],
)
def test_of_traps(make, inputs, first, second):
    torch.manual_seed(0)
    assert_segment(make(), inputs(), first, second)


class UNet(nn.Module):
    """Skips lead over the boundaries."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1, stride=1 + (i > 0)) for i in range(3))
        self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(2))
        self.act = nn.ReLU()
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            x = self.act(layer(x))
            kept.append(x)
        for layer, skip in zip(self.up, kept[-2::-1], strict=True):
            x = self.act(layer(torch.cat([functional.interpolate(x, scale_factor=2.0), skip], 1)))
        return self.head(x)


@pytest.mark.parametrize(("first", "second"), [("down.1", "down.2"), ("down.2", "up.1"), ("up.0", "head")])
def test_skips_go_along(first, second):
    torch.manual_seed(0)
    assert_segment(UNet(), images(), first, second)


class Functional(nn.Module):
    """Activations and pooling as functions, so that a traced row is another value than a module's output."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = functional.relu(conv(x), inplace=True)
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize(("first", "second"), [("convs.1", "convs.3"), ("convs.1", "head"), ("convs.3", "head")])
def test_of_functional_models_by_one_graph(first, second):
    """Rows behind a function are told by content; the segment is a graph and costs no recording."""
    torch.manual_seed(0)
    segment = assert_segment(Functional(), images(), first, second, images()[:2] * 0.5)
    assert isinstance(segment, FxSegment)


def test_of_replayed_and_traced_splits_alike(monkeypatch):
    """Rows that the fx executor cut are told by their content."""
    torch.manual_seed(0)
    model = Skip().eval()
    shallower = cf.split(model, vectors(), "second")
    monkeypatch.setattr(splitting, "_EXECUTORS", (ReplayExecutor(),))
    deeper = cf.split(model, vectors(), "third")
    assert (shallower.executor, deeper.executor) == ("fx", "replay")
    made = shallower.segment_to(deeper)(*rows_of(shallower, vectors()))
    for got, wanted in zip(made, rows_of(deeper, vectors()), strict=True):
        assert torch.equal(got, wanted)


def test_modes_and_buffers_are_left_alone():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3)
    inputs = torch.randn(3, 3, 32, 32)
    segment = assert_segment(model, inputs, "layer2", "layer4")
    shallower = cf.split(model, inputs, "layer2")
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    segment(*rows_of(shallower, inputs))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_what_is_not_deeper_is_refused():
    model = Skip().eval()
    second, third = (cf.split(model, vectors(), name) for name in ("second", "third"))
    with pytest.raises(SplitError, match="expected a boundary deeper than 'third'"):
        third.segment_to(second)
    with pytest.raises(SplitError, match="same model object"):
        second.segment_to(cf.split(Skip().eval(), vectors(), "third"))


def test_a_wrong_segment_is_not_handed_out(monkeypatch):
    """Rows of another model are not what the deeper prefix makes."""
    model = Skip().eval()
    second, third = (cf.split(model, vectors(), name) for name in ("second", "third"))
    spoilt = third.prefix.forward
    monkeypatch.setattr(third.prefix, "forward", lambda *args: tuple(row + 1 for row in spoilt(*args)))
    with pytest.raises(SplitError, match="fill the"):
        second.segment_to(third)
