"""Samples of different lengths: training from their rows is training without a cache, or is refused by name."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

import cachefreeze as cf
from cachefreeze import errors
from cachefreeze.isolation import RandomState
from cachefreeze.row_source import Rows
from cachefreeze.testing.ragged import READERS, REFUSED, Case, Pad, Reader, Texts


def frozen(case):
    torch.manual_seed(0)
    model = case.model()
    cf.freeze(model, case.train_from, example_inputs=sample_batch(model, case.collate))
    return model


def sample_batch(model, collate, data=None):
    data = data or (Strings() if collate is from_text else Texts())
    batch = collate([data[0], data[1]])
    return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}


def train(case, store, *, epochs=3, data=None, workers=0, **options):
    """Losses of every step, sources of every pass, and the engine."""
    model = frozen(case)
    engine = cf.Engine(model, store, **options)
    torch.manual_seed(2)
    loader = engine.loader(DataLoader(data or Texts(), 5, shuffle=True, collate_fn=case.collate, num_workers=workers))
    step = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses, sources = [], []
    for _ in engine.epochs(epochs):
        model.train()
        for batch in loader:
            loss = engine(**batch)["loss"]
            step.zero_grad()
            loss.backward()
            step.step()
            losses.append(loss.item())
        sources.append(loader.source)
    return losses, sources, engine


@pytest.mark.parametrize("name", READERS)
def test_training_from_rows_is_training_without_a_cache(name, tmp_path):
    expected, sources, _ = train(READERS[name], "off")
    assert sources == ["frozen"] * 3
    for store in ("host", f"hdf5:{tmp_path}"):
        got, sources, engine = train(READERS[name], store)
        assert sources == ["fill", "cached", "cached"]
        assert got == pytest.approx(expected, rel=1e-5)
        engine.close()
    got, sources, engine = train(READERS[name], f"hdf5:{tmp_path}")
    assert sources == ["cached"] * 3, "the file is found again"
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_padding_would_spoil_is_refused(name):
    case = REFUSED[name]
    kind, words = case.error
    model = frozen(case)
    with pytest.raises(getattr(errors, kind), match=words):
        cf.Engine(model, "host").loader(DataLoader(Texts(), 5, collate_fn=case.collate))


RIGHT = READERS["right"]


def cached(store="host", case=RIGHT, data=None, **options):
    """An engine and its loader; the DataLoader shuffles unless it is given a sampler."""
    engine = cf.Engine(frozen(case), store)
    options = {"shuffle": "sampler" not in options, "collate_fn": case.collate} | options
    return engine, engine.loader(DataLoader(data or Texts(), options.pop("batch_size", 5), **options))


@pytest.mark.parametrize("pad", [Pad(), Pad(multiple=8), Pad(multiple=8, left=True, positions=True)])
def test_stores_hold_true_lengths(tmp_path, pad):
    """Bytes in memory within 2 % of the activations of all tokens, and of the file within 5 %."""
    data = Texts(150, lengths=[8 + i % 30 for i in range(150)])
    case = Case(partial(Reader, width=512), pad)
    true_bytes = sum(data.lengths) * 512 * 4
    engine, loader = cached("host", case, data)
    assert true_bytes <= engine.cache.nbytes <= 1.02 * true_bytes
    engine, loader = cached(f"hdf5:{tmp_path}", case, data)
    engine.cache.fill(loader)
    engine.close()
    (path,) = tmp_path.glob("*.h5")
    assert true_bytes <= path.stat().st_size <= 1.05 * true_bytes


@pytest.mark.parametrize("least", [0, 1], ids=["no steps", "padding alone"])
def test_an_empty_text_hides_no_mask(least):
    """Its mask has no ones; what ``pad_to_multiple_of`` adds to the others is padding all the same."""
    data = Texts(50, lengths=[0, *(8 + i % 30 for i in range(49))])

    def collate(items):
        longest = max(len(item["ids"]) for item in items)
        return replace(Pad(multiple=8), fixed=max(longest, least))(items)

    engine, _ = cached(case=Case(partial(Reader, width=128), collate), data=data)
    true_bytes = sum(data.lengths) * 128 * 4
    assert true_bytes <= engine.cache.nbytes <= 1.03 * true_bytes


@pytest.mark.parametrize("persistent", [None, False, True])
def test_order_draws_and_batches_are_the_dataloaders(persistent):
    """Everything but what the model consumes is the very batch that the DataLoader would have made, in its order."""
    workers = {} if persistent is None else {"num_workers": 2, "persistent_workers": persistent}
    pad = Pad(labels="", extra=("name", "label"))
    case = replace(RIGHT, collate=pad)

    def visit(loader):
        seen = []
        for _ in range(3):
            for batch in loader:
                draws = torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002
                seen.append((batch["name"], batch["label"], draws))
        return seen

    def seed():
        torch.manual_seed(11)
        np.random.seed(11)  # noqa: NPY002
        random.seed(11)

    seed()
    expected = visit(DataLoader(Texts(), 5, shuffle=True, collate_fn=pad, **workers))
    engine = cf.Engine(frozen(case), "host")
    seed()
    loader = engine.loader(DataLoader(Texts(), 5, shuffle=True, collate_fn=pad, **workers))
    assert visit(loader) == expected
    assert loader.source == "cached"


@pytest.mark.parametrize("store", ["host", "device"])
def test_rows_are_padded_as_the_batch_is(store):
    """A batch is padded to its own longest text, not to that with which its rows were made."""
    engine, loader = cached(store, sampler=range(37), batch_size=7, case=replace(RIGHT, collate=Pad(multiple=4)))
    engine.cache.fill(loader)
    plain = DataLoader(Texts(), 7, collate_fn=Pad(multiple=4))
    for given, batch in zip(plain, loader, strict=True):
        expected = engine.parts.prefix(**given)
        rows = batch["ids"]
        assert isinstance(rows, Rows)
        assert all(torch.equal(batch[key].raw, given[key]) for key in given), "labels for a metric, say"
        assert rows.to(torch.float64).raw.dtype == torch.float64
        real = given["mask"].bool()
        for spec, got, wanted in zip(engine.parts.boundary.tensors, rows.tensors, expected, strict=True):
            assert got.shape == wanted.shape
            if spec.input is not None:
                assert torch.equal(got, wanted)
            else:
                assert torch.allclose(got[real], wanted[real], atol=1e-6)
                assert not got[~real].any(), "padding is zeros"


@pytest.mark.parametrize("workers", [0, 2])
def test_repeated_samples_early_breaks_and_batches_of_one(workers, tmp_path):
    data = Texts()
    options = {"sampler": RandomSampler(data, replacement=True, num_samples=41), "num_workers": workers}
    engine, loader = cached(f"hdf5:{tmp_path}", data=data, **options)
    for _ in range(2):
        for position, batch in enumerate(loader):
            engine(**batch)
            if position == 2:
                break
    assert 0 < engine.cache.info()["train"]["rows_present"] < 37
    engine.close()
    engine, loader = cached(f"hdf5:{tmp_path}", data=data, batch_size=4, **options)
    before = engine.cache.info()["train"]["rows_present"]
    assert before, "a partial fill goes on where it stopped"
    assert len([engine(**batch) for batch in loader][-1]["logits"]) == 1
    assert loader.counts.computed == engine.cache.info()["train"]["rows_present"] - before
    engine.cache.fill(loader)
    assert engine.cache.verify() == {"train": []}


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_that_are_not_kept_are_right_all_the_same(workers, tmp_path):
    """Where another process writes the file, stored and computed rows of different lengths go into one batch."""
    engine, loader = cached(f"hdf5:{tmp_path}", sampler=range(37), num_workers=workers)
    next(iter(loader))
    model = engine.model.eval()
    loader.rows.store.writable = False
    for _ in range(2):
        for given, batch in zip(DataLoader(Texts(), 5, collate_fn=Pad()), loader, strict=True):
            assert torch.allclose(engine(**batch)["logits"], model(**given)["logits"], atol=1e-6)
        assert (loader.source, loader.counts.cached, loader.counts.computed) == ("frozen", 5, 32)


def test_nothing_is_drawn_and_a_collate_function_may_take_items_apart():
    """Probing, measuring, splitting, filling and collating leave all random states as they were."""

    def popping(items):
        ids = [item.pop("ids") for item in items]
        return Pad()([{**item, "ids": row} for item, row in zip(items, ids, strict=True)])

    state = RandomState.capture()
    engine = cf.Engine(frozen(RIGHT).eval(), "host")
    torch.set_rng_state(state.torch_cpu)
    loader = engine.loader(DataLoader(Texts(), 5, collate_fn=popping, generator=torch.Generator()))
    for _ in range(2):
        assert sum(len(engine(**batch)["logits"]) for batch in loader) == 37
    assert state.moved() == []


def files_after(tmp_path, data, pad, **options):
    engine, loader = cached(f"hdf5:{tmp_path}", replace(RIGHT, collate=pad), data, **options)
    engine.cache.fill(loader)
    engine.close()
    return len(list(tmp_path.glob("*.h5")))


@pytest.mark.parametrize("change", ["item", "length", "order", "beside", "side", "multiple", "collate"])
def test_a_change_of_the_data_or_of_the_padding_is_a_miss(change, tmp_path):
    pad = Pad(positions=True)
    assert files_after(tmp_path, Texts(), pad) == 1
    assert files_after(tmp_path, Texts(), pad, num_workers=2, batch_size=3) == 1, "nothing changed that makes a row"
    data = Texts()
    if change == "item":
        data.ids[31][1] += 1
    elif change == "length":
        data.ids[31].pop()
    elif change == "order":
        data.ids[30], data.ids[31] = data.ids[31], data.ids[30]
    elif change == "beside":  # of nothing that the model consumes
        data.title = "another text"
    elif change == "side":
        pad = replace(pad, left=True)
    elif change == "multiple":
        pad = replace(pad, multiple=8)
    else:
        pad = Shifted(positions=True)
    assert files_after(tmp_path, data, pad) == 2


class Shifted(Pad):
    """Another tokenizer, so to say: the same items, other ids."""

    def __call__(self, items):
        return super().__call__([{**item, "ids": [1 + i % 21 for i in item["ids"]]} for item in items])


def test_a_second_loader_may_have_texts_of_one_length():
    engine, _ = cached()
    val = engine.loader(DataLoader(Texts(9, lengths=[6] * 9), 4, collate_fn=Pad()))
    model = engine.model.eval()
    for _ in range(2):
        for given, batch in zip(DataLoader(Texts(9, lengths=[6] * 9), 4, collate_fn=Pad()), val, strict=True):
            assert torch.allclose(engine(**batch)["logits"], model(**given)["logits"], atol=1e-6)
    assert val.source == "cached"


def test_texts_padded_to_a_fixed_length_are_split_as_any_other_data():
    engine, loader = cached(case=replace(RIGHT, collate=Pad(fixed=20)))
    assert not engine.parts.padded
    assert [field.name for field in loader.rows.spec.fields if field.lengths is not None] == []
    with pytest.raises(errors.LoaderError, match="different lengths"):
        engine.loader(DataLoader(Texts(), 5, collate_fn=Pad()))


def test_a_text_without_tokens_has_a_row_without_steps():
    data = Texts(12, lengths=[0, 3, 5, 7, 9, 4, 6, 0, 2, 8, 3, 5])
    case = replace(RIGHT, collate=Pad(multiple=4))
    engine, loader = cached(case=case, data=data, sampler=range(12))
    model = engine.model.eval()
    for _ in range(2):
        for given, batch in zip(DataLoader(data, 5, collate_fn=case.collate), loader, strict=True):
            assert torch.allclose(engine(**batch)["logits"], model(**given)["logits"], atol=1e-6)


def from_text(items):
    """Tokens are made of texts in the collate function; items are (text, label)."""
    ids = [[1 + ord(letter) % 22 for letter in text] for text, _ in items]
    return Pad()([{"ids": row, "label": label} for row, (_, label) in zip(ids, items, strict=True)])


class Strings(Texts):
    def __getitem__(self, index):
        return "".join(chr(97 + i) for i in self.ids[index]), index % 3


def test_tokens_made_in_the_collate_function():
    case = replace(RIGHT, collate=from_text)
    expected, _, _ = train(replace(case), "off", data=Strings())
    got, sources, _ = train(case, "host", data=Strings())
    assert sources == ["fill", "cached", "cached"]
    assert got == pytest.approx(expected, rel=1e-5)


def collated(how):
    """Collate functions that do more to a text than padding it on one side."""

    def collate(items):
        batch = Pad()(items)
        lengths = [len(item["ids"]) for item in items]
        size = max(lengths)
        if how == "both sides":
            batch["ids"] = torch.stack(
                [row.roll((size - n) // 2) for row, n in zip(batch["ids"], lengths, strict=True)]
            )
            batch["mask"] = (batch["ids"] != 0).long()
        elif how == "last token":
            for row, n in zip(batch["ids"], lengths, strict=True):
                row[n:] = row[n - 1]
        elif how == "shortest":
            batch = {key: value[:, : min(lengths)] if value.dim() > 1 else value for key, value in batch.items()}
        elif how == "square mask":
            batch["mask"] = batch["mask"][:, None, :] * batch["mask"][:, :, None]
        elif how == "number":
            batch["positions"] = size
        elif how.startswith("sorted"):
            order = sorted(range(len(items)), key=lambda i: lengths[i] if "length" in how else items[i]["label"])
            batch = {key: value[order[::-1] if "long first" in how else order] for key, value in batch.items()}
        return batch

    return collate


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("both sides", errors.BatchDependentError, "does not simply pad|depend on the others"),
        ("last token", errors.BatchDependentError, "does not simply pad ids"),
        ("shortest", errors.BatchDependentError, "does not simply pad|cuts a sample"),
        ("sorted by length, long first", errors.BatchDependentError, "does not keep their order"),
        ("sorted by length, short first", errors.BatchDependentError, "does not keep their order"),
        ("sorted by label", errors.BatchDependentError, "does not keep their order"),
        ("square mask", errors.LoaderError, "mask is padded in more than one dimension"),
        (
            "number",
            errors.LoaderError,
            "positions of sample 1, collated alone, is 12 where of the first sample it is 17",
        ),
    ],
)
def test_collate_functions_that_do_not_simply_pad(how, error, words):
    with pytest.raises(error, match=words):
        cached(collate_fn=collated(how))


class Pictures(Texts):
    """Images of different sizes, padded to the largest of a batch as detectors do."""

    def __getitem__(self, index):
        return torch.full((3, 4 + index % 3, 5 + index % 2), float(index)), index % 3


def pictures(items):
    size = [max(image.shape[d] for image, _ in items) for d in (1, 2)]
    made = torch.zeros(len(items), 3, *size)
    for i, (image, _) in enumerate(items):
        made[i, :, : image.shape[1], : image.shape[2]] = image
    return made, torch.tensor([label for _, label in items])


def test_images_padded_to_the_largest_of_a_batch_are_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model.append(torch.nn.Linear(4, 3))
    cf.freeze(model, "3")
    with pytest.raises(errors.LoaderError, match="more than one dimension"):
        cf.Engine(model, "host").loader(DataLoader(Pictures(), 4, collate_fn=pictures))


class Unkept(Texts):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "image": object()}


class Uneven(Texts):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "extra": 1} if index == 20 else item


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (Unkept(), errors.FieldError, r"'image'.*object"),
        (Uneven(), errors.FieldError, "differ in structure"),
        (Texts(20, lengths=[4, 9] * 10), errors.LoaderError, "too few values"),
    ],
)
def test_items_that_cannot_be_kept_or_told_apart(data, error, words):
    with pytest.raises(error, match=words):
        cached(data=data)


def test_a_length_that_the_probe_missed_is_an_error_not_a_wrong_row():
    lengths = [6] * 500
    lengths[3] = 9  # between the samples that are probed
    _, loader = cached(data=Texts(500, lengths=lengths), sampler=range(500))
    with pytest.raises(errors.LoaderError, match=r"shapes \[\(9,\), \(9,\), \(\)\].*fixed length"):
        next(iter(loader))


class Settings(Pad):
    """A collate function whose settings can be changed, as a tokenizer's can."""

    side = False

    def __call__(self, items):
        return replace(Pad(positions=True), left=Settings.side)(items)


