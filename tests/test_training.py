"""Trainer: the report's figures, checkpoints of the whole model, and a resumed run that ends where the other did."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import cachefreeze as cf
from cachefreeze.checkpoints import save_model
from cachefreeze.errors import CheckpointError, UsageError


class Scale(nn.Module):
    """Rounds alike in every batch, which a small matrix product does not."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x * self.weight


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(Scale(6), nn.BatchNorm1d(6), nn.ReLU())
        self.middle = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def make(store, *, count=40, dict_batches=False):
    torch.manual_seed(0)
    model = Net()
    cf.freeze(model, "middle")
    data = TensorDataset(torch.randn(count, 6), torch.randint(0, 3, (count,)))
    order = torch.Generator().manual_seed(1)
    options = {}
    if dict_batches:
        options["collate_fn"] = as_dict
    train = DataLoader(data, 8, shuffle=True, generator=order, **options)
    val = DataLoader(TensorDataset(*data[:10]), 8, generator=torch.Generator(), **options)
    engine = cf.Engine(model, store)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    return engine, optimizer, engine.loader(train), engine.loader(val)


def as_dict(samples):
    return {"x": torch.stack([s[0] for s in samples]), "label": torch.stack([s[1] for s in samples])}


def fit(store, epochs, out=None, *, resume=False, config=None):
    engine, optimizer, train, val = make(store)
    trainer = cf.Trainer(engine, functional.cross_entropy, optimizer, out=out, config=config)
    report = trainer.fit(train, val, epochs=epochs, resume=resume)
    engine.close()
    return report, {name: value.clone() for name, value in engine.model.state_dict().items()}


def figures(report):
    return [(e.train_loss, e.val_loss, e.val_accuracy) for e in report.epochs]


def test_figures_are_equal_with_every_store_and_without(tmp_path):
    expected, state = fit("off", 3)
    assert [e.source for e in expected.epochs] == ["frozen"] * 3
    for store in ("host", "device", f"hdf5:{tmp_path}"):
        report, got = fit(store, 3)
        assert figures(report) == figures(expected)
        assert [(e.source, e.val_source) for e in report.epochs] == [("fill", "fill")] + [("cached", "cached")] * 2
        assert [(e.rows_computed, e.rows_cached) for e in report.epochs] == [(40, 0), (0, 40), (0, 40)]
        assert all(torch.equal(got[name], value) for name, value in state.items())


def test_losses_are_means_over_samples():
    """Also when the last batch is smaller."""
    engine, optimizer, train, _ = make("host", count=11)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    engine.model.middle[3].p = 0.0
    engine.model.middle[1].momentum = 0.0
    data = train.dataset.tensors
    report = cf.Trainer(engine, functional.cross_entropy, optimizer).fit(train, train, epochs=1)
    engine.model.eval()
    with torch.no_grad():
        expected = functional.cross_entropy(engine.model(data[0]), data[1])
        hits = (engine.model(data[0]).argmax(1) == data[1]).float().mean()
    assert report.epochs[0].val_loss == pytest.approx(float(expected), rel=1e-5)
    assert report.epochs[0].val_accuracy == pytest.approx(float(hits))


@pytest.mark.parametrize("store", ["host", "hdf5"])
@pytest.mark.parametrize("stopped_after", [1, 3])
def test_a_resumed_run_ends_where_the_other_did(store, stopped_after, tmp_path):
    where = "host" if store == "host" else f"hdf5:{tmp_path / 'cache'}"
    expected, state = fit(where, 5, tmp_path / "whole")
    fit(where, stopped_after, tmp_path / "parts")
    torch.manual_seed(999)  # another process starts from other states
    report, got = fit(where, 5, tmp_path / "parts", resume=True)
    assert figures(report) == figures(expected)
    assert all(torch.equal(got[name], value) for name, value in state.items())
    assert [e.epoch for e in report.epochs] == list(range(5))


def test_resuming_without_a_state_starts_from_the_beginning(tmp_path):
    report, _ = fit("host", 2, tmp_path, resume=True)
    assert [e.epoch for e in report.epochs] == [0, 1]


def test_a_state_of_another_run_is_refused(tmp_path):
    fit("host", 1, tmp_path, config={"lr": "0.01", "seed": "0"})
    with pytest.raises(CheckpointError, match=r"seed: 0 -> 1"):
        fit("host", 2, tmp_path, resume=True, config={"lr": "0.01", "seed": "1"})


