"""Samples of different lengths under a schedule: their rows are promoted, resumed and let go as those of one size."""

from __future__ import annotations

import time
from typing import ClassVar

import pytest
import torch
from torch.utils.data import DataLoader

import cachefreeze as cf
from cachefreeze import errors
from cachefreeze.manager import split_on
from cachefreeze.measuring import measure
from cachefreeze.samples import View
from cachefreeze.schedules import Ladder
from cachefreeze.testing.ragged import Pad, Reader, Running, Texts
from cachefreeze.tracing import record_usage

COUNT = 23


class Counted(Texts):
    """Notes which samples are fetched, on the class: what an instance holds is part of a fingerprint."""

    fetched: ClassVar[list[int]] = []

    def __getitem__(self, index):
        self.fetched.append(index)
        return super().__getitem__(index)


def net():
    torch.manual_seed(0)
    return Running()


STAGES = [
    {"epochs": 1},
    {"train_from": "blocks.1", "epochs": 2},
    {"train_from": "blocks.3", "epochs": 2},
    {"train_from": "head", "epochs": 1},
    {"train_from": "blocks.2"},  # thaws again
]
SCHEDULES = {
    "stages": lambda: cf.Stages(STAGES),
    "freezeout": lambda: cf.FreezeOut(0.4, "linear"),
    "plasticity": lambda: cf.Plasticity(window=2, threshold=0.9, patience=1, checks=4),
}


def train(store, schedule, pad, *, epochs=8):
    """Losses of every step, the final weights, random numbers drawn next, and each epoch's source and boundary."""
    model, data = net(), Counted(COUNT)
    torch.manual_seed(2)
    engine = cf.Engine(model, store, schedule=SCHEDULES[schedule](), moves="always")
    batches = engine.loader(DataLoader(data, 5, shuffle=True, collate_fn=pad))
    checks = engine.loader(DataLoader(Texts(7, seed=1), 4, collate_fn=pad))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    engine.attach(optimizer)
    losses, seen = [], []
    for _ in engine.epochs(epochs):
        model.train()
        data.fetched.clear()
        for batch in batches:
            loss = engine(**batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        seen.append((batches.source, engine.boundary, batches.counts.promoted, len(data.fetched)))
        model.eval()
        with torch.no_grad():
            losses += [engine(**batch)["loss"] for batch in checks]
    engine.close()
    return torch.stack(losses), model.state_dict(), torch.rand(3), seen


@pytest.mark.parametrize(
    ("schedule", "pad", "store"),
    [
        ("stages", Pad(labels="tags"), "host"),
        ("stages", Pad(labels="tags", multiple=8), "hdf5"),
        ("stages", Pad(labels="tags", left=True, positions=True), "hdf5"),
        ("freezeout", Pad(labels="tags", multiple=4), "host"),
        ("plasticity", Pad(labels="tags", multiple=4), "host"),
    ],
)
def test_a_staged_run_with_a_cache_is_the_run_without(schedule, pad, store, tmp_path):
    """Bit for bit, through every move, padded to the longest of each batch or to a multiple."""
    expected = train("off", schedule, pad)
    got = train(f"hdf5:{tmp_path}" if store == "hdf5" else store, schedule, pad)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(got[1][name], value) for name, value in expected[1].items())
    assert torch.equal(got[2], expected[2]), "another random state than without a cache"
    boundaries = [boundary for _, boundary, *_ in got[3]]
    assert boundaries == [boundary for _, boundary, *_ in expected[3]]
    assert len(set(boundaries)) >= 4, "at least three moves"
    if schedule == "stages":
        # a thaw fills from the samples
        assert [(source, promoted) for source, _, promoted, _ in got[3]] == [
            ("live", 0),
            *(("fill", 0), ("cached", 0), ("fill", COUNT), ("cached", 0), ("fill", COUNT)),
            *(("fill", 0), ("cached", 0)),
        ]
        # every pass looks at two samples, and at two of the rows below
        assert [fetched <= 4 for *_, fetched in got[3]] == [False, False, True, True, True, True, False, True]
        assert len(list(tmp_path.glob("*.h5"))) == (2 if store == "hdf5" else 0), "one of each loader"


