"""Five cached training steps are five uncached ones, over models that no trace can read: language, audio, U-Nets.

Each case is trained twice from the same seed, with and without a cache: one epoch that fills and one that is cached,
five steps each with a smaller last batch, dropout on. Losses, gradients, final weights, buffers and random draws are
compared bit for bit where the prefix rounds alike in every batch, which a test measures. It does everywhere but in
BERT's pooler, one matrix product with as many rows as the batch has samples (``exact=False``): there every step is
compared from equal weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import cachefreeze as cf

SAMPLES, BATCH, LENGTH = 18, 4, 12
VOCABULARY = 50


class Samples(Dataset):
    """Dict samples, one tensor per field."""

    def __init__(self, **fields: Tensor) -> None:
        self.fields = fields

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index), **{name: field[index] for name, field in self.fields.items()}}

    def raw(self, indices: Tensor) -> dict[str, Tensor]:
        """The model's inputs of some samples."""
        return {name: field[indices] for name, field in self.fields.items()}


def sentences(**more: Tensor) -> Samples:
    """Ids padded to one length, with masks of other lengths in every batch."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (SAMPLES, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    return Samples(input_ids=ids * mask, attention_mask=mask, **more)


def classes(count: int = 3) -> Tensor:
    return torch.arange(SAMPLES) % count


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=3,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config)


def gpt2_data() -> Samples:
    data = sentences()
    labels = data.fields["input_ids"].masked_fill(data.fields["attention_mask"] == 0, -100)
    return Samples(**data.fields, labels=labels)


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2,
        decoder_start_token_id=0, dropout_rate=0.1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def t5_data() -> Samples:
    return Samples(**sentences().fields, labels=sentences().fields["input_ids"].flip(0)[:, :7].clamp(min=2))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def wav2vec2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
        conv_stride=(4, 4), conv_kernel=(8, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, layerdrop=0.0, apply_spec_augment=False, classifier_proj_size=8, num_labels=3,
    )  # fmt: skip
    return transformers.Wav2Vec2ForSequenceClassification(config)


def wav2vec2_ctc() -> nn.Module:
    """Its forward checks the labels first."""
    transformers = pytest.importorskip("transformers")
    config = wav2vec2().config
    config.ctc_loss_reduction = "mean"
    return transformers.Wav2Vec2ForCTC(config)


def spoken() -> Samples:
    letters = torch.randint(1, 30, (SAMPLES, 4), generator=torch.Generator().manual_seed(4))
    return Samples(input_values=waves().fields["input_values"], labels=letters)


def waves() -> Samples:
    generator = torch.Generator().manual_seed(2)
    return Samples(input_values=torch.randn(SAMPLES, 400, generator=generator), labels=classes())


class UNet(nn.Module):
    """Two scales down, two up; the skips of both frozen stages are read behind the boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = self._stage(3, 4), self._stage(4, 8), self._stage(8, 8)
        self.up2 = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.join2 = self._stage(16, 4)
        self.up1 = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.join1 = self._stage(8, 4)
        self.drop = nn.Dropout2d(0.2)
        self.head = nn.Conv2d(4, 3, 1)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.Dropout2d(0.1)
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        first = self.down1(x)
        second = self.down2(functional.max_pool2d(first, 2))
        y = self.middle(functional.max_pool2d(second, 2))
        y = self.join2(torch.cat([second, self.up2(y)], 1))
        y = self.join1(torch.cat([first, self.up1(y)], 1))
        logits = self.head(self.drop(y))
        if labels is None:
            return {"logits": logits}
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def photos() -> Samples:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, 3, 16, 16, generator=generator)
    return Samples(x=x, labels=torch.randint(0, 3, (SAMPLES, 16, 16), generator=generator))


