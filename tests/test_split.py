"""Splits: ``suffix(prefix(x))`` is ``model(x)``, and nothing unverified is handed out."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import cachefreeze as cf
from cachefreeze import splitting
from cachefreeze.errors import BatchDependentError, FreezeError, SplitError, UsageError
from cachefreeze.isolation import RandomState
from cachefreeze.splitting.boundary import Cut, Site
from cachefreeze.splitting.fx_executor import FxExecutor
from cachefreeze.testing.traps import (
    REFUSED,
    TRAPS,
    AliasedView,
    BatchMean,
    Branches,
    Chain,
    ClassToken,
    Dense,
    DropoutPrefix,
    HeadFirst,
    Recurrent,
    Skip,
    images,
    sequences,
    vectors,
)
from cachefreeze.tracing import Example


def rows_of(parts: cf.Parts, inputs: Any) -> list[Tensor]:
    made = Example.of(inputs).fresh().call(parts.prefix)
    return [row.clone() for row in (made if isinstance(made, tuple) else (made,))]


def assert_equal(expected: Any, got: Any, tolerance: float | None = None) -> None:
    wanted, spec = pytree.tree_flatten(expected)
    found, other = pytree.tree_flatten(got)
    assert spec == other
    for a, b in zip(wanted, found, strict=True):
        if not isinstance(a, Tensor):
            assert a == b
        elif tolerance is None:
            assert torch.equal(a, b), f"largest difference {float((a - b).abs().max()):.3g}"
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def trained(model: nn.Module, forward: Callable[[], Any]) -> dict[str, Any]:
    """One seeded step on ``model`` by either way: what it gave, the gradients and the buffers."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    output = forward()
    floats = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in floats).backward()
    return {
        "output": pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output),
        "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        "buffers": dict(model.named_buffers()),
    }


def assert_training_equal(make: Callable[[], nn.Module], inputs: Any, train_from: str, tolerance: float | None) -> None:
    """Two copies with equal weights: one runs whole, one from rows. Both are frozen and in train mode."""
    torch.manual_seed(0)
    whole = make()
    cf.freeze(whole, train_from, example_inputs=inputs)
    other = copy.deepcopy(whole)
    parts = cf.split(other, inputs)
    whole.train()
    other.train()
    rows = rows_of(parts, inputs)
    expected = trained(whole, lambda: Example.of(inputs).fresh().call(whole))
    got = trained(other, lambda: parts.suffix(*rows))
    assert expected["gradients"]
    assert_equal(expected, got, tolerance)