def managers(store, *, below_rows=COUNT):
    """Stores at a boundary, of which the first rows are there, and at a deeper one whose rows are made of these."""
    model = net().eval()
    loader = DataLoader(Counted(COUNT), 5, collate_fn=Pad(labels="tags", multiple=4))
    cf.freeze(model, "blocks.3", example_inputs=dict(next(iter(loader))))
    view = View.of(loader, ["ids", "mask", "labels"])
    below = cf.CacheManager(split_on(model, view, None, "blocks.1"), store)
    held = below.loader(loader).rows
    for row in range(below_rows):
        held.compute([row], held.fetch([row]))
    above = cf.CacheManager(split_on(model, view, None, "blocks.3"), store, below=below)
    batches = above.loader(loader)
    Counted.fetched.clear()
    return loader, below, above, batches


@pytest.fixture
def unwatched(monkeypatch):
    """Every fetch is counted; the two samples that each pass looks at are not meant (tests/test_watching.py)."""
    monkeypatch.setattr("cachefreeze.watching.SampleWatch.check", lambda *_: None)


@pytest.mark.usefixtures("unwatched")
def test_rows_that_are_not_below_come_from_their_samples():
    loader, _, above, batches = managers("host", below_rows=9)
    got = [above.parts.suffix(*batch["ids"].tensors)["loss"] for batch in batches]
    assert sorted(Counted.fetched) == list(range(9, COUNT))
    assert (batches.counts.promoted, batches.counts.computed) == (9, COUNT)
    above.let_go()  # a few rows are made again of their samples
    assert torch.equal(torch.stack(got), torch.stack([above.parts.model(**batch)["loss"] for batch in loader]))


@pytest.mark.usefixtures("unwatched")
def test_an_interrupted_promotion_goes_on(tmp_path):
    """Rows that were promoted are there, the others come from below; not a sample is fetched again."""
    _, below, above, batches = managers(f"hdf5:{tmp_path}")
    passing = iter(batches)
    next(passing)
    next(passing)
    above.close()
    below.close()
    _, _, above, batches = managers(f"hdf5:{tmp_path}", below_rows=0)
    assert above.info()["train"]["rows_present"] == 10
    assert above.fill(batches).computed_rows == COUNT - 10
    assert Counted.fetched == []
    assert above.verify() == {"train": []}


def test_rows_of_a_batch_of_one_are_promoted_as_two():
    """And are stored at their own length: what is kept is what the fill would keep."""
    promoted = managers("host")[3].rows
    sizes = []
    promoted._segment.register_forward_pre_hook(lambda _, rows: sizes.append(len(rows[0])))
    made = promoted._promote([7]) + promoted._promote([3, 9, 4])
    assert sizes == [2, 3]
    for part in made:
        again = promoted._run_prefix(part.rows, promoted.fetch(part.rows))
        assert part.values.keys() == again.values.keys()
        assert all(torch.equal(part.values[name], value) for name, value in again.values.items())


class Least(torch.nn.Module):
    """Adds the least activation of its batch's row; that of padding tokens is none, that of zeros is."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(6))

    def forward(self, x, mask):
        return x * self.weight + x.amin(dim=(1, 2), keepdim=True)


class Unshifted(torch.nn.Module):
    """What is added to all of a row alike makes no difference to what comes after it."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(6)

    def forward(self, x, mask):
        return self.norm(x)


def test_a_segment_that_zeros_for_padding_spoil_is_refused():
    """Either boundary has rows; those of the deeper one are not made of padded rows of the other."""
    model = net().eval()
    model.blocks = torch.nn.ModuleList([model.blocks[0], Least(), Unshifted()])
    with torch.no_grad():
        model.embed.weight.abs_().add_(1)[0] = 99
        model.places.weight.abs_()
    view = View.of(DataLoader(Texts(COUNT), 5, collate_fn=Pad(labels="tags")), ["ids", "mask", "labels"])
    shallower, deeper = (split_on(model, view, None, name) for name in ("blocks.1", "blocks.2"))
    with pytest.raises(errors.SplitError, match=r"made from rows at 'blocks\.1' are not those made from the samples"):
        shallower.segment_to(deeper)