def test_a_damaged_state_is_refused(tmp_path):
    fit("host", 1, tmp_path)
    (tmp_path / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        fit("host", 2, tmp_path, resume=True)


def test_resume_needs_a_folder():
    with pytest.raises(CheckpointError, match="out="):
        fit("host", 1, resume=True)


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_loader_of_no_engine_is_refused_before_an_epoch_runs(name):
    engine, optimizer, train, val = make("host")
    loaders = {"train": train, "val": val, name: DataLoader(train.dataset, 8)}
    before = {key: value.clone() for key, value in engine.model.state_dict().items()}
    with pytest.raises(UsageError, match=rf"{name}= is a DataLoader.*{name}=engine\.loader\("):
        cf.Trainer(engine, functional.cross_entropy, optimizer).fit(**loaders, epochs=1)
    torch.testing.assert_close(engine.model.state_dict(), before, rtol=0, atol=0)
    engine.close()


def test_what_a_run_leaves(tmp_path):
    """The whole model under its own keys, a state that loads without code, a report; nothing temporary."""
    _, state = fit("host", 2, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "report.json", "state.pt"]
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], value) for name, value in state.items())
    torch.load(tmp_path / "state.pt", weights_only=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == [
        "schema", "model", "data", "versions", "device", "store", "store_bytes", "rounding", "split",
        "fill_seconds", "total_seconds", "moves", "epochs",
    ]  # fmt: skip
    assert list(report["epochs"][0]) == [
        "epoch", "source", "boundary", "cache_boundary", "seconds", "val_seconds", "val_source", "train_loss",
        "val_loss", "val_accuracy", "rows_cached", "rows_computed", "rows_repaired", "rows_rewritten",
        "rows_promoted", "lr",
    ]  # fmt: skip
    assert report["fill_seconds"] == report["epochs"][0]["seconds"]
    assert report["split"]["boundary"] == "middle"
    assert report["store_bytes"] > 0


def test_tied_tensors_are_saved_once(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    save_model(model, tmp_path / "model.safetensors")
    assert sorted(load_file(tmp_path / "model.safetensors")) == ["0.bias", "0.weight", "1.bias"]


def test_dict_batches():
    """The loss gets the whole batch; the model its own arguments."""
    engine, optimizer, train, val = make("host", dict_batches=True)

    def loss_fn(output, batch):
        return functional.cross_entropy(output, batch["label"])

    report = cf.Trainer(engine, loss_fn, optimizer).fit(train, val, epochs=2)
    assert [e.source for e in report.epochs] == ["fill", "cached"]
    assert report.epochs[1].val_loss > 0


def test_batches_that_the_trainer_cannot_read():
    engine, optimizer, _, _ = make("host")
    data = TensorDataset(torch.randn(8, 6), torch.zeros(8), torch.zeros(8))
    loader = engine.loader(DataLoader(data, 4), name="three")
    with pytest.raises(UsageError, match="three lines"):
        cf.Trainer(engine, functional.cross_entropy, optimizer).fit(loader, epochs=1)


def test_nothing_frozen_is_a_live_run():
    torch.manual_seed(0)
    model = Net()
    engine = cf.Engine(model, "host")
    data = TensorDataset(torch.randn(16, 6), torch.randint(0, 3, (16,)))
    train = engine.loader(DataLoader(data, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    report = cf.Trainer(engine, functional.cross_entropy, optimizer).fit(train, epochs=2)
    assert [e.source for e in report.epochs] == ["live", "live"]
    assert report.split is None


def test_the_library_prints_nothing(capfd):
    fit("host", 2)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


class Stream(io.StringIO):
    """Stderr, on a terminal or not."""

    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize(("wanted", "terminal"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_bar_that_is_not_shown_takes_no_lock_of_the_bars(wanted, terminal, monkeypatch):
    """That lock is shared with forked children: one that is killed with it would stop the training here for ever."""
    engine, optimizer, train, _ = make("host")
    stream, taken, held = Stream(terminal), [], tqdm.get_lock()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(tqdm, "get_lock", classmethod(lambda cls: taken.append(cls) or held))
    cf.Trainer(engine, functional.cross_entropy, optimizer, progress=wanted).fit(train, epochs=1)
    engine.close()
    shown = wanted and terminal
    assert bool(taken) == shown
    assert ("epoch 0: " in stream.getvalue()) == shown
