"""What cannot be cached is refused with the module, the reason and what to do; nothing else is raised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import cachefreeze as cf
from cachefreeze.errors import FreezeError, SplitError, UsageError
from cachefreeze.testing.exact import assert_exact, state_of
from cachefreeze.testing.traps import Chain, Trap, images, sequences, vectors

transformers = pytest.importorskip("transformers")


def assert_refused(model: nn.Module, inputs: Any, error: type[Exception], *parts: str, train_from: str = "") -> None:
    """``split`` raises ``error``, each of ``parts`` is in its message, and the model is as before."""
    if train_from:
        cf.freeze(model, train_from, example_inputs=inputs)
    before = state_of(model)
    with pytest.raises(error) as raised:
        cf.split(model, inputs)
    message = str(raised.value)
    assert [part for part in parts if part not in message] == [], message
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)


def pixels() -> Tensor:
    return images(3, 32)[:3]


def vit_mae() -> nn.Module:
    torch.manual_seed(0)
    return transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
            patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
        )
    )  # fmt: skip


def clip() -> nn.Module:
    torch.manual_seed(0)
    shared = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**shared, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = {**shared, "image_size": 32, "patch_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def pairs() -> dict[str, Any]:
    ids = torch.randint(3, 50, (4, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "pixel_values": images(3, 32), "return_loss": True}


def wav2vec2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
        conv_stride=(4, 4), conv_kernel=(8, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, mask_time_prob=0.3, mask_time_length=2, classifier_proj_size=8, num_labels=3,
        **options,
    )  # fmt: skip
    return transformers.Wav2Vec2ForSequenceClassification(config)


def waves() -> dict[str, Tensor]:
    x = torch.randn(4, 400, generator=torch.Generator().manual_seed(1))
    return {"input_values": x, "labels": torch.tensor([0, 1, 2, 0])}


class TestRandomInTraining:
    def test_layer_drop_of_a_frozen_layer(self):
        """The encoder is half frozen: whether its frozen layers run is drawn in every step."""
        words = ("'wav2vec2.encoder' (Wav2Vec2Encoder)", "random number", "LayerDrop", "set its rate to 0")
        model = wav2vec2(layerdrop=0.5, apply_spec_augment=False)
        assert_refused(model, waves(), SplitError, *words, train_from="wav2vec2.encoder.layers.1")

    def test_random_masks_before_the_boundary(self):
        words = ("'wav2vec2' (Wav2Vec2Model)", "random numbers", "numpy", "'wav2vec2.encoder'")
        model = wav2vec2(layerdrop=0.0, apply_spec_augment=True)
        assert_refused(model, waves(), SplitError, *words, train_from="wav2vec2.encoder")


class TestRandomEvenInEval:
    @pytest.mark.parametrize("train_from", ["decoder", "vit.layers.1"])
    def test_vit_mae(self, train_from):
        """Its random masking is part of the forward: no row is fixed."""
        words = ("(ViTMAE", f"draws random numbers (torch) before {train_from!r} even in eval mode", "an earlier block")
        assert_refused(vit_mae(), {"pixel_values": pixels()}, SplitError, *words, train_from=train_from)


class Calibrated(nn.Module):
    """A contrastive model whose similarities go through two calibrating layers."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 4), nn.Linear(6, 4)
        self.calibrate, self.head = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = functional.normalize(self.image(x)) @ functional.normalize(self.text(y)).t()
        logits = self.head(self.calibrate(logits[..., None]))[..., 0]
        return functional.cross_entropy(logits, torch.arange(len(x)))


def two_views() -> tuple[Tensor, Tensor]:
    return vectors(), vectors().flip(0)


class TestContrastive:
    def test_similarities_before_the_boundary_couple_the_samples(self):
        """A frozen module ran on the similarities of a batch, so what it returns belongs to no sample."""
        words = ("'calibrate'", "no batch dimension", "train from another block")
        assert_refused(Calibrated(), two_views(), SplitError, *words, train_from="head")

    def test_similarities_at_the_boundary_are_made_from_rows(self):
        assert_exact(Trap(Calibrated, two_views, "calibrate"))

    @pytest.mark.parametrize("train_from", ["visual_projection", "text_projection", "text_model.encoder.layers.1"])
    def test_a_contrastive_loss_behind_the_boundary_is_not_refused(self, train_from):
        """Embeddings are rows of samples; the loss over the batch is computed in the suffix."""
        parts = assert_exact(Trap(clip, pairs, train_from))
        assert all(tensor.bytes_per_sample < 2000 for tensor in parts.boundary.tensors)


class TestNothingToSplit:
    def test_everything_frozen(self):
        model = Chain().requires_grad_(False).eval()
        assert_refused(
            model, images(), FreezeError, "nothing of Chain", "trainable", "conv1, conv2, head", "cf.unfreeze"
        )

    def test_everything_frozen_by_a_tied_weight(self):
        """Freezing the embedding takes the head along; the message says which weight is tied."""
        config = transformers.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
        )
        model = transformers.GPT2LMHeadModel(config)
        before = state_of(model)
        ids = torch.randint(0, 50, (2, 5))
        with pytest.raises(FreezeError, match=r"nothing of GPT2LMHeadModel to train \(lm_head\.weight is tied"):
            cf.freeze(model, "lm_head", example_inputs={"input_ids": ids})
        torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)

    def test_nothing_frozen(self):
        words = ("nothing of Chain is frozen before its first trainable block", "cf.freeze(model, train_from=")
        assert_refused(Chain(), images(), FreezeError, *words)

    def test_only_what_lies_behind_trained_layers_is_frozen(self):
        model = Chain()
        model.head.requires_grad_(False)
        assert_refused(model, images(), FreezeError, "nothing of Chain is frozen before its first trainable block")

    def test_frozen_by_flags_in_train_mode(self):
        model = Chain()
        model.conv1.requires_grad_(False)
        model.norm1.requires_grad_(False)
        words = ("'norm1' (BatchNorm2d)", "train mode", "cf.freeze(model, train_from='conv2')")
        assert_refused(model, images(), FreezeError, *words)


class Decides(nn.Module):
    """Between its two layers it decides by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.detach().sum().item() > 0:
            y = y * 2
        return self.second(y)


class TestInsideABlock:
    def test_a_block_that_decides_by_a_value_is_named_with_the_read(self):
        model = nn.Sequential(nn.Linear(6, 6), Decides())
        words = ("'1' (Decides)", "encloses '1.second'", "reads a value of the batch into Python (item)")
        assert_refused(model, vectors(), SplitError, *words, train_from="1.second")

    def test_it_can_be_cut_before_that_block(self):
        parts = assert_exact(Trap(lambda: nn.Sequential(nn.Linear(6, 6), Decides()), vectors, "1"))
        assert parts.boundary.name == "1"

    def test_a_recurrent_layer_is_one_block(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 6, num_layers=2, batch_first=True))
        with pytest.raises(FreezeError, match="names no module of Sequential"):
            cf.freeze(model, "1.layer_2", example_inputs=sequences())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_module_is_named():
    """Its calls cannot be followed: hooks on it are not allowed."""
    model = nn.Sequential(torch.jit.script(nn.Linear(6, 6)), nn.Linear(6, 2))
    with pytest.raises(UsageError, match=r"'0' is a ScriptModule.*put the plain module in its place"):
        cf.freeze(model, "1", example_inputs=vectors())
    with pytest.raises(UsageError, match="'0' is a ScriptModule"):
        cf.split(model, vectors(), "1")
