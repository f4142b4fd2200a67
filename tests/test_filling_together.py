"""Several processes fill one cache: between them each row once, and nobody waits for ever for one that is stuck."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze import waiting
from cachefreeze.errors import StoreError
from cachefreeze.stores import HDF5Store
from cachefreeze.testing.torture import ended, forked
from cachefreeze.waiting import fillers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
ROWS = 96


def make_data():
    torch.manual_seed(1)
    return TensorDataset(torch.randn(ROWS, 6), torch.arange(ROWS))


def make_engine(where):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    cf.freeze(model, "2")
    engine = cf.Engine(model, where)
    return engine, engine.loader(DataLoader(make_data(), 8))


def file_of(folder):
    (path,) = folder.glob("*.h5")
    return path


def fill_in_child(folder, log):
    engine, loader = make_engine(f"hdf5:{folder}")
    report = engine.cache.fill(loader)
    assert report.rows == ROWS
    with log.open("ab", buffering=0) as file:
        file.write(report.computed_rows.to_bytes(4, "little"))
    engine.close()


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_fill_what_one_process_fills(tmp_path, ranks):
    """Rows and labels are bit for bit those of one process; the ranks compute each row once between them."""
    log = tmp_path / "computed"
    children = [forked(partial(fill_in_child, tmp_path / "shared", log)) for _ in range(ranks)]
    assert [ended(child) for child in children] == [0] * ranks
    data = log.read_bytes()
    assert sum(int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)) == ROWS
    _, alone = make_engine("host")
    _, shared = make_engine(f"hdf5:{tmp_path / 'shared'}")
    for (x, y), (x2, y2) in zip(alone, shared, strict=True):
        assert torch.equal(x.tensors[0], x2.tensors[0])
        assert torch.equal(y, y2)
    assert shared.counts.computed == 0


def correct_in_child(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    cf.freeze(model, "2")
    engine = cf.Engine(model, f"hdf5:{folder}")
    x, y = make_data().tensors
    loader = engine.loader(DataLoader(TensorDataset(x, y + 1), 8))
    assert torch.equal(torch.cat([labels for _, labels in loader]), y + 1)
    assert loader.counts.computed == 0
    engine.close()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_find_corrected_labels_together(tmp_path, ranks):
    """One of them brings the file up to date, the others wait for it: nothing is computed, and there is one file."""
    engine, loader = make_engine(f"hdf5:{tmp_path}")
    engine.cache.fill(loader)
    engine.close()
    children = [forked(partial(correct_in_child, tmp_path)) for _ in range(ranks)]
    assert [ended(child) for child in children] == [0] * ranks
    assert len(list(tmp_path.glob("*.h5"))) == 1


def claim_and_hang(path):
    store = HDF5Store.open(path)
    assert bool(store.claim(torch.arange(40, 44)).all())
    (path.parent / "claimed").touch()
    signal.pause()


def stuck(folder):
    """A process that has claimed four rows and does nothing."""
    engine, loader = make_engine(f"hdf5:{folder}")
    child = forked(partial(claim_and_hang, file_of(folder)))
    while not (folder / "claimed").exists():
        time.sleep(0.01)
    return engine, loader, child


def test_a_filler_that_is_stuck_is_named(tmp_path, monkeypatch):
    """The others' rows are written and durable by then; when it is ended, the next fill computes the rest."""
    monkeypatch.setattr(waiting, "_PATIENCE_SECONDS", 0.3)
    engine, loader, child = stuck(tmp_path)
    try:
        assert any(name.startswith(f"process {child} (") for name in fillers(file_of(tmp_path)))
        with pytest.raises(StoreError, match=rf"4 rows \(first: 40\) are claimed .*open in process {child} \(.*end it"):
            engine.cache.fill(loader)
        assert loader.rows.store.count == ROWS - 4
    finally:
        os.kill(child, signal.SIGKILL)
        ended(child)
    assert engine.cache.fill(loader).computed_rows == 4
    assert fillers(file_of(tmp_path)) == []
    engine.close()


def test_training_goes_on_beside_a_filler_that_is_stuck(tmp_path):
    """A pass computes what it cannot have, and leaves the writing to who claimed it."""
    engine, loader, child = stuck(tmp_path)
    try:
        for _ in range(2):
            assert torch.equal(torch.cat([y for _, y in loader]), torch.arange(ROWS))
        assert loader.counts.computed == 4
    finally:
        os.kill(child, signal.SIGKILL)
        ended(child)
    engine.close()


def test_patience_lasts_while_rows_come(tmp_path, monkeypatch):
    """The clock begins anew with every row; stores in memory have no others to name."""
    engine, loader = make_engine("host")
    now = [0.0]
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: None))
    patience = waiting.Waiting(loader.rows.store)
    for missing in range(9, 3, -1):
        patience.wait(range(missing))
        now[0] += waiting._PATIENCE_SECONDS - 1
        patience.wait(range(missing))
    now[0] += 1
    with pytest.raises(StoreError, match=r"4 rows \(first: 0\) .* written none for 600 s\. Let it go on"):
        patience.wait(range(4))
    engine.close()


def test_processes_that_end_under_the_look(tmp_path, monkeypatch):
    """A link that cannot be read any more, and a process without open files to be seen, are passed over."""
    monkeypatch.setattr(waiting, "_PROCESSES", tmp_path)
    (tmp_path / "17" / "fd").mkdir(parents=True)
    (tmp_path / "17" / "fd" / "3").touch()  # no link
    (tmp_path / "18").mkdir()
    assert fillers(tmp_path / "rows.h5") == []