def test_loaders_that_give_the_model_something_else_are_refused_before_training():
    """The boundary moves for all of them at once, in the middle of the run."""
    engine = cf.Engine(net(), "host", schedule=cf.AllButLast(1))
    engine.loader(DataLoader(Texts(COUNT), 5, collate_fn=Pad(labels="tags")))
    other = DataLoader(Texts(COUNT), 5, collate_fn=Pad(labels="tags", positions=True))
    with pytest.raises(errors.LoaderError, match="give the model ids, mask, positions, labels, padded, those of the"):
        engine.loader(other)
    with pytest.raises(errors.LoaderError, match="give the model ids, labels, padded, those of the first one ids, "):
        engine.loader(other, inputs=["ids", "labels"])
    engine = cf.Engine(net(), "host", schedule=cf.AllButLast(1))
    engine.loader(DataLoader(Texts(COUNT), 5, collate_fn=Pad(labels="tags", fixed=20)))
    with pytest.raises(errors.LoaderError, match="those of the first one samples of one shape"):
        engine.loader(other)


def test_a_further_loader_may_have_texts_of_one_length():
    data = Texts(6, lengths=[5] * 6)
    model = net()
    engine = cf.Engine(model, "host", schedule=cf.Stages(STAGES[1:3]), moves="always")
    engine.loader(DataLoader(Texts(COUNT), 5, collate_fn=Pad(labels="tags")))
    plain = DataLoader(data, 4, collate_fn=Pad(labels="tags"))
    checks = engine.loader(plain)
    model.eval()
    for _ in engine.epochs(4):
        for given, batch in zip(plain, checks, strict=True):
            with torch.no_grad():
                assert torch.equal(engine(**batch)["logits"], model(**given)["logits"])
    assert (checks.source, engine.parts.boundary.name) == ("cached", "blocks.3")


def test_a_plan_counts_rows_at_their_own_length():
    """Bytes of all rows are those of the store, at a boundary with a row a token and at one with a row a text."""
    data = Texts(60)
    torch.manual_seed(0)
    model = Reader(width=64)
    loader = DataLoader(data, 5, collate_fn=Pad(multiple=8))
    planned = cf.plan(model, loader, store="host")
    for name in ("blocks.0", "blocks.2", "head"):
        cf.freeze(model, name, example_inputs=dict(next(iter(loader))))
        manager = cf.CacheManager.of(model, loader, "host")
        manager.loader(loader)
        assert planned.at(name).nbytes == pytest.approx(manager.nbytes, rel=0.03)
        cf.unfreeze(model, example_inputs=dict(next(iter(loader))))


@pytest.mark.usefixtures("slept_time")
def test_collating_anew_is_part_of_what_a_cached_epoch_costs():
    def slow(items):
        time.sleep(0.01)
        return Pad(labels="tags")(items)

    model, loader = net(), DataLoader(Texts(40), 10, collate_fn=slow)
    view = View.of(loader, ["ids", "mask", "labels"])
    usage = record_usage(model, view.example())
    names = Ladder.of_usage(model, usage).names
    found = measure(model, usage, names, [(loader, view)], tiers=["host"])
    assert found.collate == pytest.approx(0.001, rel=0.01)
    assert found.costs("host").read[3] > 0.04 * 0.99


@pytest.mark.usefixtures("slept_time")
def test_moves_are_measured():
    """A run decides by itself; here nothing is worth a store, which costs more than what runs before it."""
    engine = cf.Engine(net(), "host", schedule=cf.AllButLast(1))
    loader = engine.loader(DataLoader(Texts(COUNT), 5, collate_fn=Pad(labels="tags")))
    for _ in engine.epochs(3):
        list(loader)
    assert [(move.frozen, move.after) for move in engine.decisions] == [("head", None)]
    assert loader.source == "frozen"
