"""Data that changes between passes is noticed before a stale row is used; data that only looks changed is not."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, StackDataset, Subset, TensorDataset

import cachefreeze as cf
from cachefreeze.errors import StaleCacheError
from cachefreeze.isolation import RandomState
from cachefreeze.samples import View
from cachefreeze.watching import SampleWatch

COUNT = 12


class Data(Dataset):
    """Vectors with labels, an epoch, a transform, and counters of what was loaded."""

    def __init__(self, targets):
        self.data = torch.arange(COUNT * 3.0).view(COUNT, 3)
        self.targets = targets
        self.epoch, self.loads, self.last = 0, 0, object()
        self.transform = None
        self.count = COUNT

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.loads, self.last = self.loads + 1, object()
        x = self.data[index] + self.epoch
        return (self.transform(x) if self.transform else x), self.targets[index]


def make(wrap=lambda data: data, targets=None, **options):
    """A dataset, and a loader whose first pass has filled the store."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    cf.freeze(model, "1")
    data = Data(torch.arange(COUNT) % 2 if targets is None else targets)
    loader = cf.Engine(model, "host").loader(DataLoader(wrap(data), 4, shuffle=True), **options)
    list(loader)
    return data, loader


def set_epoch(data):
    data.epoch = 1


def new_transform(data):
    data.transform = torch.neg


def rarely(data):
    data.transform = lambda x: x + 1 if x[0] == (COUNT - 1) * 3 else x


def new_labels(data):
    data.targets = 1 - data.targets


def labels_in_place(data):
    data.targets[5] = 1 - data.targets[5]


def longer(data):
    data.count = COUNT - 1


CHANGES = {
    set_epoch: r"inputs of sample 0 .*set since: dataset\.epoch\)",
    new_transform: r"inputs of sample 0 .*set since: dataset\.transform\)",
    rarely: r"inputs of sample 11 .*set since: dataset\.transform\)",
    new_labels: r"dataset\.targets is not what it was",
    labels_in_place: r"dataset\.targets is not what it was",
    longer: "there are 11 samples, there were 12",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_and_named(change):
    data, loader = make()
    list(loader)
    change(data)
    with pytest.raises(StaleCacheError, match=CHANGES[change]):
        next(iter(loader))


class Plain:
    """A dataset by what it has, not by its class."""

    def __init__(self, data):
        self.inner = data

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return self.inner[index]


WRAPS = {
    "dataset.inner": Plain,
    "dataset.dataset": lambda data: Subset(data, range(COUNT)),
    "dataset.datasets[1]": lambda data: ConcatDataset([Data(torch.arange(COUNT)), data]),
    "dataset.datasets[0].dataset": lambda data: ConcatDataset([Subset(data, [0, 5])]),
}


@pytest.mark.parametrize("where", WRAPS)
def test_what_a_dataset_is_made_of_is_watched(where):
    data, loader = make(WRAPS[where])
    labels_in_place(data)
    with pytest.raises(StaleCacheError) as caught:
        next(iter(loader))
    assert f"{where}.targets is not" in str(caught.value)


def test_stacked_datasets_are_watched():
    data, loader = make(lambda data: StackDataset(data.data, data))
    labels_in_place(data)
    with pytest.raises(StaleCacheError, match=r"dataset\.datasets\[1\]\.targets"):
        next(iter(loader))


def test_the_indices_of_a_subset_are_watched():
    kept = []
    _, loader = make(lambda data: kept.append(Subset(data, list(range(COUNT)))) or kept[0])
    kept[0].indices[3] = 4
    with pytest.raises(StaleCacheError, match=r"dataset\.indices"):
        next(iter(loader))


def test_the_tensors_of_a_tensor_dataset_are_watched():
    labels = torch.arange(COUNT)
    _, loader = make(lambda data: TensorDataset(data.data, labels))
    labels[5] += 1
    with pytest.raises(StaleCacheError, match=r"dataset\.tensors"):
        next(iter(loader))


def test_labels_of_the_loaders_own_dataset_are_watched_under_a_view():
    """The view is a copy with another transform: labels that the user sets do not reach it."""
    data, loader = make(view=torch.neg)
    new_labels(data)
    with pytest.raises(StaleCacheError, match=r"dataset\.targets"):
        next(iter(loader))


@pytest.mark.parametrize(
    "targets",
    [[i % 2 for i in range(COUNT)], np.arange(COUNT) % 2, tuple(range(COUNT))],
    ids=["list", "array", "tuple"],
)
def test_labels_of_any_kind_stay_the_same(targets):
    _, loader = make(targets=targets)
    list(loader)
    assert loader.source == "cached"


def test_a_dataset_that_counts_and_keeps_is_not_taken_for_a_changed_one():
    """An epoch that is set and changes no sample is none either."""
    data, loader = make()
    data.note = "set"
    data.loads = 1000
    list(loader)
    assert loader.source == "cached"


def test_a_pass_leaves_the_random_states_alone():
    _, loader = make()
    state = RandomState.capture()
    loader.rows.check()
    assert state.moved() == []


def test_a_fill_looks_first():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    cf.freeze(model, "1")
    data, engine = Data(torch.arange(COUNT)), cf.Engine(model, "host")
    loader = engine.loader(DataLoader(data, 4))
    set_epoch(data)
    with pytest.raises(StaleCacheError, match="changed"):
        engine.cache.fill(loader)
    assert engine.cache.info()["train"]["rows_present"] == 0


class Photos(Dataset):
    """Samples that take a while to fetch; which ones were is kept outside of it."""

    def __init__(self, seconds, fetched):
        self.seconds, self.fetch = seconds, fetched.append

    def __len__(self):
        return 16

    def __getitem__(self, index):
        time.sleep(self.seconds)
        self.fetch(index)
        return torch.full((4,), float(index)), index % 2


@pytest.mark.parametrize(("seconds", "again"), [(0.0, [0, 9]), (0.002, [0])])
def test_costly_samples_are_fetched_once_a_pass(slept_time, seconds, again):
    """A pass looks at two samples, and at the first alone where fetching takes long."""
    fetched = []
    watch = SampleWatch(View.of(DataLoader(Photos(seconds, fetched), batch_size=4), ["x"]))
    fetched.clear()
    watch.check("train")
    assert fetched == again
