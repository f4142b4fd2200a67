"""A cache follows a few samples that change: labels are rewritten, rows moved, edited samples computed again."""

from __future__ import annotations

import os
import random
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import cachefreeze as cf
from cachefreeze import revision
from cachefreeze.errors import StaleCacheError
from cachefreeze.revision import MADE_FROM, chains
from cachefreeze.sample_keys import keyed
from cachefreeze.stores import HDF5Store

ROWS = 200


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    cf.freeze(model, "2")
    return model


def make_tensors():
    torch.manual_seed(1)
    return [torch.randn(ROWS, 6), torch.randint(0, 3, (ROWS,))]


class Pairs(Dataset):
    """In-memory arrays, a list of labels, and a parameter of all samples."""

    def __init__(self, x, labels, scale=1.0):
        self.x, self.labels, self.scale = x, labels, scale

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.x[index] * self.scale, self.labels[index]


class Files(Dataset):
    """(path, label), as torchvision's ImageFolder keeps them, and a second list of the labels."""

    def __init__(self, root):
        self.root = str(root)
        paths = sorted(root.glob("*/*.pt"))
        self.samples = [(str(path), int(path.parent.name)) for path in paths]
        self.targets = [label for _, label in self.samples]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return torch.load(path, weights_only=True), label


class Run:
    """One pass over a dataset: its batches, and what was counted."""

    def __init__(self, folder, data, **options):
        engine = cf.Engine(make_model(), f"hdf5:{folder}")
        loader = engine.loader(DataLoader(data, 16), **options)
        self.prefix_runs, run = 0, loader.rows.prefix.run

        def counted(example, count):
            self.prefix_runs += 1
            return run(example, count)

        loader.rows.prefix.run = counted
        batches = [(rows.tensors[0].clone(), y.clone()) for rows, y in loader]
        self.rows, self.labels = (torch.cat(part) for part in zip(*batches, strict=True))
        self.counts = loader.counts
        self.path = engine.cache.info()["train"]["path"]
        engine.close()

    @property
    def numbers(self):
        return self.counts.computed, self.counts.rewritten, self.counts.repaired


def check(folder, data):
    """A pass over what is stored is what a new cache would give."""
    found, fresh = Run(folder, data), Run(folder / f"fresh-{random.random()}", data)
    assert found.numbers == (0, 0, 0)
    torch.testing.assert_close(found.rows, fresh.rows)  # a row computed anew was in another batch
    assert torch.equal(found.labels, fresh.labels)


def kinds(x, y):
    """The same samples as every kind of dataset whose samples are known one by one."""
    half = ROWS // 2
    return {
        "tensors": TensorDataset(x, y),
        "arrays": Pairs(x.numpy(), y.tolist()),
        "a tensor and an array": Pairs(x, y.numpy()),
        "a subset": Subset(TensorDataset(x.flip(0), y.flip(0)), list(range(ROWS - 1, -1, -1))),
        "parts": ConcatDataset([TensorDataset(x[:half], y[:half]), TensorDataset(x[half:], y[half:])]),
    }


@pytest.mark.parametrize("kind", kinds(*make_tensors()))
def test_one_label_rewrites_the_label_alone(kind, tmp_path, caplog):
    """No prefix runs, the file is the same, and of its bytes only the label, the key and the record change."""
    x, y = make_tensors()
    first = Run(tmp_path, kinds(x, y)[kind])
    store = HDF5Store.open(first.path)
    spans = [column.spans(torch.arange(ROWS)) for column in store._columns]
    names = [column.field.name for column in store._columns]
    store.close()
    before = Path(first.path).read_bytes()
    y = y.clone()
    y[17] = (y[17] + 1) % 3
    found = Run(tmp_path, kinds(x, y)[kind])
    assert found.numbers == (0, 1, 0)
    assert found.prefix_runs == 0
    assert found.path == first.path
    assert "fields of 1 rows rewritten, 0 rows moved, 0 to be computed again (samples 17)" in caplog.text
    after = Path(first.path).read_bytes()
    changed = {at for at in range(len(before)) if before[at] != after[at]}
    for name, (starts, sizes) in zip(names, spans, strict=True):
        within = [r for r in range(ROWS) if changed & set(range(starts[r], starts[r] + sizes[r]))]
        assert within == ([] if name == "activation.0" else [17]), name
    check(tmp_path, kinds(x, y)[kind])


