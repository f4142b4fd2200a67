"""Language models of the transformers library, with its own collators: trained from ragged rows as without a cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import cachefreeze as cf
from cachefreeze.errors import BatchDependentError, SplitError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{i}" for i in range(40)]


def make_tokenizer(side="right", folder=None):
    """A real fast tokenizer over a vocabulary of forty words."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", padding_side=side
    )


class Sentences(Dataset):
    """Sentences of 3 to 14 words; what of them a collator takes."""

    def __init__(self, kind, tokenizer, count=23):
        generator = torch.Generator().manual_seed(0)
        self.kind = kind
        self.tokenizer = tokenizer
        lengths = torch.randint(3, 15, (count,), generator=generator).tolist()
        self.texts = [" ".join(WORDS[i] for i in torch.randint(0, 40, (n,), generator=generator)) for n in lengths]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        text = self.texts[index]
        if self.kind == "text":
            return text, index % 3
        encoded = self.tokenizer(text)  # a BatchEncoding, of which a DataLoader's items are made
        if self.kind == "class":
            encoded["labels"] = index % 3
        elif self.kind == "words":
            encoded["labels"] = [i % 3 for i in encoded["input_ids"]]
        elif self.kind == "translation":
            encoded["labels"] = [*encoded["input_ids"][: 1 + index % 7], 2]
        return encoded


@dataclass
class Together:
    """Tokenisation in the collate function."""

    tokenizer: Any

    def __call__(self, items):
        batch = self.tokenizer([text for text, _ in items], padding=True, return_tensors="pt")
        batch["labels"] = torch.tensor([label for _, label in items])
        return batch


@dataclass
class WithPositions:
    """Left padding for a model with absolute positions, whose first tokens are not predicted from padding."""

    inner: Any
    skip_first: bool = True

    def __call__(self, items):
        batch = self.inner(items)
        position = batch["attention_mask"].cumsum(1) - 1
        batch["position_ids"] = position.clamp(min=0)
        if self.skip_first and "labels" in batch and batch["labels"].dim() == 2:
            batch["labels"][position == 0] = -100
        return batch


def bert(kind="SequenceClassification", **more):
    config = transformers.BertConfig(
        vocab_size=43, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=3,
        max_position_embeddings=32, **more,
    )  # fmt: skip
    return getattr(transformers, f"BertFor{kind}")(config)


def gpt2(kind="LMHeadModel"):
    config = transformers.GPT2Config(
        vocab_size=43, n_embd=16, n_layer=3, n_head=2, n_positions=32, num_labels=3, pad_token_id=0, use_cache=False,
        bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    return getattr(transformers, f"GPT2{kind}")(config)


def t5(layers=2):
    config = transformers.T5Config(
        vocab_size=43, d_model=16, d_kv=8, d_ff=32, num_layers=layers, num_heads=2, decoder_start_token_id=0,
        use_cache=False, bos_token_id=2, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def with_padding(tokenizer, multiple=None):
    return transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)


def for_words(tokenizer):
    return transformers.DataCollatorForTokenClassification(tokenizer)


def for_language(tokenizer):
    return transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)


def for_translation(tokenizer):
    return transformers.DataCollatorForSeq2Seq(tokenizer)


CASES = {
    "BERT": (bert, "class", "right", with_padding, "bert.encoder.layer.1"),
    "BERT, multiples of 8": (bert, "class", "right", lambda t: with_padding(t, multiple=8), "bert.encoder.layer.2"),
    "BERT, head": (bert, "class", "right", with_padding, "bert.pooler"),
    "BERT, tokens in collate": (bert, "text", "right", Together, "bert.encoder.layer.1"),
    "BERT, eager": (lambda: bert(attn_implementation="eager"), "class", "right", with_padding, "bert.encoder.layer.1"),
    "BERT, words": (lambda: bert("TokenClassification"), "words", "right", for_words, "bert.encoder.layer.2"),
    "GPT-2": (gpt2, "plain", "right", for_language, "transformer.h.1"),
    "GPT-2, left with positions": (gpt2, "plain", "left", lambda t: WithPositions(for_language(t)), "transformer.h.1"),
    "GPT-2, last token, left": (
        lambda: gpt2("ForSequenceClassification"), "class", "left", lambda t: WithPositions(with_padding(t)),
        "transformer.h.2",
    ),
    "GPT-2, last token": (lambda: gpt2("ForSequenceClassification"), "class", "right", with_padding, "transformer.h.2"),
    "T5": (t5, "translation", "right", for_translation, "decoder.block.0"),
    "T5, within the encoder": (lambda: t5(3), "translation", "right", for_translation, "encoder.block.1"),
    "T5, late": (t5, "translation", "right", for_translation, "decoder.block.1"),
}  # fmt: skip