class TestTraps:
    @pytest.mark.parametrize("name", TRAPS)
    def test_eval_outputs_are_the_models(self, name):
        trap = TRAPS[name]
        torch.manual_seed(0)
        model, inputs = trap.make(), trap.inputs()
        parts = cf.split(model, inputs, trap.train_from)
        model.eval()
        with torch.no_grad():
            for samples in ([0, 1, 2, 3], [2, 0, 1], [3, 1]):
                some = Example.of(inputs).take(samples)
                torch.manual_seed(3)
                expected = some.fresh().call(model)
                rows = rows_of(parts, some)
                torch.manual_seed(3)
                assert_equal(expected, parts.suffix(*rows))

    @pytest.mark.parametrize("name", TRAPS)
    def test_training_is_the_models(self, name):
        trap = TRAPS[name]
        assert_training_equal(trap.make, trap.inputs(), trap.train_from, trap.tolerance or None)

    @pytest.mark.parametrize("name", TRAPS)
    def test_boundary_tensors_describe_the_rows(self, name):
        """Shape, dtype, batch dimension and memory layout are those of what the prefix makes."""
        trap = TRAPS[name]
        inputs = trap.inputs()
        parts = cf.split(trap.make(), inputs, trap.train_from)
        rows = rows_of(parts, inputs)
        assert len(rows) == len(parts.boundary.tensors)
        for row, spec in zip(rows, parts.boundary.tensors, strict=True):
            assert row.shape[spec.batch_dim] == 4
            assert tuple(s for d, s in enumerate(row.shape) if d != spec.batch_dim) == spec.shape
            assert row.dtype == spec.dtype
            strides = [row.stride(d) for d in spec.layout]
            assert strides == sorted(strides, reverse=True)
        assert parts.boundary.bytes_per_sample * 4 == sum(row.nbytes for row in rows)

    @pytest.mark.parametrize("name", REFUSED)
    @pytest.mark.parametrize("way", ["train_from", "flags"])
    def test_what_cannot_be_cached_is_refused_and_leaves_no_trace(self, name, way):
        trap = REFUSED[name]
        torch.manual_seed(0)
        model, inputs = trap.make(), trap.inputs()
        if way == "flags":
            cf.freeze(model, trap.train_from, example_inputs=inputs)
        before = state_of(model)
        with pytest.raises((SplitError, BatchDependentError), match=trap.message):
            cf.split(model, inputs, trap.train_from if way == "train_from" else None)
        assert_equal(before, state_of(model))

    def test_an_untraceable_parent_is_named_with_its_class(self):
        with pytest.raises(
            SplitError,
            match=r"fx cannot trace module 'inner' \(_Branching\), which encloses 'inner\.head'.*reads a value",
        ):
            cf.split(Branches(), vectors(), "inner.head")

    def test_an_untraceable_module_is_no_obstacle_outside_the_boundarys_parents(self):
        assert cf.split(Branches(), vectors(), "inner").boundary.name == "inner"

    def test_equal_example_samples_hide_no_dependence_on_the_batch(self):
        with pytest.raises(BatchDependentError):
            cf.split(BatchMean(), torch.zeros(4, 6), "2")
        with pytest.raises(BatchDependentError):
            cf.split(BatchMean(), vectors()[[1, 1, 1]], "2")

    def test_channels_last_rows_stay_channels_last(self):
        trap = TRAPS["channels_last"]
        parts = cf.split(trap.make(), trap.inputs(), "conv2")
        assert parts.boundary.tensors[0].layout == (0, 2, 3, 1)
        assert rows_of(parts, trap.inputs())[0].is_contiguous(memory_format=torch.channels_last)

    def test_the_batch_need_not_be_the_first_dimension(self):
        parts = cf.split(Recurrent(), sequences(), "rnn")
        assert parts.boundary.tensors[0].batch_dim == 1

    def test_an_alias_is_one_tensor_of_the_boundary(self):
        """The map, from which its flattened form and its mean are remade; the input and the activation, once."""
        view = cf.split(AliasedView(), images(), "head").boundary
        assert [t.shape for t in view.tensors] == [(4, 8, 8)]
        same = cf.split(TRAPS["in_place_alias"].make(), vectors(), "head").boundary
        assert [t.shape for t in same.tensors] == [(6,), (6,)]

    def test_a_parameter_free_tail_belongs_to_the_prefix(self):
        """Pooling and flattening before the head make rows of 4 numbers, not of 4 maps."""
        assert cf.split(Chain(), images(), "head").boundary.tensors[0].shape == (4,)
        assert cf.split(ClassToken(), sequences(), "head").boundary.tensors[0].shape == (6,)

    def test_rows_are_no_larger_than_what_they_are_made_of(self):
        """Pooling to 6 x 6 from 1 x 1, and the concatenation of what is stored anyway, run in the suffix."""
        alexnet = small_vision_model("alexnet")
        assert cf.split(alexnet, torch.randn(2, 3, 64, 64), "classifier").boundary.bytes_per_sample == 256 * 4
        assert len(cf.split(Dense(), images(), "layers.2").boundary.tensors) == 3

    def test_all_that_crosses_is_listed(self):
        assert [t.shape for t in cf.split(Skip(), vectors(), "third").boundary.tensors] == [(6,)] * 3


FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5",
    "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32",
)  # fmt: skip
# its windows of 7 x 7 at a 32nd of the image allow no smaller input
SIZES = {"maxvit_t": 224, "inception_v3": 96}
EVERY = torchvision.models.list_models(module=torchvision.models)


