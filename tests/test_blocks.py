"""Blocks: the list of boundaries, in order of use, with what a cut there would cost and save."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import cachefreeze as cf
from cachefreeze.errors import UsageError
from cachefreeze.testing.traps import (
    Branches,
    Chain,
    ClassToken,
    FirstInPlace,
    HeadFirst,
    KeywordInputs,
    ShapesCross,
    Skip,
    images,
    sequences,
    tokens,
    vectors,
)

RESNET18 = [
    "conv1",
    "layer1.0",
    "layer1.1",
    "layer2.0",
    "layer2.1",
    "layer3.0",
    "layer3.1",
    "layer4.0",
    "layer4.1",
    "fc",
]
LISTS = {
    "resnet18": RESNET18,
    "mobilenet_v2": [*(f"features.{i}" for i in range(19)), "classifier"],
    "squeezenet1_1": [*(f"features.{i}" for i in (0, 3, 4, 6, 7, 9, 10, 11, 12)), "classifier"],
    "alexnet": [*(f"features.{i}" for i in (0, 3, 6, 8, 10)), "classifier"],
    "vit_b_16": ["conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in range(12)), "heads"],
}
OPTIONS = {"vit_b_16": {"image_size": 64}}


def names(found: list[cf.Block]) -> list[str]:
    return [block.name for block in found]


@pytest.mark.parametrize("name", LISTS)
def test_the_block_lists_of_torchvision_models(name):
    model = torchvision.models.get_model(name, num_classes=8, **OPTIONS.get(name, {}))
    assert names(cf.blocks(model)) == LISTS[name]
    assert names(cf.blocks(model, torch.randn(2, 3, 64, 64))) == LISTS[name]


def test_every_parameter_of_resnet18_belongs_to_one_block():
    model = torchvision.models.resnet18()
    assert sum(block.parameters for block in cf.blocks(model)) == sum(p.numel() for p in model.parameters())


def test_a_norm_belongs_to_the_layer_before_it():
    found = cf.blocks(Chain())
    assert [block.members for block in found] == [("conv1", "norm1"), ("conv2", "norm2"), ("head",)]
    assert found[0].parameters == 3 * 4 * 9 + 4 + 8


def test_order_of_use_beats_order_of_registration():
    assert names(cf.blocks(HeadFirst())) == names(cf.blocks(HeadFirst(), vectors())) == ["stem", "mid", "head"]


def test_without_inputs_there_are_no_bytes_and_no_share():
    assert all(b.bytes_per_sample is None and b.forward_before is None for b in cf.blocks(Chain()))


def test_bytes_are_those_that_cross_and_shares_grow_from_nothing_to_nearly_all():
    found = cf.blocks(torchvision.models.resnet18(num_classes=4), torch.randn(2, 3, 64, 64))
    floats = [3 * 64 * 64, *[64 * 256] * 2, 64 * 256, 128 * 64, 128 * 64, 256 * 16, 256 * 16, 512 * 4, 512]
    assert [b.bytes_per_sample for b in found] == [4 * n for n in floats]
    shares = [b.forward_before or 0.0 for b in found]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert 0.99 < shares[-1] < 1


def test_a_skip_is_counted_among_the_bytes():
    found = cf.blocks(Skip(), vectors())
    assert [b.bytes_per_sample for b in found] == [24, 48, 72, 24]


@pytest.mark.parametrize("block", ["layer2.0", "layer4.1", "fc"])
def test_figures_agree_with_those_of_the_split(block):
    model, x = torchvision.models.resnet18(num_classes=4), torch.randn(2, 3, 64, 64)
    listed = {b.name: b for b in cf.blocks(model, x)}[block]
    parts = cf.split(model, x, block)
    assert listed.bytes_per_sample == parts.boundary.bytes_per_sample
    assert listed.forward_before == pytest.approx(parts.cached_fraction, abs=1e-6)


def test_attention_counts_as_work():
    """Fused attention, which torch takes in eval mode, must not look like no work at all."""
    found = cf.blocks(ClassToken(), sequences())
    shares = {b.name: b.forward_before or 0.0 for b in found}
    assert shares["layers.0"] < 0.1
    assert 0.4 < shares["layers.1"] < 0.6
    assert shares["head"] > 0.95
    assert torch.backends.mha.get_fastpath_enabled()


def test_keyword_inputs_in_any_order_and_optional_arguments_have_bytes():
    mask = torch.ones(4, 5)
    for given in ({"ids": tokens(), "mask": mask}, {"mask": mask, "ids": tokens()}):
        found = cf.blocks(KeywordInputs(), given)
        assert names(found) == ["stem", "body", "head"]
        # what enters: ids and mask (also used later), embedded ids and mask, and the pooled vector
        assert [b.bytes_per_sample for b in found] == [5 * 8 + 20, 5 * 6 * 4 + 20, 24]


def test_positional_inputs_are_a_tuple():
    found = cf.blocks(KeywordInputs(), (tokens(), torch.ones(4, 5)))
    assert found == cf.blocks(KeywordInputs(), {"ids": tokens(), "mask": torch.ones(4, 5)})


def test_a_model_that_needs_inputs_warns_without_and_not_with_them():
    with pytest.warns(UserWarning, match="Branches cannot be read without inputs"):
        found = cf.blocks(Branches())
    assert names(found) == names(cf.blocks(Branches(), vectors())) == ["stem", "inner"]


@pytest.mark.parametrize("inputs", [3, "x"])
def test_inputs_of_another_kind_are_refused(inputs):
    with pytest.raises(UsageError, match="example_inputs"):
        cf.blocks(Chain(), inputs)


@pytest.mark.parametrize("inputs", [True, False])
def test_nothing_of_the_model_or_the_process_changes(inputs):
    model = Chain().train()
    model.norm1.eval()
    flags = {n: m.training for n, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    cf.blocks(model, images() if inputs else None)
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inputs_are_not_written_into():
    x = vectors()
    cf.blocks(FirstInPlace(), x)
    assert torch.equal(x, vectors())


def test_modules_without_weights_and_unused_modules_are_no_blocks():
    assert "pool" not in [member for block in cf.blocks(Chain()) for member in block.members]
    spare = ShapesCross()
    spare.unused = nn.Linear(2, 2)
    assert names(cf.blocks(spare)) == ["stem", "mid"]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class Stage(nn.Module):
    """Layers in a list behind a projection; a second class, for hierarchies whose stages are of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        x = self.project(x)
        for layer in self.layers:
            x = layer(x)
        return x


class OtherStage(Stage):
    pass


class Hierarchy(nn.Module):
    """A body that holds its stages as lists of layers, or as modules of different kinds."""

    def __init__(self, *, lists: bool) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.stages = nn.ModuleList(
            [nn.ModuleList([Layer(), Layer()]) for _ in range(2)] if lists else [Stage(), OtherStage()]
        )
        self.body.forward = self.run
        self.head = nn.Linear(4, 2)

    def run(self, x):
        for stage in self.body.stages:
            for layer in stage if isinstance(stage, nn.ModuleList) else [stage]:
                x = layer(x)
        return x

    def forward(self, x):
        return self.head(self.run(x))


@pytest.mark.parametrize("lists", [True, False])
def test_stages_of_a_hierarchy_open(lists):
    """PVT and PoolFormer hold lists of lists; where stages are of two kinds, their layers are the blocks too."""
    listed = [block.name for block in cf.blocks(Hierarchy(lists=lists), torch.randn(2, 4))]
    layers = "body.stages.{}.{}" if lists else "body.stages.{}.layers.{}"
    assert {layers.format(stage, layer) for stage in range(2) for layer in range(2)} <= set(listed)
    assert listed[-1] == "head"
