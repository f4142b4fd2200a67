"""A cache is reused when nothing that changes a row differs, and only then."""

from __future__ import annotations

import copy
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import cachefreeze as cf
from cachefreeze.errors import StaleCacheError
from cachefreeze.fingerprint import difference, digest, identity


class Scale(nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = factor
        self.register_buffer("hidden", torch.ones(3), persistent=False)

    def forward(self, x):
        return x * self.factor * self.hidden.mean()


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), Scale(), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 3))
    cf.freeze(model, "5")
    return model


def make_data():
    torch.manual_seed(1)
    return TensorDataset(torch.randn(40, 6), torch.randint(0, 3, (40,)))


def run(folder, model=None, data=None, **options):
    """One pass; the rows computed in it."""
    batch_size = options.pop("batch_size", 8)
    collate = options.pop("collate", None)
    loader_options = {key: options.pop(key) for key in ("version", "view") if key in options}
    engine = cf.Engine(model or make_model(), f"hdf5:{folder}", **options)
    loader = engine.loader(DataLoader(data or make_data(), batch_size, collate_fn=collate), **loader_options)
    for x, _ in loader:
        engine(x)
    engine.close()
    return loader.counts.computed


def test_the_same_job_reuses_the_file(tmp_path):
    assert run(tmp_path) == 40
    assert run(tmp_path) == 0
    assert len(list(tmp_path.glob("*.h5"))) == 1


def bump(tensor):
    with torch.no_grad():
        tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(9.0))


def changed_model(change):
    model = make_model()
    change(model)
    return {"model": model}


def changed_data(change):
    tensors = [t.clone() for t in make_data().tensors]
    change(tensors)
    return {"data": TensorDataset(*tensors)}


def set_factor(model):
    model[2].factor = 2.5


class OtherCode(Scale):
    def forward(self, x):
        return x * (self.factor * self.hidden.mean())


def larger_collate(samples):
    x, y = torch.utils.data.default_collate(samples)
    return x * 2, y


class Shifted(Dataset):
    """A dataset with a transform of its own."""

    def __init__(self, shift):
        self.data, self.transform = make_data(), partial(torch.add, other=shift)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return self.transform(x), y


def longer(*more):
    return {"data": TensorDataset(*(torch.cat([t, t[list(more)]]) for t in make_data().tensors))}


def other_labels():
    x, y = make_data().tensors
    return {"data": TensorDataset(x, y.int())}


CHANGES = {
    "one bit of a weight": lambda: changed_model(lambda m: bump(m[0].weight)),
    "one bit of a bias": lambda: changed_model(lambda m: bump(m[4].bias)),
    "a running mean": lambda: changed_model(lambda m: bump(m[1].running_mean)),
    "a running variance": lambda: changed_model(lambda m: bump(m[1].running_var)),
    "a non-persistent buffer": lambda: changed_model(lambda m: bump(m[2].hidden)),
    "a plain attribute": lambda: changed_model(set_factor),
    "a module's class": lambda: changed_model(lambda m: m.__setitem__(3, nn.ReLU6())),
    "BN's eps": lambda: changed_model(lambda m: setattr(m[1], "eps", 1e-3)),
    "the boundary": lambda: changed_model(lambda m: (cf.unfreeze(m), cf.freeze(m, "4"))),
    "every value of every sample": lambda: changed_data(lambda tensors: tensors[0].mul_(2)),
    "three labels and ten samples": lambda: changed_data(
        lambda tensors: (tensors[0][7:17].neg_(), tensors[1][:3].neg_())
    ),
    "a sample less": lambda: {"data": TensorDataset(*(t[:39] for t in make_data().tensors))},
    "the order": lambda: {"data": Subset(make_data(), list(range(39, -1, -1)))},
    "the stored dtype": lambda: {"dtype": "float16"},
    "autocast": lambda: {"autocast": torch.bfloat16},
    "the version": lambda: {"version": "2"},
    "a forward's code": lambda: changed_model(lambda m: setattr(m[2], "__class__", OtherCode)),
    "a slope": lambda: changed_model(lambda m: m.__setitem__(3, nn.LeakyReLU(0.02))),
    "a nested layer": lambda: changed_model(lambda m: m.__setitem__(3, nn.Sequential(nn.ReLU(), nn.ReLU()))),
    "a buffer more": lambda: changed_model(lambda m: m[2].register_buffer("more", torch.ones(1))),
    "the sign of a zero": lambda: changed_model(lambda m: m[1].running_mean.neg_()),
    "the collate function": lambda: {"collate": larger_collate},
    "the dataset's transform": lambda: {"data": Shifted(1.0)},
    "its parameter": lambda: {"data": Shifted(2.0)},
    "a sample more": lambda: longer(0),
    "some samples twice": lambda: longer(3, 3, 3),
    "labels of another dtype": other_labels,
}