@pytest.mark.parametrize("after", ["nothing", "a fill"])
def test_settings_that_change_behind_the_loader_are_caught(after, monkeypatch):
    """Padding on the other side than the rows were measured with, in a fill as in a cached pass."""
    engine, loader = cached(case=replace(RIGHT, collate=Settings()))
    if after == "a fill":
        engine.cache.fill(loader)
    monkeypatch.setattr(Settings, "side", True)
    with pytest.raises(errors.BatchDependentError, match="not padded as its samples were"):
        list(loader)


def test_a_second_loader_gives_the_model_the_same_inputs():
    engine, _ = cached()
    with pytest.raises(errors.LoaderError, match="give the model ids, mask, but it was split with ids, mask, labels"):
        engine.loader(DataLoader(Texts(9), 4, collate_fn=Pad(labels="")))


def test_a_manager_alone_splits_samples_of_different_lengths():
    """Without an engine: the split is of the loader's samples, and rows give the model's own loss and logits."""
    model = frozen(RIGHT).eval()
    batches = DataLoader(Texts(), 5, collate_fn=Pad())
    manager = cf.CacheManager.of(model, batches, "host")
    loader = manager.loader(batches)
    for _ in range(2):
        for batch, given in zip(loader, batches, strict=True):
            with torch.no_grad():
                got, wanted = manager.parts.suffix(*batch["ids"].tensors), model(**given)
            assert got["loss"].item() == pytest.approx(wanted["loss"].item(), rel=1e-5)
            assert torch.allclose(got["logits"], wanted["logits"], atol=1e-5)
    assert loader.source == "cached"
    manager.close()