class DenseNet(nn.Module):
    """torchvision's, small, with dropout and the loss inside."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import DenseNet as Network

        self.network = Network(4, (2, 2, 2), 8, bn_size=2, drop_rate=0.2, num_classes=3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def pictures() -> Samples:
    x = torch.randn(SAMPLES, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    return Samples(x=x, labels=classes())


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    data: Callable[[], Samples]
    boundary: str
    executor: str
    exact: bool = True


CASES = {
    "gpt2_mid": Case(gpt2, gpt2_data, "transformer.h.1", "replay"),
    "gpt2_last": Case(gpt2, gpt2_data, "transformer.h.2", "replay"),
    "t5_decoder": Case(t5, t5_data, "decoder.block.0", "replay"),
    "t5_last": Case(t5, t5_data, "decoder.block.1", "replay"),
    "bert_mid": Case(bert, lambda: sentences(labels=classes()), "bert.encoder.layer.1", "replay"),
    "bert_head": Case(bert, lambda: sentences(labels=classes()), "classifier", "replay", exact=False),
    "wav2vec2_encoder": Case(wav2vec2, waves, "wav2vec2.encoder", "replay"),
    "wav2vec2_last": Case(wav2vec2, waves, "wav2vec2.encoder.layers.1", "replay"),
    "wav2vec2_ctc": Case(wav2vec2_ctc, spoken, "wav2vec2.encoder.layers.1", "replay"),
    "unet_middle": Case(UNet, photos, "middle", "fx"),
    "unet_up": Case(UNet, photos, "up2", "fx"),
    "densenet": Case(DenseNet, pictures, "network.features.denseblock2", "fx"),
    "densenet_inside": Case(DenseNet, pictures, "network.features.denseblock3.denselayer2", "fx"),
}
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
}


def made(case: Case) -> tuple[nn.Module, Samples]:
    torch.manual_seed(0)
    model, data = case.make(), case.data()
    cf.freeze(model, case.boundary, example_inputs=data.raw(torch.arange(BATCH)))
    return model, data


def train(case: Case, store: str, optimizer: str) -> tuple[list[Any], dict[str, Tensor], list[str], cf.Engine]:
    """Two epochs of five steps: loss and gradients of each, the final state, the epochs' sources."""
    model, data = made(case)
    torch.manual_seed(2)
    engine = cf.Engine(model, store)
    loader = engine.loader(DataLoader(data, BATCH, shuffle=True))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    step = OPTIMIZERS[optimizer](list(trained.values()))
    steps, sources = [], []
    for _ in engine.epochs(2):
        model.train()
        for batch in loader:
            step.zero_grad()
            loss = engine(**engine.model_inputs(batch))["loss"]
            loss.backward()
            gradients = {name: None if p.grad is None else p.grad.clone() for name, p in trained.items()}
            step.step()
            steps.append({"loss": loss.detach(), "gradients": gradients, "draw": torch.rand(1)})
        sources.append(loader.source)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    engine.close()
    return steps, state, sources, engine


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact])
def test_cached_steps_are_uncached_steps(name, optimizer):
    """Bit for bit, from one seed over two epochs."""
    case = CASES[name]
    steps, state, _, uncached = train(case, "off", optimizer)
    assert uncached.parts is None
    cached_steps, cached_state, sources, engine = train(case, "host", optimizer)
    assert sources == ["fill", "cached"]
    assert engine.parts.executor == case.executor
    assert len(steps) == 10
    assert any(g is not None and g.abs().max() > 0 for g in steps[0]["gradients"].values())
    torch.testing.assert_close(cached_steps, steps, rtol=0, atol=0)
    torch.testing.assert_close(cached_state, state, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_rows_round_alike_in_every_batch_where_the_table_says_so(name):
    """The reason for demanding equal bits: a row is the same in any batch, to one ulp in the others."""
    case = CASES[name]
    model, data = made(case)
    parts = cf.split(model, data.raw(torch.arange(BATCH)))
    first = _rows(parts, data, [0, 1, 2, 3])
    for others in ([0, 7, 9, 13], [5, 0, 3], [0, 1], [3, 2, 1, 0]):
        for spec, a, b in zip(parts.boundary.tensors, first, _rows(parts, data, others), strict=True):
            one, other = a.select(spec.batch_dim, 0), b.select(spec.batch_dim, others.index(0))
            torch.testing.assert_close(other, one, rtol=0, atol=0 if case.exact else 1e-7)


def _rows(parts: cf.Parts, data: Samples, indices: list[int]) -> tuple[Tensor, ...]:
    made = parts.prefix(**data.raw(torch.tensor(indices)))
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.exact])
def test_each_step_from_equal_weights_is_the_uncached_step(name, optimizer):
    """Loss and gradients on cached rows and on the raw batch, to 1e-5, at ten points of one trajectory."""
    model, data = made(CASES[name])
    engine = cf.Engine(model, "host")
    loader = engine.loader(DataLoader(data, BATCH, shuffle=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    step = OPTIMIZERS[optimizer](trained)
    for epoch in engine.epochs(2):
        model.train()
        for at, batch in enumerate(loader):
            found = []
            for inputs in (engine.model_inputs(batch), data.raw(batch["index"])):
                torch.manual_seed(10 * epoch + at)
                loss = engine(**inputs)["loss"]
                found.append([loss.detach(), *torch.autograd.grad(loss, trained)])
            torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
            for parameter, gradient in zip(trained, found[1][1:], strict=True):
                parameter.grad = gradient
            step.step()
    assert loader.source == "cached"
    engine.close()