def switched(name, monkeypatch):
    """Changes of the process and not of the job."""
    if name == "torch's release":
        monkeypatch.setattr(torch, "__version__", "2.0.0")
    else:
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")


@pytest.mark.parametrize("name", ["torch's release", "the precision of products"])
def test_a_change_of_how_rows_are_computed_is_a_miss(name, tmp_path, monkeypatch, caplog):
    run(tmp_path)
    with monkeypatch.context() as patch:
        switched(name, patch)
        assert run(tmp_path) == 40
    assert "not reused" in caplog.text
    assert run(tmp_path) == 0


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch 2.9 brought it")
def test_the_newer_setting_of_the_precision_of_products(tmp_path):
    """Where it is used torch refuses to answer in the older way; rows are told apart all the same."""
    run(tmp_path)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="legacy"):
            torch.get_float32_matmul_precision()
        assert run(tmp_path) == 40
        assert run(tmp_path) == 0
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert run(tmp_path) == 0


def test_changes_are_told_apart(tmp_path):
    """Every one of them makes a file of its own: none is taken for another."""
    assert len(CHANGES) >= 25
    for name in CHANGES:
        if name not in ("the boundary", "autocast"):
            options = CHANGES[name]()
            assert run(tmp_path, **options) == len(options.get("data", make_data())), name


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_anything_that_makes_a_row_is_a_miss(name, tmp_path, caplog):
    """The new file is filled from nothing, the reason is logged, the old file is still whole."""
    run(tmp_path)
    options = CHANGES[name]()
    rows = len(options.get("data", make_data()))
    if name == "autocast":
        engine = cf.Engine(make_model(), f"hdf5:{tmp_path}", autocast=torch.bfloat16)
        loader = engine.loader(DataLoader(make_data(), 8))
        assert sum(len(y) for _, y in loader) == loader.counts.computed == rows
        engine.close()
    else:
        assert run(tmp_path, **options) == rows
    if name != "the boundary":
        assert "not reused" in caplog.text
        assert "->" in caplog.text
    assert len(list(tmp_path.glob("*.h5"))) == 2
    assert run(tmp_path) == 0


def hooked(model):
    model[0].register_forward_hook(lambda *_: None)
    return model


