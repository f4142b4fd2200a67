"""Promotion: rows of a deeper boundary from the rows of a shallower one, checked, resumable, never from a wrong row."""

from __future__ import annotations

import logging
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import cachefreeze as cf
from cachefreeze.errors import SplitError, StaleCacheError

COUNT = 20


@pytest.fixture(autouse=True)
def unwatched(monkeypatch):
    """Every fetch is counted here; the two samples that each pass looks at are not meant (tests/test_watching.py)."""
    monkeypatch.setattr("cachefreeze.watching.SampleWatch.check", lambda *_: None)


class Scale(nn.Module):
    """Rounds alike in every batch, which a small matrix product does not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return (x * self.weight).relu() + 1


class Counted(Dataset):
    """Notes which samples are fetched, on the class: what an instance holds is part of a fingerprint."""

    fetched: ClassVar[list[int]] = []

    def __init__(self):
        self.data = torch.randn(COUNT, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        self.fetched.append(index)
        return self.data[index], index


def net():
    torch.manual_seed(0)
    return nn.Sequential(Scale(), Scale(), Scale(), nn.Linear(4, 2))


def managers(store, *, below_rows=COUNT, deeper="2"):
    """A model with a store at block 1 that holds the first rows, and a deeper manager that promotes from it."""
    model, data = net(), Counted()
    loader = DataLoader(data, 5, shuffle=True, generator=torch.Generator().manual_seed(2))
    cf.freeze(model, deeper)
    example = data.data[:3]
    below = cf.CacheManager(cf.split(model, example, "1"), store)
    held = below.loader(loader).rows
    for at in range(0, below_rows, 5):
        rows = list(range(at, at + 5))
        held.compute(rows, held.fetch(rows))
    above = cf.CacheManager(cf.split(model, example, deeper), store, below=below)
    batches = above.loader(loader)
    data.fetched.clear()
    return model, data, below, above, batches


def rows_of(model, batches, deeper=2):
    """Every batch is what the model computes from its samples; returns how many rows were handed out."""
    seen = 0
    for rows, index in batches:
        with torch.no_grad():
            assert torch.equal(rows.tensors[0], model[:deeper](batches.dataset.data[index]))
        seen += len(index)
    return seen


@pytest.mark.parametrize("store", ["host", "hdf5"])
def test_a_promoting_epoch_fetches_no_sample(store, tmp_path):
    model, data, below, above, batches = managers(f"hdf5:{tmp_path}" if store == "hdf5" else store)
    assert rows_of(model, batches) == COUNT
    assert data.fetched == []
    assert (batches.source, batches.counts.promoted, batches.counts.computed) == ("fill", COUNT, COUNT)
    assert not above.promoting
    above.let_go()
    below.close()
    data.fetched.clear()
    assert rows_of(model, batches) == COUNT
    assert (batches.source, batches.counts.promoted, data.fetched) == ("cached", 0, [])


def test_rows_that_are_not_below_come_from_their_samples():
    model, data, _, above, batches = managers("host", below_rows=10)
    assert above.promoting
    assert rows_of(model, batches) == COUNT
    assert sorted(data.fetched) == list(range(10, 20))
    assert (batches.counts.promoted, batches.counts.computed) == (10, 20)


def test_fill_promotes():
    model, data, _, above, batches = managers("host", below_rows=15)
    done = above.fill(batches)
    assert (done.rows, done.computed_rows) == (COUNT, COUNT)
    assert sorted(data.fetched) == list(range(15, 20))
    assert rows_of(model, batches) == COUNT
    assert batches.source == "cached"


def test_a_damaged_row_below_is_made_from_its_sample(tmp_path):
    model, data, below, _, batches = managers(f"hdf5:{tmp_path}")
    path = below.info()["train"]["path"]
    below.commit()
    with open(path, "r+b") as file:  # noqa: PTH123 - it is opened to be damaged
        content = file.read()
        stored = below._rows["train"].store.read(torch.tensor([7]))["activation.0"].numpy().tobytes()
        file.seek(content.index(stored))
        file.write(bytes(len(stored)))
    below.close()
    # opened anew, so that rows are checked on their first read
    model, data, _, _, batches = managers(f"hdf5:{tmp_path}", below_rows=0)
    assert rows_of(model, batches) == COUNT
    assert data.fetched == [7]
    assert batches.counts.promoted >= COUNT - 1


def test_an_interrupted_promotion_goes_on(tmp_path):
    """Rows that were promoted are there, the others come from below; not a sample is fetched again."""
    model, data, below, above, batches = managers(f"hdf5:{tmp_path}")
    passing = iter(batches)
    next(passing)
    next(passing)
    above.close()
    below.close()
    model, data, _, above, batches = managers(f"hdf5:{tmp_path}", below_rows=0)
    assert above.info()["train"]["rows_present"] == 10
    assert rows_of(model, batches) == COUNT
    assert data.fetched == []
    assert batches.counts.promoted == 10


def test_a_wrong_promoted_row_is_found_before_the_rows_below_are_let_go(monkeypatch):
    class Wrong(nn.Module):
        def forward(self, x):
            return x + 1

    monkeypatch.setattr(cf.Parts, "segment_to", lambda self, deeper: Wrong())
    _, _, _, above, batches = managers("host")
    list(batches)
    with pytest.raises(StaleCacheError, match="differs from what is computed now"):
        above.let_go()


def test_a_prefix_that_changed_is_found_while_promoting():
    model, _, _, _, batches = managers("host")
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(StaleCacheError, match="changed"):
        list(batches)


def test_rows_below_that_were_stale_before_the_move_are_not_promoted():
    """The deeper split was made after the change, so only those below can tell."""
    model, data, below, _, batches = managers("host")
    with torch.no_grad():
        model[0].weight += 1
    above = cf.CacheManager(cf.split(model, data.data[:3], "2"), "host", below=below)
    with pytest.raises(StaleCacheError, match="before the boundary '1' changed"):
        list(above.loader(batches.dataloader))


def test_a_batch_of_one_is_computed_as_two():
    model, data, _, _, batches = managers("host")
    held = batches.rows
    sizes = []
    held._segment.register_forward_pre_hook(lambda _, rows: sizes.append(len(rows[0])))
    for row in range(COUNT):
        made = held._promote([row])
        with torch.no_grad():
            assert torch.equal(made[0].values["activation.0"][0], model[:2](data.data[[row, row]])[0])
    assert set(sizes) == {2}


# --- in an engine ---

STAGES = [{"train_from": "1", "epochs": 2}, {"train_from": "2", "epochs": 2}, {"train_from": "3"}]


def follow(store, *, data=None):
    model, data = net(), data or Counted()
    engine = cf.Engine(model, store, schedule=cf.Stages(STAGES), moves="always")
    batches = engine.loader(DataLoader(data, 5, shuffle=True, generator=torch.Generator().manual_seed(2)))
    return model, data, engine, batches


def test_an_engine_promotes_at_every_move_and_keeps_one_store(tmp_path):
    model, data, engine, batches = follow(f"hdf5:{tmp_path}")
    seen, files = [], []
    for epoch in engine.epochs(6):
        data.fetched.clear()
        assert rows_of(model, batches, deeper=1 + epoch // 2) == COUNT
        seen.append((batches.source, batches.counts.promoted, len(data.fetched)))
        files.append(len(list(tmp_path.glob("*.h5"))))
    assert seen == [("fill", 0, 20), ("cached", 0, 0)] + [("fill", 20, 0), ("cached", 0, 0)] * 2
    assert files == [1, 1, 2, 1, 2, 1], "two stores only while one is made from the other"
    assert engine.parts.boundary.name == "3"


def test_where_rows_cannot_be_promoted_they_are_filled_and_it_says_so(monkeypatch, caplog):
    def refuse(self, deeper):
        raise SplitError("rows here do not hold what the deeper boundary needs")

    monkeypatch.setattr(cf.Parts, "segment_to", refuse)
    model, data, engine, batches = follow("host")
    with caplog.at_level(logging.WARNING, "cachefreeze"):
        for epoch in engine.epochs(5):
            data.fetched.clear()
            rows_of(model, batches, deeper=1 + epoch // 2)
    assert sorted(data.fetched) == list(range(COUNT))
    assert (batches.source, batches.counts.promoted) == ("fill", 0)
    assert "filled from the samples" in caplog.text


def test_a_resumed_run_promotes_from_where_it_was_left(tmp_path):
    """Killed before a move: the next process opens the store of the boundary before, and fetches nothing."""
    model, data, engine, batches = follow(f"hdf5:{tmp_path}")
    epochs = engine.epochs(6)
    for _ in range(2):
        next(epochs)
        rows_of(model, batches, deeper=1)
    state = {**engine.state_dict(), "epoch": 2}  # rows were made, and nothing trained
    engine.close()
    model, data, engine, batches = follow(f"hdf5:{tmp_path}")
    engine.load_state_dict(state)
    data.fetched.clear()
    next(engine.epochs(6))
    data.fetched.clear()  # of the views and checks at the opening of a store
    assert rows_of(model, batches, deeper=2) == COUNT
    assert (batches.counts.promoted, data.fetched) == (COUNT, [])