def test_a_split_for_one_length_is_no_split_for_many():
    model = frozen(RIGHT)
    parts = cf.split(model, sample_batch(model, Pad()), "blocks.2")
    with pytest.raises(errors.LoaderError, match=r"CacheManager\.of"):
        cf.CacheManager(parts, "host").loader(DataLoader(Texts(), 5, collate_fn=Pad()))


class Frames(Texts):
    """Recordings of different lengths: numpy frames, and a label for each."""

    def __getitem__(self, index):
        frames = np.random.default_rng(index).normal(size=(self.lengths[index], 4)).astype(np.float32)
        return frames, np.arange(self.lengths[index]) % 3


def framed(items):
    size = max(len(frames) for frames, _ in items)
    made, labels = torch.zeros(len(items), size, 4), torch.full((len(items), size), -100)
    for i, (frames, own) in enumerate(items):
        made[i, : len(frames)] = torch.from_numpy(frames)
        labels[i, : len(own)] = torch.from_numpy(own)
    return made, labels


class Listener(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.GRU(4, 6, batch_first=True)
        self.last = torch.nn.Linear(6, 3)

    def forward(self, frames):
        return self.last(self.first(frames)[0])


def test_tuples_of_arrays_and_a_loss_outside(tmp_path):
    """No mask, no dict: frames padded with zeros, labels with -100, and a loss of the user's own."""
    found = []
    for store in ("off", "host", f"hdf5:{tmp_path}"):
        torch.manual_seed(0)
        model = Listener()
        cf.freeze(model, "last", example_inputs=torch.zeros(2, 5, 4))
        engine = cf.Engine(model, store)
        torch.manual_seed(1)
        train = engine.loader(DataLoader(Frames(), 5, shuffle=True, collate_fn=framed))
        optimizer = torch.optim.SGD(model.last.parameters(), 0.1)

        def loss_fn(output, target):
            return torch.nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-100)

        losses = []
        for _ in engine.epochs(2):
            for frames, labels in train:
                loss = loss_fn(engine(frames), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        found.append(losses)
        engine.close()
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == found[1]
