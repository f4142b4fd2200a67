"""Adapters of the real PEFT library: what runs before the first adapter is cached, the rest trains exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import cachefreeze as cf
from cachefreeze.errors import FreezeError
from cachefreeze.testing.exact import assert_exact
from cachefreeze.testing.traps import Trap

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
# PEFT calls deprecated names of transformers
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

VOCABULARY = 50


def sentences() -> dict[str, Any]:
    ids = torch.randint(2, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6], [2]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, 0])}


def language() -> dict[str, Any]:
    given = sentences()
    return {**given, "labels": given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)}


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, num_labels=3,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=1,
            use_cache=False,
        )
    )  # fmt: skip


def adapted(base: Callable[[], nn.Module], config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = peft.get_peft_model(base(), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)  # it starts at zero, where lora_A has no gradient
        return model.eval()

    return make


def lora(layers: list[int] | None, task: str = "SEQ_CLS", **options: Any) -> Any:
    targets = ["query", "value"] if task == "SEQ_CLS" else ["c_attn"]
    more = {} if layers is None else {"layers_to_transform": layers}
    return peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.1, task_type=task, **more, **options)


BERT, GPT2 = "base_model.model.bert.encoder.layer", "base_model.model.transformer.h"


@pytest.mark.parametrize(("layers", "boundary"), [([2], 2), ([1, 2], 1), (None, 0)])
def test_lora_of_bert(layers, boundary):
    """From the flags that PEFT set: the boundary is the first layer that holds an adapter."""
    parts = assert_exact(Trap(adapted(bert, lora(layers)), sentences, "", tolerance=1e-6))
    assert parts.boundary.name == f"{BERT}.{boundary}"
    assert parts.cached_fraction == pytest.approx(boundary / 3, abs=0.05)


@pytest.mark.parametrize("train_from", [f"{BERT}.2", f"{BERT}.1"])
def test_lora_of_a_model_that_was_frozen_as_well(train_from):
    """``cf.freeze`` on top locks what lies before the first adapter, so that dropout drops from there on alone."""
    parts = assert_exact(Trap(adapted(bert, lora([2])), sentences, train_from, tolerance=1e-6))
    assert parts.boundary.name == f"{BERT}.2"


def test_lora_of_a_tied_gpt2():
    config = lora([2], "CAUSAL_LM", fan_in_fan_out=True)
    parts = assert_exact(Trap(adapted(gpt2, config), language, "", tolerance=1e-6))
    assert parts.boundary.name == f"{GPT2}.2"


def test_ia3():
    config = peft.IA3Config(target_modules=["value"], feedforward_modules=[], task_type="SEQ_CLS")
    assert_exact(Trap(adapted(bert, config), sentences, "", tolerance=1e-6))


def test_in_train_mode_the_flags_alone_are_refused_with_the_line_to_write():
    model = adapted(bert, lora([2]))().train()
    with pytest.raises(FreezeError, match=rf"train mode.*cf\.freeze\(model, train_from='{BERT}\.2'\)"):
        cf.split(model, sentences())


def test_prefix_tuning_enters_the_first_layer_so_nothing_is_cached():
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(FreezeError, match="nothing of PeftModelForCausalLM is frozen before its first trainable block"):
        cf.split(adapted(gpt2, config)(), language())