HARMLESS = {
    "nothing, in a deep copy": lambda: {"model": copy.deepcopy(make_model())},
    "a suffix weight": lambda: changed_model(lambda m: bump(m[5].weight)),
    "train mode": lambda: changed_model(lambda m: m.train()),
    "a hook": lambda: {"model": hooked(make_model())},
    "the batch size": lambda: {"batch_size": 5},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_no_row_is_no_miss(name, tmp_path):
    run(tmp_path)
    assert run(tmp_path, **HARMLESS[name]()) == 0


def test_a_moved_cache_folder_is_reused(tmp_path):
    run(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert run(tmp_path / "b") == 0


class Files(Dataset):
    """Samples in files, listed as torchvision's folders list them."""

    def __init__(self, root):
        self.root = str(root)
        self.samples = [(str(path), i % 3) for i, path in enumerate(sorted(Path(root).iterdir()))]
        self.targets = [label for _, label in self.samples]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return torch.load(path, weights_only=True), label


def make_files(folder, count=30):
    folder.mkdir()
    for i in range(count):
        torch.save(torch.full((6,), float(i)), folder / f"{i:03}.pt")
    return folder


def test_an_edited_file_is_one_row_wherever_it_lies_in_the_dataset(tmp_path):
    folder = make_files(tmp_path / "data")
    run(tmp_path / "cache", data=Files(folder))
    assert run(tmp_path / "cache", data=Files(folder)) == 0
    edited = folder / "007.pt"  # not among the samples whose content is digested
    torch.save(torch.full((6,), -1.0), edited)
    os.utime(edited, ns=(1, 1))
    assert run(tmp_path / "cache", data=Files(folder)) == 1


def test_a_moved_data_folder_is_no_miss(tmp_path):
    folder = make_files(tmp_path / "data")
    run(tmp_path / "cache", data=Files(folder))
    moved = shutil.move(folder, tmp_path / "elsewhere")
    assert run(tmp_path / "cache", data=Files(moved)) == 0


def test_a_named_file_made_by_another_model_is_refused(tmp_path):
    path = tmp_path / "mine.h5"
    run(path)
    assert run(path) == 0
    before = path.read_bytes()
    with pytest.raises(StaleCacheError, match=r"weights: .* -> "):
        run(path, **CHANGES["one bit of a weight"]())
    assert path.read_bytes() == before


def test_a_weight_that_changes_behind_the_cache_is_caught(tmp_path):
    """Also where torch's version counter does not see it."""
    model = make_model()
    engine = cf.Engine(model, "host")
    loader = engine.loader(DataLoader(make_data(), 8))
    list(loader)
    model[0].weight.data.add_(1e-3)
    with pytest.raises(StaleCacheError, match="changed"):
        next(iter(loader))
    model[0].weight.data.sub_(1e-3)


def test_a_thawed_layer_is_caught():
    model = make_model()
    engine = cf.Engine(model, "host")
    loader = engine.loader(DataLoader(make_data(), 8))
    list(loader)
    cf.unfreeze(model)
    with pytest.raises(StaleCacheError, match="trainable again"):
        next(iter(loader))


class Counting(nn.Module):
    """The root counts its steps before the boundary, and keeps behind it an average and a clock that its user sets."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("clock", torch.ones(()))

    def forward(self, x):
        if self.training:
            self.steps += 1
        y = self.mid(self.stem(x))
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * y.detach().mean(0))
        return self.head(self.drop(y - self.mean)) / self.clock.item()


def test_a_buffer_that_makes_no_row_may_change(tmp_path):
    """It is followed as in a run without a cache, and a file is found again by a run that begins with another value."""
    found, sources = [], []
    for store, steps in (("off", 0), (f"hdf5:{tmp_path}", 0), (f"hdf5:{tmp_path}", 7)):
        torch.manual_seed(0)
        model = Counting()
        model.steps += steps
        cf.freeze(model, "mid")
        engine = cf.Engine(model, store)
        loader = engine.loader(DataLoader(make_data(), 8, shuffle=True))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for epoch in engine.epochs(3):
            model.train()
            model.clock.fill_(1 + epoch)
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(engine(x), y).backward()
                optimizer.step()
            sources.append(loader.source)
        engine.close()
        model.steps -= steps
        found.append(model.state_dict())
    assert sources == ["frozen"] * 3 + ["fill", "cached", "cached"] + ["cached"] * 3
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


class Lying(Dataset):
    """Content that no fingerprint sees: it is neither an attribute nor among the samples digested."""

    content = torch.arange(40.0)

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.full((6,), float(Lying.content[index])), 0


def test_rows_are_recomputed_and_compared_at_every_open(tmp_path, monkeypatch):
    run(tmp_path, data=Lying())
    from cachefreeze import samples

    monkeypatch.setattr(samples, "_DIGESTED", 2)
    run(tmp_path / "two", data=Lying())
    monkeypatch.setattr(
        Lying, "content", torch.cat([torch.arange(1.0), torch.arange(1.0, 39.0) * 3, torch.tensor([39.0])])
    )
    with pytest.raises(StaleCacheError, match="data changed"):
        run(tmp_path / "two", data=Lying())


def square(x, power=2):
    return x**power


def test_digests_of_functions_follow_their_code_not_their_address():
    def local(offset):
        return lambda x: x + offset

    assert digest(local(1)) == digest(local(1))
    assert digest(local(1)) != digest(local(2))
    assert digest(square) != digest(partial(square, power=3))
    assert digest(partial(square, power=3)) == digest(partial(square, power=3))


def test_difference_is_readable():
    old, new = {"torch": "2.6", "weights": "aa"}, {"torch": "2.7", "weights": "aa", "extra": "x"}
    assert difference(old, new) == ["extra: (absent) -> x", "torch: 2.6 -> 2.7"]
    assert identity(old) != identity(new)
    assert len(identity(old)) == 12