@pytest.fixture
def quick_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncated normals take most of the time that it takes to build a large model."""

    def normal(tensor: Tensor, mean: float = 0.0, std: float = 1.0, *_: Any, **__: Any) -> Tensor:
        return nn.init.normal_(tensor, mean, std)

    monkeypatch.setattr(nn.init, "trunc_normal_", normal)


def vision_model(name: str) -> nn.Module:
    options: dict[str, Any] = {"num_classes": 5}
    if name.startswith("vit"):
        options["image_size"] = 70 if name == "vit_h_14" else 64
    if name in ("googlenet", "inception_v3"):
        options.update(aux_logits=False, init_weights=False)
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, **options)
    return model


def vision_images(name: str) -> Tensor:
    size = SIZES.get(name, 70 if name == "vit_h_14" else 64)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def small_vision_model(name: str) -> nn.Module:
    """The same classes with fewer or narrower layers, where the smallest builder is large."""
    torch.manual_seed(0)
    models = torchvision.models
    if name == "convnext_tiny":
        Setting = models.convnext.CNBlockConfig
        return models.ConvNeXt([Setting(24, 48, 2), Setting(48, 96, 2), Setting(96, None, 2)], 0.1, num_classes=5)
    if name in ("swin_t", "swin_v2_t"):
        blocks = {"swin_v2_t": models.swin_transformer.SwinTransformerBlockV2}
        merging = {"swin_v2_t": models.swin_transformer.PatchMergingV2}
        more = {"block": blocks[name], "downsample_layer": merging[name]} if name in blocks else {}
        return models.SwinTransformer(
            [4, 4], 24, [2, 2, 2], [2, 4, 8], [4, 4], stochastic_depth_prob=0.2, num_classes=5, **more
        )
    if name == "vit_b_32":
        return models.VisionTransformer(64, 32, 4, 4, 64, 128, num_classes=5)
    model = vision_model(name)
    if name in ("alexnet", "vgg11_bn"):
        first, second, last = (i for i, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear))
        model.classifier[first] = nn.Linear(model.classifier[first].in_features, 32)
        model.classifier[second], model.classifier[last] = nn.Linear(32, 32), nn.Linear(32, 5)
    return model


def check_vision(name: str, where: str, make: Callable[[str], nn.Module] = vision_model) -> None:
    """Freeze, split, and hold output, gradients and buffers of a train-mode step against the model's own."""
    model, inputs = make(name), vision_images(name)
    listed = [block.name for block in cf.blocks(model)]
    boundary = listed[-1] if where == "head" else listed[len(listed) // 2]
    cf.freeze(model, boundary)
    parts = cf.split(model, inputs)
    assert parts.boundary.name == boundary
    model.eval()
    with torch.no_grad():
        assert_equal(model(inputs), parts.suffix(*rows_of(parts, inputs)))
    model.train()
    kept = copy.deepcopy(dict(model.named_buffers()))
    expected = copy.deepcopy(trained(model, lambda: model(inputs)))
    for buffer_name, buffer in model.named_buffers():
        buffer.copy_(kept[buffer_name])
    rows = rows_of(parts, inputs)
    # ViT's fused attention runs only without gradients: equal within rounding
    assert_equal(expected, trained(model, lambda: parts.suffix(*rows)), 2e-5 if name.startswith("vit") else None)


@pytest.mark.parametrize("where", ["middle", pytest.param("head", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_torchvision_model_per_family_splits_exactly(name, where, quick_init):
    check_vision(name, where, small_vision_model)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("where", ["middle", "head"])
@pytest.mark.parametrize("name", EVERY)
def test_every_torchvision_classifier_splits_exactly(name, where, quick_init):
    check_vision(name, where)


@pytest.mark.real_data
@pytest.mark.parametrize("train_from", ["features.14", "classifier"])
def test_trained_weights_split_exactly(data_dir, train_from):
    from safetensors.torch import load_file

    weights = data_dir / "weights" / "mobilenet_v2_imagenet.safetensors"
    if not weights.is_file():
        pytest.skip(f"no {weights}")
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(load_file(weights))
    inputs = images(3, 96)
    parts = cf.split(model, inputs, train_from)
    model.eval()
    with torch.no_grad():
        assert_equal(model(inputs), parts.suffix(*rows_of(parts, inputs)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["batch_norm", "channels_last", "class_token", "dense", "keyword_inputs", "lstm"])
def test_a_split_on_the_gpu_is_the_models(name):
    """Outputs within what atomics and cuDNN's choices allow; rows are made and eaten on the device."""
    trap = TRAPS[name]
    torch.manual_seed(0)
    model = trap.make().cuda()
    example = Example.of(trap.inputs()).to(torch.device("cuda"))
    state = RandomState.capture()
    parts = cf.split(model, example, trap.train_from)
    assert not state.moved()
    rows = rows_of(parts, example)
    assert all(row.is_cuda for row in rows)
    model.eval()
    with torch.no_grad():
        assert_equal(example.fresh().call(model), parts.suffix(*rows), 1e-5)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that split() must leave as it was."""
    return {
        "modes": {n: m.training for n, m in model.named_modules()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "state": {n: t.clone() for n, t in model.state_dict().items()},
        "versions": {n: t._version for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "objects": {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
    }


class TestLeavesNoTrace:
    @pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
    @pytest.mark.parametrize(
        "name", ["batch_norm", "dropout", "shared_module", "rebound_buffer", "first_in_place", "lstm"]
    )
    def test_of_modes_flags_buffers_gradients_hooks_inputs_and_random_states(self, name, mode):
        trap = TRAPS[name]
        model, inputs = trap.make().train(mode != "eval"), trap.inputs()
        if mode == "mixed":
            next(m for m in reversed(list(model.children())) if m.training).eval()
        outputs = model(inputs.clone() if isinstance(inputs, Tensor) else inputs)
        outputs.sum().backward()
        next(model.parameters()).requires_grad_(False)
        before, given = state_of(model), Example.of(inputs).fresh()
        random_state = RandomState.capture()
        cf.split(model, inputs, trap.train_from)
        after = state_of(model)
        before.pop("versions"), after.pop("versions")  # a buffer that train mode moves is written back
        assert_equal(before, after)
        assert not random_state.moved()
        assert_equal(given.args, Example.of(inputs).args)

    def test_frozen_weights_and_buffers_are_not_even_touched(self):
        """A fingerprint may trust version counters."""
        model = Chain()
        cf.freeze(model, "conv2")
        before = state_of(model)["versions"]
        cf.split(model, images())
        after = state_of(model)["versions"]
        assert {n for n in before if before[n] != after[n]} <= {n for n in before if n.startswith("norm2.")}

    def test_numpy_and_python_draws_of_a_forward_are_given_back(self):
        class Draws(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                np.random.rand()  # noqa: NPY002 - the global state is the point
                random.random()
                return super().forward(input)

        model = nn.Sequential(nn.Linear(6, 6), Draws(6, 2))
        state = RandomState.capture()
        cf.split(model, vectors(), "1")
        assert not state.moved()

    def test_it_works_under_no_grad(self):
        with torch.no_grad():
            cf.split(Chain(), images(), "conv2")

    def test_the_prefix_runs_without_gradients_in_eval_mode_and_puts_modes_back(self):
        model = Chain().train()
        parts = cf.split(model, images(), "conv2")
        before = state_of(model)
        rows = parts.prefix(images())
        assert not rows.requires_grad
        assert not rows.is_inference()
        assert_equal(before, state_of(model))


class TestParts:
    def test_hooks_of_frozen_modules_are_told_of(self, caplog):
        """What a hook does beside the output ends with the fill, and that is said; not of locks and torch's hooks."""
        model = Chain()
        cf.freeze(model, train_from="conv2")
        model.conv1 = torch.nn.utils.spectral_norm(model.conv1)
        for parameter in model.conv1.parameters():
            parameter.requires_grad_(False)
        model.eval()
        model.head.register_forward_hook(lambda *_: None)
        cf.split(model, images(), "conv2")
        assert "hooks" not in caplog.text
        model.conv1.register_forward_hook(lambda *_: None)
        cf.split(model, images(), "conv2")
        assert "forward hooks of frozen modules (conv1)" in caplog.text

    def test_parameters_are_the_models_own_objects(self):
        model = torchvision.models.resnet18(num_classes=4)
        parts = cf.split(model, images(3, 64), "layer4")
        own = {id(p): n for n, p in model.named_parameters()}
        suffix = {own[id(p)] for p in parts.suffix.parameters()}
        prefix = {own[id(p)] for p in parts.prefix.parameters()}
        assert suffix == {n for n in own.values() if n.startswith(("layer4", "fc"))}
        assert suffix | prefix == set(own.values())
        assert not suffix & prefix

    def test_an_optimizer_step_on_the_model_is_seen_by_the_suffix(self):
        model = Chain()
        parts = cf.split(model, images(), "conv2")
        rows = parts.prefix(images())
        before = parts.suffix(rows.clone())
        with torch.no_grad():
            model.head.bias.add_(1.0)
        model.eval()
        parts.suffix.eval()
        after = parts.suffix(rows.clone())
        assert not torch.equal(before, after)
        assert_equal(model(images()), after)

    def test_the_boundary_of_flags_is_the_block_and_of_a_freeze_the_name_it_was_given(self):
        model = torchvision.models.resnet18(num_classes=4)
        cf.freeze(model, "layer4")
        assert cf.split(model, images(3, 64)).boundary.name == "layer4"
        hand = torchvision.models.resnet18(num_classes=4).eval()
        for name in ("conv1", "bn1", "layer1", "layer2", "layer3"):
            hand.get_submodule(name).requires_grad_(False)
        assert cf.split(hand, images(3, 64)).boundary.name == "layer4.0"

    @pytest.mark.parametrize("train_from", ["layer2", "layer3.1", "fc"])
    def test_cached_fraction_is_the_share_of_flops_and_grows(self, train_from):
        model = torchvision.models.resnet18(num_classes=4)
        parts = cf.split(model, images(3, 64), train_from)
        expected = {"layer2": 0.33, "layer3.1": 0.61, "fc": 1.0}[train_from]
        assert parts.cached_fraction == pytest.approx(expected, abs=0.08)
        assert parts.executor == "fx"

    def test_its_print_says_what_is_cached(self):
        text = repr(cf.split(Chain(), images(), "conv2"))
        assert text == (
            "Parts(Chain at 'conv2': (4, 8, 8) float32, 1,024 bytes a sample, 43% of the forward cached, fx)"
        )

    def test_a_batch_of_one_is_refused_with_the_reason(self):
        with pytest.raises(SplitError, match="batch of 1; pass at least 2"):
            cf.split(Chain(), images()[:1], "conv2")

    def test_inputs_of_another_kind_are_refused(self):
        with pytest.raises(UsageError, match="example_inputs=ndarray"):
            cf.split(Chain(), np.zeros((2, 3, 8, 8)), "conv2")

    def test_an_unknown_boundary_lists_the_blocks(self):
        with pytest.raises(FreezeError, match=r"'conv9'.*Blocks, in order: conv1, conv2, head"):
            cf.split(Chain(), images(), "conv9")

    def test_a_module_whose_weights_are_used_without_calling_it_is_cut_where_they_are_used(self):
        parts = cf.split(TRAPS["attention"].make(), sequences(), "first.out_proj")
        assert parts.executor == "replay"
        assert parts.boundary.name == "first.out_proj"

    def test_a_second_name_of_a_shared_module_is_the_same_boundary(self):
        class Two(HeadFirst):
            def __init__(self) -> None:
                super().__init__()
                self.alias = self.head

        parts = cf.split(Two(), vectors(), "alias")
        assert parts.boundary.bytes_per_sample == 24


class TestModes:
    """The suffix has no mode of its own."""

    def make(self) -> tuple[nn.Module, cf.Parts, Tensor]:
        torch.manual_seed(0)
        model = DropoutPrefix()
        cf.freeze(model, "2")
        parts = cf.split(model, vectors())
        return model, parts, parts.prefix(vectors())

    def test_it_follows_train_and_eval_of_the_model(self):
        model, parts, rows = self.make()
        model.train()
        assert not torch.equal(parts.suffix(rows.clone()), parts.suffix(rows.clone()))
        model.eval()
        assert torch.equal(parts.suffix(rows.clone()), parts.suffix(rows.clone()))

    def test_its_own_train_and_eval_are_the_models(self):
        model, parts, _ = self.make()
        parts.suffix.eval()
        assert not model.training
        parts.suffix.train()
        assert model.training
        assert model[3].training

    def test_a_submodule_put_to_eval_by_hand_is_in_eval_in_the_suffix(self):
        model, parts, rows = self.make()
        model.train()
        model[3].eval()
        assert torch.equal(parts.suffix(rows.clone()), parts.suffix(rows.clone()))
        assert_equal(model(vectors()), parts.suffix(rows.clone()))

    @pytest.mark.parametrize("pattern", [(True, True), (True, False), (False, True), (False, False)])
    def test_every_pattern_of_modes_around_the_boundary_is_the_models(self, pattern):
        """Functional dropout behind the boundary, in a parent that is traced through, and in a child of it."""

        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

            def forward(self, x: Tensor) -> Tensor:
                y = self.second(self.first(x))
                return nn.functional.dropout(y, 0.5, self.training)

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.norm = Inner(), nn.BatchNorm1d(6)

            def forward(self, x: Tensor) -> Tensor:
                y = self.norm(self.inner(x))
                return y * 2 if self.training else nn.functional.dropout(y, 0.1, self.training)

        torch.manual_seed(0)
        model = Outer()
        parts = cf.split(model, vectors(), "inner.second")
        model.training, model.inner.training = pattern
        rows = parts.prefix(vectors())
        torch.manual_seed(1)
        expected = model(vectors())
        torch.manual_seed(1)
        assert_equal(expected, parts.suffix(rows.clone()))

    def test_statistics_of_the_suffix_are_the_models_own(self):
        model = Chain()
        cf.freeze(model, "conv2")
        parts = cf.split(model, images())
        model.train()
        before = model.norm2.running_mean.clone()
        parts.suffix(parts.prefix(images()))
        assert not torch.equal(before, model.norm2.running_mean)
        assert model.norm2.num_batches_tracked == 1
        assert model.norm1.num_batches_tracked == 0

    def test_a_suffix_that_writes_in_place_spoils_no_weights_and_no_second_step(self):
        trap = TRAPS["in_place_at_boundary"]
        model = trap.make()
        parts = cf.split(model, trap.inputs(), "block")
        rows = parts.prefix(trap.inputs())
        first = parts.suffix(rows.clone())
        assert_equal(first, parts.suffix(rows.clone()))


class Corrupt(nn.Module):
    """A suffix or prefix with something done to what it returns."""

    def __init__(self, part: nn.Module, change: Callable[..., Any]) -> None:
        super().__init__()
        self.part, self.change = part, change

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.change(self.part, *args, **kwargs)


def slightly(part: nn.Module, *rows: Tensor) -> Tensor:
    out: Tensor = part(*rows)
    return out + 1e-3 * out.detach().abs().max()


def one_element(part: nn.Module, *rows: Tensor) -> Tensor:
    out: Tensor = part(*rows)
    change = torch.zeros_like(out)
    change[-1, -1] = 1e-3 * float(out.detach().abs().max())
    return out + change


def third_sample(part: nn.Module, *rows: Tensor) -> Tensor:
    out: Tensor = part(*rows)
    return torch.cat([out[:2], out[2:] * 2])


def packed(part: nn.Module, *rows: Tensor) -> list[Tensor]:
    return [part(*rows)]


def other_dtype(part: nn.Module, *rows: Tensor) -> Tensor:
    out: Tensor = part(*rows)
    return out.double()


def crash(part: nn.Module, *rows: Tensor) -> Tensor:
    raise TypeError("seven bridges")


def train_only(part: nn.Module, *rows: Tensor, model: nn.Module) -> Tensor:
    out: Tensor = part(*rows)
    return out * 1.01 if model.training else out


def scaled_gradient(part: nn.Module, *rows: Tensor, model: nn.Module) -> Tensor:
    out: Tensor = part(*rows)
    return out.detach() + 0.99 * (out - out.detach())


def lost_gradient(part: nn.Module, *rows: Tensor, model: nn.Module) -> Tensor:
    kept = model.conv2.weight.requires_grad
    model.conv2.weight.requires_grad_(False)
    out: Tensor = part(*rows)
    model.conv2.weight.requires_grad_(kept)
    return out


def no_gradient(part: nn.Module, *rows: Tensor) -> Tensor:
    out: Tensor = part(*rows)
    return out.detach()


def dropped_update(part: nn.Module, *rows: Tensor, model: nn.Module) -> Tensor:
    kept = model.norm2.num_batches_tracked.clone()
    out: Tensor = part(*rows)
    model.norm2.num_batches_tracked.copy_(kept)
    return out


def overwritten(part: nn.Module, *rows: Tensor, model: nn.Module) -> Tensor:
    out: Tensor = part(*rows)
    model.norm2.running_mean.mul_(1.0)
    rows[0].mul_(2.0)
    return out


def one_draw_more(part: nn.Module, *rows: Tensor) -> Tensor:
    torch.rand(1)
    out: Tensor = part(*rows)
    return out


def batch_mean(part: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = part(x)
    return out - 1e-2 * out.mean(0, keepdim=True)


def batch_size(part: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = part(x)
    return out * (1 + 0.01 * x.shape[0])


def large_batch(part: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = part(x)
    return out * (1.01 if len(x) > 8 else 1)


def draws(part: nn.Module, x: Tensor) -> Tensor:
    torch.rand(1)
    out: Tensor = part(x)
    return out


def numpy_draws(part: nn.Module, x: Tensor) -> Tensor:
    np.random.rand()  # noqa: NPY002 - the global state is the point
    out: Tensor = part(x)
    return out


def undone(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The exact inverse in the suffix, so that outputs are right and only the rows are not."""

    def inverse(part: nn.Module, rows: Tensor) -> Tensor:
        if change is batch_mean:
            rows = rows + 1e-2 / (1 - 1e-2) * rows.mean(0, keepdim=True)
        elif change is batch_size:
            rows = rows / (1 + 0.01 * rows.shape[0])
        out: Tensor = part(rows)
        return out

    return inverse


@pytest.fixture
def corrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the executor propose cuts with something done to them."""

    def install(make: Callable[[Cut, Site], Cut]) -> None:
        class Bad(FxExecutor):
            def cut(self, site: Site, example: Example) -> Cut:
                return make(super().cut(site, example), site)

        monkeypatch.setattr(splitting, "_EXECUTORS", (Bad(),))

    return install


class Chaotic(nn.Module):
    """The last bit of its inputs decides what it gives, and a batch moves the last bit, as blocked sums do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        return self.head(torch.sin(1e9 * (y + 1e-7 * y.mean(dim=0))))


class TestVerification:
    """A cut that is wrong in any one way is refused, and the message says in which."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (slightly, "eval output"),
            (one_element, "eval output"),
            (third_sample, "eval output"),
            (packed, "eval output.*another structure"),
            (other_dtype, "eval output"),
            (crash, "suffix cut at 'conv2' cannot run: TypeError: seven bridges"),
            (no_gradient, "needs no gradient"),
        ],
    )
    def test_a_wrong_suffix(self, corrupted, change, message):
        corrupted(lambda cut, site: replace(cut, suffix=Corrupt(cut.suffix, change)))
        with pytest.raises(SplitError, match=message):
            cf.split(Chain(), images(), "conv2")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (train_only, "train output"),
            (scaled_gradient, "gradient of the split.*'conv2.weight'"),
            (lost_gradient, "gradient of the split.*'conv2.weight'"),
            (dropped_update, "buffer of the split.*'norm2.num_batches_tracked'"),
            (overwritten, "suffix cut at 'conv2' cannot be trained"),
        ],
    )
    def test_a_suffix_that_is_wrong_only_in_training(self, corrupted, change, message):
        corrupted(lambda cut, site: replace(cut, suffix=Corrupt(cut.suffix, partial(change, model=site.model))))
        with pytest.raises(SplitError, match=message):
            cf.split(Chain(), images(), "conv2")

    def test_a_suffix_that_draws_another_number_of_times(self, corrupted):
        corrupted(lambda cut, site: replace(cut, suffix=Corrupt(cut.suffix, one_draw_more)))
        with pytest.raises(SplitError, match="train output"):
            cf.split(DropoutPrefix(), vectors(), "2")

    @pytest.mark.parametrize("change", [batch_mean, batch_size])
    def test_a_prefix_whose_rows_depend_on_the_batch_though_outputs_are_right(self, corrupted, change):
        corrupted(
            lambda cut, site: replace(
                cut, prefix=Corrupt(cut.prefix, change), suffix=Corrupt(cut.suffix, undone(change))
            )
        )
        with pytest.raises(BatchDependentError, match=r"before 'conv2' depends on the other samples"):
            cf.split(Chain(), images(), "conv2")

    def test_a_prefix_whose_rows_are_others_in_a_large_batch(self, corrupted):
        """Outputs are compared for two batches, rows for the whole example."""
        corrupted(lambda cut, site: replace(cut, prefix=Corrupt(cut.prefix, large_batch)))
        many = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        with pytest.raises(BatchDependentError, match=r"before 'conv2' depends on the other samples"):
            cf.split(Chain(), many, "conv2")
        cf.split(Chain(), many[:8], "conv2")

    def test_a_prefix_that_follows_the_mode_of_the_model(self, corrupted):
        """A fill runs it while the model is in train mode."""
        corrupted(lambda cut, site: replace(cut, prefix=Corrupt(cut.prefix, partial(train_only, model=site.model))))
        with pytest.raises(BatchDependentError, match=r"before 'conv2' depends"):
            cf.split(Chain(), images(), "conv2")

    def test_few_samples_are_computed(self):
        """It comes before the first row that is of use: of four samples, 36 are computed in all, with the recording."""
        model, seen = Chain(), []
        model.conv1.register_forward_hook(lambda _m, given, _o: seen.append(len(given[0])))
        cf.split(model, images(), "conv2")
        assert len(images()) == 4
        assert sum(seen) <= 36, seen

    def test_a_row_that_follows_rounding_is_told_from_one_that_follows_other_samples(self):
        with pytest.raises(BatchDependentError, match="before 'head' follows rounding, which differs between batches"):
            cf.split(Chaotic(), vectors(), "head")

    @pytest.mark.parametrize(("change", "named"), [(draws, "torch"), (numpy_draws, "numpy")])
    def test_a_prefix_that_draws_random_numbers(self, corrupted, change, named):
        corrupted(lambda cut, site: replace(cut, prefix=Corrupt(cut.prefix, change)))
        with pytest.raises(SplitError, match=rf"draws random numbers \({named}\)"):
            cf.split(Chain(), images(), "conv2")

    def test_the_model_is_as_before_after_a_refusal(self, corrupted):
        corrupted(lambda cut, site: replace(cut, suffix=Corrupt(cut.suffix, partial(dropped_update, model=site.model))))
        model, state = Chain().train(), RandomState.capture()
        before = state_of(model)
        with pytest.raises(SplitError):
            cf.split(model, images(), "conv2")
        after = state_of(model)
        before.pop("versions"), after.pop("versions")
        assert_equal(before, after)
        assert not state.moved()

    def test_the_next_executor_is_tried_and_all_reasons_are_given(self, monkeypatch):
        """The seam for a second executor."""

        class Never:
            def __init__(self, name: str) -> None:
                self.name = name

            def cut(self, site: Site, example: Example) -> Cut:
                raise SplitError(f"{self.name}: not today")

        monkeypatch.setattr(splitting, "_EXECUTORS", (Never("never"), FxExecutor()))
        assert cf.split(Chain(), images(), "conv2").executor == "fx"
        monkeypatch.setattr(splitting, "_EXECUTORS", (Never("never"), Never("nor")))
        with pytest.raises(SplitError, match="never: not today; nor: not today"):
            cf.split(Chain(), images(), "conv2")

    def test_a_correct_split_gives_no_warning(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cf.split(Chain(), images(), "conv2")