@pytest.mark.parametrize("kind", kinds(*make_tensors()))
def test_one_edited_sample_computes_one_row(kind, tmp_path, caplog):
    """Counted as repaired."""
    x, y = make_tensors()
    first = Run(tmp_path, kinds(x, y)[kind])
    x = x.clone()
    x[113] += 1
    found = Run(tmp_path, kinds(x, y)[kind])
    assert found.numbers == (1, 0, 1)
    assert found.path == first.path
    assert "0 rows moved, 1 to be computed again (samples 113)" in caplog.text
    check(tmp_path, kinds(x, y)[kind])


@pytest.mark.parametrize("order", ["reversed", "shifted", "two swapped", "shuffled", "one becomes another"])
def test_samples_that_moved_take_their_rows_along(order, tmp_path):
    x, y = make_tensors()
    Run(tmp_path, TensorDataset(x, y))
    index = torch.arange(ROWS)
    if order == "one becomes another":
        index[3] = 9
    else:
        index = {
            "reversed": index.flip(0), "shifted": index.roll(1), "two swapped": index[[1, 0, *range(2, ROWS)]],
            "shuffled": torch.randperm(ROWS),
        }[order]  # fmt: skip
    found = Run(tmp_path, TensorDataset(x[index], y[index]))
    assert found.counts.computed == found.prefix_runs == 0
    assert found.counts.rewritten == int((index != torch.arange(ROWS)).sum())
    check(tmp_path, TensorDataset(x[index], y[index]))


def test_all_at_once_and_back(tmp_path):
    """Moved, relabelled and edited samples together; then the first state again."""
    x, y = make_tensors()
    Run(tmp_path, TensorDataset(x, y))
    index = torch.arange(ROWS).roll(5)
    moved, labels = x[index].clone(), y[index].clone()
    labels[50] = 7  # of a sample that moved, so only its content tells which one it was
    moved[60] = 2.0
    found = Run(tmp_path, TensorDataset(moved, labels))
    assert found.numbers == (1, ROWS - 1, 1)
    check(tmp_path, TensorDataset(moved, labels))
    assert Run(tmp_path, TensorDataset(x, y)).counts.computed == 1  # sample 55 had been overwritten
    check(tmp_path, TensorDataset(x, y))


def make_files(folder, count=60):
    for i in range(count):
        place = folder / str(i % 2)
        place.mkdir(parents=True, exist_ok=True)
        torch.save(torch.full((6,), float(i)), place / f"{i:03}.pt")
    return folder


def test_files(tmp_path, caplog):
    """Touched files compute nothing, an edited one one row, one that moved to another class takes its row along."""
    folder, cache = make_files(tmp_path / "data"), tmp_path / "cache"
    Run(cache, Files(folder))
    for path in folder.glob("*/*.pt"):
        os.utime(path, ns=(1, 1))
    touched = Run(cache, Files(folder))
    assert touched.numbers == (0, 60, 0)
    assert touched.prefix_runs == 0
    edited = folder / "0" / "008.pt"
    torch.save(torch.full((6,), -1.0), edited)
    assert Run(cache, Files(folder)).numbers == (1, 0, 1)
    shutil.move(folder / "0" / "010.pt", folder / "1" / "010.pt")
    caplog.clear()
    moved = Run(cache, Files(folder))
    assert moved.counts.computed == moved.prefix_runs == 0
    assert "0 to be computed again" in caplog.text
    check(cache, Files(folder))
    assert len(list(cache.glob("*.h5"))) == 1


