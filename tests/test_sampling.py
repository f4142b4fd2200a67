"""Block-shuffled order: a permutation that stays within a few blocks at a time."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

import cachefreeze as cf
from cachefreeze.errors import UsageError
from cachefreeze.order import in_sight
from cachefreeze.prefetch import Telling
from cachefreeze.stores import HDF5Store, HostStore


class Jittered(Dataset):
    """Samples that are drawn anew each time."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.full((4,), float(index)) + torch.rand(4), index


@pytest.mark.parametrize(("count", "block", "mixed"), [(100, 10, 3), (101, 7, 4), (5, 10, 2), (6, 1, 1)])
def test_every_sample_once(count, block, mixed):
    """Whatever the sizes, each sample comes once, and as many as len() says."""
    sampler = cf.BlockShuffleSampler(range(count), block, mixed)
    assert sorted(sampler) == list(range(count))
    assert len(sampler) == count


def test_reads_stay_within_the_mixed_blocks():
    """As many samples in a row as mixed blocks hold come from no other block; within them the order is random."""
    order = list(cf.BlockShuffleSampler(range(120), 10, 3, generator=torch.Generator().manual_seed(0)))
    for start in range(0, 120, 30):
        stretch = order[start : start + 30]
        assert len({row // 10 for row in stretch}) == 3
        assert stretch != sorted(stretch)
    assert len({row // 10 for row in order[:10]}) > 1


def test_passes_differ_and_seeds_repeat():
    """Two passes have different orders; the same global seed gives the same, and a generator leaves it alone."""
    sampler = cf.BlockShuffleSampler(range(50), 5)
    torch.manual_seed(1)
    first, second = list(sampler), list(sampler)
    torch.manual_seed(1)
    assert first != second
    assert list(sampler) == first
    before = torch.get_rng_state()
    list(cf.BlockShuffleSampler(range(50), 5, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cached_pass_follows_it(tmp_path):
    """With a cache the order is the one that the DataLoader itself would have."""
    data = TensorDataset(torch.arange(24.0)[:, None].expand(24, 4).contiguous(), torch.arange(24))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    cf.freeze(model, train_from="1")
    loader = DataLoader(data, batch_size=5, sampler=cf.BlockShuffleSampler(data, 6, 2))
    cached = cf.Engine(model, store=f"hdf5:{tmp_path}").loader(loader)
    for _ in range(2):
        torch.manual_seed(3)
        expected = [y.tolist() for _, y in loader]
        torch.manual_seed(3)
        assert [y.tolist() for _, y in cached] == expected
    assert cached.source == "cached"


def told_and_batches(loader):
    """What is told, and after how many batches each time."""
    told, batches = [], []
    for batch in in_sight(
        iter(loader.batch_sampler), loader.batch_sampler, lambda samples: told.append((len(batches), samples))
    ):
        batches.append(batch)  # noqa: PERF402 - told looks at how many there are
    return told, batches


@pytest.mark.parametrize(
    ("count", "block", "mixed", "size"), [(96, 8, 2, 4), (101, 7, 3, 5), (40, 50, 1, 8), (9, 1, 1, 4)]
)
def test_blocks_are_told_a_group_before_they_come(count, block, mixed, size):
    sampler = cf.BlockShuffleSampler(range(count), block, mixed, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(range(count), size, sampler=sampler)
    expected = list(loader.batch_sampler)
    sampler.generator.manual_seed(1)
    told, batches = told_and_batches(loader)
    assert batches == expected
    assert sorted(sample for _, samples in told for sample in samples) == list(range(count)), "each once"
    first = {}
    for number, batch in enumerate(batches):
        for sample in batch:
            first.setdefault(sample // block, number)
    ahead = -(-block * mixed // size)
    for when, samples in told:
        assert first[samples[0] // block] - when == min(ahead, first[samples[0] // block])


def test_of_other_orders_nothing_is_told_or_pulled_early():
    class Counting(Sampler):
        pulled = 0

        def __init__(self):
            pass

        def __len__(self):
            return 12

        def __iter__(self):
            for sample in range(12):
                self.pulled += 1
                yield sample

    sampler = Counting()
    loader = DataLoader(range(12), 3, sampler=sampler)
    batches = in_sight(iter(loader.batch_sampler), loader.batch_sampler, lambda samples: pytest.fail("told"))
    assert next(batches) == [0, 1, 2]
    assert sampler.pulled == 3
    blocks = DataLoader(range(12), batch_sampler=[[0, 1], [2]])
    assert list(in_sight(iter(blocks.batch_sampler), blocks.batch_sampler, lambda samples: pytest.fail("told"))) == [
        [0, 1],
        [2],
    ]


@pytest.mark.parametrize("variants", [None, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_is_told_of_every_row_that_a_pass_reads(tmp_path, monkeypatch, variants, workers):
    """From the pass on in which all rows are there; a store in memory is told nothing."""
    told, read, whole = [], [], HDF5Store.read
    monkeypatch.setattr(HDF5Store, "_expect", lambda store, rows: told.extend(rows.tolist()))
    monkeypatch.setattr(HDF5Store, "read", lambda store, rows: read.extend(rows.tolist()) or whole(store, rows))
    monkeypatch.setattr(Telling, "__call__", lambda telling, samples: telling._tell(samples))  # this pass is soon over
    monkeypatch.setattr(HostStore, "_expect", lambda store, rows: pytest.fail("told"))
    data = TensorDataset(torch.arange(96.0).view(24, 4), torch.arange(24)) if variants is None else Jittered()
    for store in (f"hdf5:{tmp_path}", "host"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        cf.freeze(model, train_from="1")
        loader = DataLoader(data, 5, sampler=cf.BlockShuffleSampler(data, 6, 2), num_workers=workers)
        cached = cf.Engine(model, store=store).loader(loader, variants=variants)
        for epoch in range(4):
            told.clear()
            read.clear()
            list(cached)
            if store != "host" and epoch >= (variants or 1):
                assert sorted(told) == sorted(read)
                assert len(set(told)) == 24


def test_a_pass_that_is_left_tells_no_more_and_leaves_no_thread():
    release, told = threading.Event(), []
    with Telling(lambda samples: (release.wait(10), told.append(samples))) as tell:
        for number in range(5):
            tell([number])
        release.set()
    assert len(told) <= 5
    assert not [thread for thread in threading.enumerate() if "telling" in thread.name]
    with Telling(lambda samples: 1 / 0) as tell:
        tell([1])


@pytest.mark.parametrize("sizes", [{"block": 0}, {"block": 3, "mixed": 0}])
def test_sizes_are_checked(sizes):
    with pytest.raises(UsageError, match="expected 1 or more"):
        cf.BlockShuffleSampler(range(9), **sizes)