def train(case, store, schedule=None, epochs=2):
    """Losses of every step, and each epoch's source; frozen for the whole run, or by a schedule."""
    make, kind, side, collator, boundary = CASES[case]
    torch.manual_seed(0)
    model = make()
    tokenizer = make_tokenizer(side)
    data, collate = Sentences(kind, tokenizer), collator(tokenizer)
    if schedule is None:
        cf.freeze(model, boundary, example_inputs=dict(collate([data[0], data[1]])))
    engine = cf.Engine(model, store, schedule=schedule, moves="always")
    torch.manual_seed(1)
    loader = engine.loader(DataLoader(data, 4, shuffle=True, collate_fn=collate))
    step = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    losses, sources = [], []
    for _ in engine.epochs(epochs):
        model.train()
        for batch in loader:
            loss = engine(**batch).loss
            step.zero_grad()
            loss.backward()
            step.step()
            losses.append(loss.item())
        promoted = 0 if store == "off" else loader.counts.promoted
        sources.append("promoted" if promoted == len(data) else loader.source)
    engine.close()
    return losses, sources


@pytest.fixture(autouse=True)
def _quiet():
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_without_a_cache(case):
    expected, _ = train(case, "off")
    got, sources = train(case, "host")
    assert sources == ["fill", "cached"]
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("case", "first", "then"),
    [
        ("BERT, multiples of 8", "bert.encoder.layer.1", "bert.pooler"),
        ("GPT-2, left with positions", "transformer.h.0", "transformer.h.2"),
        pytest.param("T5", "encoder.block.1", "decoder.block.1", marks=pytest.mark.slow),
    ],
)
def test_staged_losses_are_those_without_a_cache(case, first, then):
    """Rows of the deeper boundary are made of the shallower one's, whatever these hold beside activations."""
    schedule = [{"train_from": first, "epochs": 2}, {"train_from": then}]
    expected, _ = train(case, "off", cf.Stages(schedule), 4)
    got, sources = train(case, "host", cf.Stages(schedule), 4)
    assert sources == ["fill", "cached", "promoted", "cached"]
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("collator", "error", "words"),
    [
        (for_language, BatchDependentError, "how far its batch is padded"),
        (
            lambda t: WithPositions(for_language(t), skip_first=False),
            SplitError,
            "loss.*predicted from padding on its left",
        ),
    ],
)
def test_left_padding_that_reaches_rows_or_the_loss_is_refused(collator, error, words):
    """Positions that count padding; and the shifted loss, which predicts a text's first token from padding."""
    model, tokenizer = gpt2(), make_tokenizer("left")
    data, collate = Sentences("plain", tokenizer), collator(tokenizer)
    cf.freeze(model, "transformer.h.1", example_inputs=dict(collate([data[0], data[1]])))
    with pytest.raises(error, match=words):
        cf.Engine(model, "host").loader(DataLoader(data, 4, collate_fn=collate))


def test_a_vocabulary_larger_than_all_layers_is_opened_into_blocks():
    """As in small pretrained encoders, half of whose weights are word embeddings."""
    config = transformers.BertConfig(
        vocab_size=5000, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForSequenceClassification(config)
    example = {"input_ids": torch.ones(2, 4, dtype=torch.int64)}
    names = [block.name for block in cf.blocks(model, example)]
    assert {"bert.encoder.layer.0", "bert.encoder.layer.1", "classifier"} <= set(names)