class Captions(Dataset):
    """Two samples of every file."""

    def __init__(self, root):
        self.paths = sorted(root.glob("*/*.pt"))
        self.captions = list(range(2 * len(self.paths)))

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        return torch.load(self.paths[self.captions[index] // 2], weights_only=True), index


class Wrapped(Captions):
    """Another dataset's samples, under labels of its own."""

    def __init__(self, root):
        self.base, self.captions = Files(root), list(range(60))

    def __getitem__(self, index):
        return self.base[index][0], self.captions[index]


class Named(Captions):
    """Names within a folder, each beside a file of the label."""

    def __init__(self, root):
        self.folder = root
        names = [str(path.relative_to(root)) for path in sorted(root.glob("*/*.pt"))]
        self.captions = [{"id": i, "image": name, "label": name} for i, name in enumerate(names)]

    def __getitem__(self, index):
        return torch.load(self.folder / self.captions[index]["image"], weights_only=True), index


class Joined(Wrapped):
    """Parts that nobody can take apart; the labels are those of the parts."""

    def __init__(self, root):
        self.parts, self.captions = [Files(root)], list(range(60))

    def __getitem__(self, index):
        return self.parts[0][index]


@pytest.mark.parametrize("kind", [Captions, Wrapped, Named, Joined])
def test_an_edited_file_is_seen(kind, tmp_path):
    """However a dataset lists its files."""
    folder, cache = make_files(tmp_path / "data"), tmp_path / "cache"
    Run(cache, kind(folder))
    assert Run(cache, kind(folder)).numbers == (0, 0, 0)
    torch.save(torch.full((6,), 700.0), folder / "0" / "042.pt")
    assert Run(cache, kind(folder)).counts.computed > 0
    check(cache, kind(folder))


def test_texts_are_no_files():
    """Nor are strings that no file system would take for a name."""
    texts = Pairs(torch.zeros(4, 6), ["a" * 5000, "b\0", "", "c"])
    assert len(set(keyed(texts).keys.tolist())) == 4


def test_labels_of_parts_are_seen(tmp_path):
    """Of parts whose samples cannot be told apart."""
    x, y = make_tensors()
    Run(tmp_path, ConcatDataset([Batched(x, y.tolist())]))
    y[41] += 1
    assert torch.equal(Run(tmp_path, ConcatDataset([Batched(x, y.tolist())])).labels, y)


def test_another_fold_is_another_file(tmp_path, caplog):
    """A dataset of which more than a twentieth is new is not taken for a correction."""
    x, y = make_tensors()
    first, second = x[:180], torch.cat([x[:160], x[180:]])
    a = Run(tmp_path, TensorDataset(first, y[:180]))
    b = Run(tmp_path, TensorDataset(second, y[:180]))
    assert a.path != b.path
    assert b.counts.computed == 180
    assert "is not reused" in caplog.text
    assert Run(tmp_path, TensorDataset(first, y[:180])).numbers == (0, 0, 0)
    assert Run(tmp_path, TensorDataset(second, y[:180])).numbers == (0, 0, 0)


def test_a_name_that_is_taken_by_other_samples(tmp_path):
    """A file keeps the name of the samples it was made for; when they come back after it went far, they get another."""
    x, y = make_tensors()
    first, now = Run(tmp_path, TensorDataset(x, y)), x
    for start in range(0, 50, 10):
        now = now.clone()
        now[start : start + 10] += 1
        assert Run(tmp_path, TensorDataset(now, y)).path == first.path
    again = Run(tmp_path, TensorDataset(x, y))
    assert again.path != first.path
    assert again.counts.computed == ROWS
    assert Run(tmp_path, TensorDataset(x, y)).path == again.path
    assert Run(tmp_path, TensorDataset(x, y)).numbers == (0, 0, 0)


def test_a_named_file_follows_a_few_samples_and_refuses_others(tmp_path):
    x, y = make_tensors()
    path = tmp_path / "mine.h5"
    Run(path, TensorDataset(x, y))
    assert Run(path, TensorDataset(x, y + 1)).numbers == (0, ROWS, 0)
    with pytest.raises(StaleCacheError, match="made for something else"):
        Run(path, TensorDataset(x + 1, y))


def test_what_the_model_consumes_of_equal_files_is_compared(tmp_path, monkeypatch):
    """Another decoder changes no file: the keys are equal, and the rows are stale."""
    folder, cache = make_files(tmp_path / "data"), tmp_path / "cache"
    Run(cache, Files(folder))
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: load(path, **options) * 1.001)
    assert Run(cache, Files(folder)).counts.computed == 60


def test_a_file_that_others_have_open_is_left_alone(tmp_path, monkeypatch, caplog):
    """A new file then; and once they have let go, the old one follows."""
    monkeypatch.setattr(revision, "_ALONE_SECONDS", 0.0)
    x, y = make_tensors()
    first = Run(tmp_path, TensorDataset(x, y))
    other = HDF5Store.open(first.path)
    before = Path(first.path).read_bytes()
    found = Run(tmp_path, TensorDataset(x, y + 1))
    assert found.path != first.path
    assert found.counts.computed == ROWS
    assert "is not brought up to date" in caplog.text
    assert Path(first.path).read_bytes() == before
    other.close()
    assert Run(tmp_path, TensorDataset(x, y + 2)).numbers == (0, ROWS, 0)


def test_a_file_that_may_not_be_written(tmp_path, monkeypatch, caplog):
    """Rows of samples that changed are computed in every pass, and the file keeps what it has."""
    x, y = make_tensors()
    first = Run(tmp_path, TensorDataset(x, y))
    before = Path(first.path).read_bytes()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    opened = HDF5Store.open
    monkeypatch.setattr(HDF5Store, "open", lambda path, **options: opened(path, **{**options, "writable": False}))
    y = y.clone()
    y[5] += 1
    for _ in range(2):
        found = Run(tmp_path, TensorDataset(x, y))
        assert found.numbers == (1, 0, 0)
        assert torch.equal(found.labels, y)
    assert "may not be written: samples 5" in caplog.text
    assert Path(first.path).read_bytes() == before


def test_a_reader_is_not_given_rows_of_other_samples(tmp_path):
    """Rows that change under a process that only reads count as damaged: it computes its own."""
    x, y = make_tensors()
    path = Run(tmp_path, TensorDataset(x, y)).path
    reader = HDF5Store.open(path, writable=False)
    engine = cf.Engine(make_model(), "host")
    loader = engine.loader(DataLoader(TensorDataset(x, y), 16))
    held = loader.rows
    held.store, held._says = reader, revision.Revision(held.view, ["field.0"])
    assert torch.equal(torch.cat([labels for _, labels in loader]), y)
    Run(tmp_path, TensorDataset(x, y + 1))
    assert torch.equal(torch.cat([labels for _, labels in loader]), y)
    assert loader.counts.repaired == ROWS
    reader.close()


def test_damaged_rows_do_not_spread(tmp_path):
    """What is to be moved or kept is compared with its checksum first."""
    x, y = make_tensors()
    path = Run(tmp_path, TensorDataset(x, y)).path
    store = HDF5Store.open(path)
    column = store._columns[0]
    starts, _ = column.spans(torch.tensor([20, 90, 91]))
    store.close()
    with Path(path).open("r+b") as file:
        for at in starts:
            file.seek(at)
            file.write(b"damaged!")
    index = torch.arange(ROWS)
    index[[20, 21]] = index[[21, 20]]
    y = y[index].clone()
    y[90] += 1
    found = Run(tmp_path, TensorDataset(x[index], y))
    assert found.counts.computed == found.counts.repaired == 3  # 21 takes what 20 held, 90 keeps its own, 91 as ever
    check(tmp_path, TensorDataset(x[index], y))


def test_a_sample_that_changes_meanwhile(tmp_path, monkeypatch):
    """Between the look at it and the lock of the file."""
    x, y = make_tensors()
    Run(tmp_path, TensorDataset(x, y))
    data = TensorDataset(x.clone(), (y + (torch.arange(ROWS) == 4)).clone())
    digests = revision.input_digests
    calls = []

    def counting(example, count):
        calls.append(count)
        found = digests(example, count)
        return found + 1 if calls[-2:] == [1, 1] and calls.count(1) == 2 else found

    monkeypatch.setattr(revision, "input_digests", counting)
    assert Run(tmp_path, data).numbers == (1, 0, 1)


class Placed(Pairs):
    """What it gives also follows from a sample's place: an index beside the label, every other input twice as large."""

    def __getitem__(self, index):
        return self.x[index] * (1 + index % 2), self.labels[index], index


def halves(x, labels):
    """The same samples twice, under two parameters of theirs."""
    half = ROWS // 2
    return ConcatDataset([Pairs(x[:half], labels[:half], scale) for scale in (1.0, 2.0)])


class Stopgap(Pairs):
    """Sample 17 cannot be read: sample 16 stands in for it."""

    def __getitem__(self, index):
        index = 16 if index == 17 else index
        return self.x[index], self.labels[index]


@pytest.mark.parametrize("kind", [Placed, halves, Stopgap])
def test_a_key_does_not_tell_all(kind, tmp_path):
    """Samples with known keys move, and are edited: every row and field is that of a new cache."""
    x, labels = torch.randn(ROWS, 6), [0] * ROWS

    def batches(folder, data):
        with closing(cf.Engine(make_model(), f"hdf5:{folder}")) as engine:
            return [(rows.tensors[0].clone(), *fields) for rows, *fields in engine.loader(DataLoader(data, 16))]

    batches(tmp_path, kind(x, labels))
    x = x[[*range(20), 21, 20, *range(22, ROWS)]].clone()
    x[16], labels = 1.0, [*labels]
    labels[16] = 2
    for _ in range(2):
        found = batches(tmp_path, kind(x, labels))
        torch.testing.assert_close(found, batches(tmp_path / "new", kind(x, labels)))
    assert len(list(tmp_path.glob("*.h5"))) == 1


@pytest.mark.parametrize("seed", range(20))
def test_chains(seed):
    """Written in that order, every row gets what its source held before."""
    rng = random.Random(seed)
    sources = {row: rng.randrange(30) for row in rng.sample(range(30), 20)}
    sources = {row: source for row, source in sources.items() if row != source}
    held = list(range(30))
    for run, ring in chains(sources):
        first = held[run[0]]
        for row in run[:-1] if ring else run:
            held[row] = held[sources[row]]
        if ring:
            held[run[-1]] = first
    assert held == [sources.get(row, row) for row in range(30)]


class Indirect(Pairs):
    """Element *i* of ``x`` belongs to another sample."""

    def __init__(self, x, labels):
        super().__init__(x, labels)
        self.order = list(reversed(range(len(labels))))

    def __getitem__(self, index):
        return self.x[self.order[index]], self.labels[index]


class Neighbours(Pairs):
    def __getitem__(self, index):
        return self.x[index] + self.x[index - 1], self.labels[index]


class Sliced(Pairs):
    def __getitem__(self, index):
        return self.x[index : index + 1][0], self.labels[index]


class Centred(Pairs):
    def __getitem__(self, index):
        return self.x[index] - self.x.mean(0), self.labels[index]


class Bound(Pairs):
    def __init__(self, x, labels):
        super().__init__(x, labels)
        self.load = self._load

    def _load(self, index):
        return self.x[-index]

    def __getitem__(self, index):
        return self.load(index), self.labels[index]


class Typed(Pairs):
    """Does something else where a list is no tensor."""

    def __getitem__(self, index):
        return (self.x[index] if isinstance(self.x, torch.Tensor) else self.x[index] + 1), self.labels[index]


class Batched(Pairs):
    def __getitems__(self, indices):
        return [self[i] for i in indices]


@pytest.mark.parametrize("kind", [Indirect, Neighbours, Sliced, Centred, Bound, Typed, Batched])
def test_what_is_not_known_of_one_sample_fills_anew(kind, tmp_path):
    """A change of an element that samples do not take by their own index is a change of all of them."""
    x, y = make_tensors()
    labels = y.tolist()
    Run(tmp_path, kind(x, labels))
    x = x.clone()
    x[40] += 1
    assert Run(tmp_path, kind(x, labels)).counts.computed == ROWS


def test_a_parameter_of_all_samples_fills_anew(tmp_path):
    x, y = make_tensors()
    Run(tmp_path, Pairs(x, y.tolist()))
    assert Run(tmp_path, Pairs(x, y.tolist(), scale=2.0)).counts.computed == ROWS


def test_keys_do_not_depend_on_where_a_sample_is_kept():
    x, y = make_tensors()
    keys = keyed(TensorDataset(x, y)).keys
    assert len(set(keys.tolist())) == ROWS
    assert (keyed(Subset(TensorDataset(x, y), [7, 3])).keys == keys[[7, 3]]).all()
    assert (keyed(TensorDataset(x.double(), y)).keys != keys).all()
    assert keyed(object()) is None
    assert keyed(Subset(Batched(x, y), [1])) is None
    assert keyed(ConcatDataset([TensorDataset(x), Batched(x, y)])) is None


def test_stores_in_memory_keep_no_keys():
    engine = cf.Engine(make_model(), "host")
    loader = engine.loader(DataLoader(TensorDataset(*make_tensors()), 16))
    assert MADE_FROM not in loader.rows.store.spec.fields
