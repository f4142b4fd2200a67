"""Block-shuffled order: a permutation that stays within a few blocks at a time."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze.errors import UsageError


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


@pytest.mark.parametrize("sizes", [{"block": 0}, {"block": 3, "mixed": 0}])
def test_sizes_are_checked(sizes):
    with pytest.raises(UsageError, match="expected 1 or more"):
        cf.BlockShuffleSampler(range(9), **sizes)
