"""variants=K: seeded draws of every sample are cached, each one alone; what no row can stand for is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import cachefreeze as cf
from cachefreeze.errors import BatchDependentError, FieldError, LoaderError, RandomSampleError, UsageError
from cachefreeze.isolation import RandomState
from cachefreeze.moves import Costs, best_path
from cachefreeze.variants import Turns, draw_variants

N, K = 10, 4


class Drawn(Dataset):
    """Sample i, and a number from each random state: a row tells which draw it is of."""

    def __init__(self, draw=None, count=N):
        self.draw = draw
        self.targets = list(range(count))
        self.own = torch.Generator().manual_seed(5)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        drawn = (
            torch.randint(1000, ()).item(),
            np.random.randint(1000),  # noqa: NPY002
            random.randrange(1000),
            torch.randint(1000, (), generator=self.own).item(),
        )
        return torch.tensor([index, *drawn], dtype=torch.float32), self.targets[index]


class Scale(nn.Module):
    """Rounds alike in every batch; of weight one it hands on what it is given."""

    def __init__(self, value=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((5,), value))

    def forward(self, x):
        return x * self.weight


def net(value=1.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Scale(value), Scale(value), Scale(value), nn.Linear(5, N))


def frozen():
    model = net()
    cf.freeze(model, "1")
    return model


def plain(dataset=None, **options):
    options = {"batch_size": 3, "shuffle": True, "generator": torch.Generator().manual_seed(1), **options}
    return DataLoader(Drawn() if dataset is None else dataset, **options)


def collected(epochs, store="host", seed=0, loader=None, resume=0, variants=K):
    """What each epoch gives for every sample: (epochs, N, 5), and where it came from."""
    engine = cf.Engine(frozen(), store)
    batches = engine.loader(plain() if loader is None else loader, variants=variants, seed=seed)
    engine.load_state_dict({"epoch": resume, "place": None})
    seen, sources = [], []
    for _ in engine.epochs(epochs):
        found = torch.zeros(N, 5)
        for x, y in batches:
            found[y] = x.tensors[0]
        seen.append(found)
        sources.append(batches.source)
    engine.close()
    return torch.stack(seen), sources


def test_each_sample_goes_through_all_variants_before_one_comes_again():
    seen, sources = collected(3 * K)
    assert sources == ["fill"] * K + ["cached"] * 2 * K
    assert all((seen[:, i, 0] == i).all() for i in range(N)), "a row belongs to its sample"
    cycles = seen.view(3, K, N, 5)
    orders = []
    for sample in range(N):
        keys = [[tuple(row.tolist()) for row in cycle[:, sample]] for cycle in cycles]
        assert len(set(keys[0])) == K
        assert set(keys[0]) == set(keys[1]) == set(keys[2])
        orders.append([[keys[0].index(key) for key in cycle] for cycle in keys[1:]])
    assert len({str(order) for order in orders}) > 1, "in an order of its own"
    assert any(order[0] != order[1] for order in orders), "another one in the next cycle"


class Words(Drawn):
    """The next words of each generator, which all are Mersenne Twisters: equal seeds make equal words."""

    def __init__(self):
        super().__init__()
        self.legacy = np.random.RandomState(1)

    def __getitem__(self, index):
        words = [torch.randint(2**31, (4,), generator=own).tolist() for own in (None, self.own)]
        words += [
            (source.randint(2**32, size=4, dtype=np.uint32) % 2**31).tolist() for source in (np.random, self.legacy)
        ]
        return torch.tensor(words), index


def test_the_streams_of_a_draw_differ():
    """One seed for all would make numpy's draws follow from torch's, and the dataset's own from both."""
    drawn = draw_variants(Words(), torch.utils.data.default_collate, K, 0)
    for row in range(K * N):
        assert len(drawn[row][0].unique()) == 16


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_follow_from_the_seed_alone(workers):
    """Not from the order, the batch size, the worker, or the global states; another seed makes others."""
    first, _ = collected(K)
    torch.manual_seed(9)
    np.random.seed(9)  # noqa: NPY002
    again, _ = collected(K, loader=plain(batch_size=4, shuffle=False, num_workers=workers))
    assert torch.equal(first, again)
    other, _ = collected(K, seed=1)
    assert not (first[..., 1:] == other[..., 1:]).all(dim=-1).any()


def test_a_resumed_run_goes_on_with_the_same_variants():
    whole, _ = collected(K + 2)
    rest, _ = collected(K + 2, resume=3)
    assert torch.equal(whole[3:], rest)


def test_without_a_clock_every_pass_is_an_epoch():
    """manager.loader, and loops that do not use engine.epochs, never repeat one frozen draw."""
    whole, _ = collected(K)
    engine = cf.Engine(frozen(), "host")
    batches = engine.loader(plain(), variants=K)
    for expected in whole:
        for x, y in batches:
            assert torch.equal(x.tensors[0], expected[y])


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_the_loaders_own_draws_are_unchanged(options):
    """The same order, and the same global states afterwards, as a DataLoader over a dataset that draws nothing."""
    fixed = TensorDataset(torch.zeros(N, 5), torch.arange(N))
    expected, got = [], []
    torch.manual_seed(3)
    loader = DataLoader(fixed, 3, shuffle=True, **options)
    for _ in range(3):
        expected += [y.tolist() for _, y in loader]
        expected.append(torch.rand(1).item())
    engine = cf.Engine(frozen(), "host")
    dataset = Drawn()
    batches = engine.loader(DataLoader(dataset, 3, shuffle=True, **options), variants=2)
    own = dataset.own.get_state()
    torch.manual_seed(3)
    before = RandomState.capture()
    for _ in engine.epochs(3):
        got += [y.tolist() for _, y in batches]
        got.append(torch.rand(1).item())
    assert got == expected
    assert before.moved() == ["torch"]
    assert torch.equal(dataset.own.get_state(), own)


def test_hdf5_rows_are_reused_by_the_same_draws_only(tmp_path):
    first, sources = collected(K, f"hdf5:{tmp_path}")
    again, cached = collected(K, f"hdf5:{tmp_path}")
    assert (sources, cached) == (["fill"] * K, ["cached"] * K)
    assert torch.equal(first, again)
    assert len(list(tmp_path.glob("*.h5"))) == 1
    collected(1, f"hdf5:{tmp_path}", seed=1)
    collected(1, f"hdf5:{tmp_path}", variants=K + 1)
    assert len(list(tmp_path.glob("*.h5"))) == 3


def test_variants_are_made_when_they_are_first_needed_or_by_a_fill(tmp_path):
    _, _ = collected(1, f"hdf5:{tmp_path}")
    engine = cf.Engine(frozen(), f"hdf5:{tmp_path}")
    batches = engine.loader(plain(), variants=K)
    assert engine.cache.info()["train"]["rows_present"] == N
    done = engine.cache.fill(batches)
    assert (done.computed_rows, done.rows) == ((K - 1) * N, K * N)
    engine.close()


class PerEpoch(Dataset):
    """The draws as a dataset that says by itself which one an epoch gets: the reference, uncached."""

    def __init__(self):
        self.made = draw_variants(Drawn(), torch.utils.data.default_collate, K, 0)
        self.turns = Turns(N, K, 0)
        self.epoch = 0

    def __len__(self):
        return N

    def __getitem__(self, index):
        x, y = self.made[index + N * int(self.turns.at(self.epoch)[index])]
        return x[0], int(y[0])


def staged(store, loader, each=lambda epoch: None, epochs=2 * K, **options):
    model = net(0.5)
    engine = cf.Engine(
        model, store, schedule=cf.Stages([{"train_from": "1", "epochs": 3}, {"train_from": "2"}]), moves="always"
    )
    batches = engine.loader(loader, **options)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    losses, promoted = [], []
    for epoch in engine.epochs(epochs):
        each(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            loss = functional.cross_entropy(engine(x) / 1000, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        promoted.append(batches.counts.promoted)
    engine.close()
    return losses, list(model.state_dict().values()), promoted


@pytest.mark.parametrize("tier", ["host", "hdf5"])
def test_promotion_makes_rows_of_variants_from_those_below(tier, tmp_path):
    """Losses and weights are those of the same draws without a cache; what is not below comes from the samples."""
    reference = PerEpoch()
    losses, weights, _ = staged("off", plain(reference), lambda epoch: setattr(reference, "epoch", epoch))
    store = tier if tier == "host" else f"hdf5:{tmp_path}"
    got, found, promoted = staged(store, plain(), variants=K)
    assert got == losses
    assert all(torch.equal(a, b) for a, b in zip(found, weights, strict=True))
    # the fourth variant was never made below; from the second cycle on the first three are
    assert promoted[:4] == [0, 0, 0, 0]
    assert sum(promoted) == 3 * N
    assert not list(tmp_path.glob("*-1-*.h5")), "the shallower store is gone once all variants are promoted"


def test_live_epochs_are_augmented_and_cached_ones_are_not():
    """The switch: while everything trains a sample is drawn anew every epoch, afterwards there are K draws of it."""
    model = net()
    engine = cf.Engine(model, "host", schedule=cf.Stages([{"epochs": 6}, {"train_from": "1"}]), moves="always")
    batches = engine.loader(plain(), variants=2)
    live, cached = set(), set()
    for _ in engine.epochs(12):
        for x, _ in batches:
            (live if isinstance(x, torch.Tensor) else cached).update(
                tuple(row.tolist()) for row in (x if isinstance(x, torch.Tensor) else x.tensors[0])
            )
    assert (len(live), len(cached)) == (6 * N, 2 * N)


def test_a_schedule_refuses_augmented_samples_at_the_beginning():
    """Not at the first freeze, hours later: both ways out are named before anything trains."""
    engine = cf.Engine(net(), "host", schedule=cf.FreezeOut())
    with pytest.raises(RandomSampleError, match=r"view=.*variants=4"):
        engine.loader(plain())


def mixup(samples):
    x = torch.stack([s[0] for s in samples])
    share = torch.rand(1) if torch.rand(1) < 0.5 else torch.ones(1)
    return x * share + x.roll(1, 0) * (1 - share), torch.tensor([s[1] for s in samples])


def jitter(samples):
    x = torch.stack([s[0] for s in samples])
    return {"input": x + torch.rand(len(x), 1), "y": torch.tensor([s[1] for s in samples])}


def centred(samples):
    x = torch.stack([s[0] for s in samples])
    return x - x.mean(0), torch.tensor([s[1] for s in samples])


@pytest.mark.parametrize("collate", [mixup, centred])
def test_a_collate_function_that_mixes_samples_is_refused(collate):
    with pytest.raises(BatchDependentError, match="CutMix"):
        cf.Engine(frozen(), "host").loader(plain(collate_fn=collate), variants=K)


def test_cutmix_of_torchvision_is_refused():
    transforms = pytest.importorskip("torchvision.transforms.v2")
    cutmix = transforms.RandomChoice([transforms.CutMix(num_classes=N), transforms.Identity()])

    def collate(samples):
        return cutmix(*torch.utils.data.default_collate(samples))

    data = TensorDataset(torch.rand(N, 3, 8, 8), torch.arange(N))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, N))
    cf.freeze(model, "2")
    with pytest.raises(BatchDependentError, match="CutMix"):
        cf.Engine(model, "host").loader(DataLoader(data, 4, collate_fn=collate), variants=K)


def test_a_collate_function_that_draws_for_each_sample_is_cached():
    fixed = TensorDataset(torch.arange(5.0 * N).view(N, 5), torch.arange(N))
    engine = cf.Engine(frozen(), "host")
    batches = engine.loader(plain(fixed, collate_fn=jitter), variants=2)
    seen = [set() for _ in range(N)]
    for _ in engine.epochs(6):
        for batch in batches:
            for row, y in zip(batch["input"].tensors[0], batch["y"].tolist(), strict=True):
                assert 0 <= float(row[0] - 5 * y) < 1
                seen[y].add(float(row[0]))
    assert [len(found) for found in seen] == [2] * N


class Unseedable(Drawn):
    def __getitem__(self, index):
        return super().__getitem__(index)[0] + float(np.random.default_rng().random()), index


class RandomLength(Drawn):
    def __getitem__(self, index):
        return torch.ones(int(torch.randint(3, 9, ()))), index


def padding(samples):
    x = nn.utils.rnn.pad_sequence([s[0] for s in samples], batch_first=True)
    return x, torch.tensor([s[1] for s in samples])


REFUSED = {
    "one": (lambda: plain(), {"variants": 1}, UsageError, "view= for a single"),
    "none": (lambda: plain(), {"variants": 0}, UsageError, "2 to 1024"),
    "text": (lambda: plain(), {"variants": "4"}, UsageError, "whole number"),
    "flag": (lambda: plain(), {"variants": True}, UsageError, "whole number"),
    "seed": (lambda: plain(), {"variants": 2, "seed": -1}, UsageError, "seed=-1"),
    "view too": (lambda: plain(), {"variants": 2, "view": Drawn()}, UsageError, "give one of them"),
    "deterministic too": (lambda: plain(), {"variants": 2, "assume_deterministic": True}, UsageError, "one of them"),
    "nothing random": (
        lambda: plain(TensorDataset(torch.rand(N, 5), torch.arange(N))), {"variants": 2}, UsageError, "leave variants="
    ),
    "not repeatable": (lambda: plain(Unseedable()), {"variants": 2}, RandomSampleError, "cannot repeat a draw"),
    "lengths": (lambda: plain(RandomLength(), collate_fn=padding), {"variants": 2}, UsageError, "crop or pad to one"),
    "lists": (
        lambda: plain(collate_fn=lambda samples: ([s[0] for s in samples], [s[1] for s in samples])),
        {"variants": 2}, FieldError, "only lists",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    loader, options, error, text = REFUSED[case]
    given = loader()
    state = RandomState.capture()
    with pytest.raises(error, match=text):
        cf.Engine(frozen(), "host").loader(given, **options)
    assert state.moved() == []


def test_without_a_cache_there_is_nothing_to_keep():
    with pytest.raises(UsageError, match="variants= says what to cache"):
        cf.Engine(frozen(), "off").loader(plain(), variants=2)


def test_a_sampler_beyond_the_samples_does_not_reach_another_variant():
    engine = cf.Engine(frozen(), "host")
    batches = engine.loader(plain(sampler=[0, N], shuffle=None), variants=2)
    with pytest.raises(LoaderError, match=f"sample {N} of a dataset of {N}"):
        list(batches)


def test_changed_data_is_noticed():
    engine = cf.Engine(frozen(), "host")
    dataset = Drawn()
    batches = engine.loader(plain(dataset), variants=2)
    list(batches)
    dataset.targets = dataset.targets[::-1]
    with pytest.raises(cf.CacheFreezeError, match=r"dataset\.targets is not what it was"):
        list(batches)


def test_a_move_counts_a_fill_for_every_variant_that_the_run_still_needs():
    """Four epochs are left: one fill is repaid, four are not; two epochs at the end pay for two fills at most."""
    costs = {"forward": (1.0, 1.0, 1.0), "fetch": 1.0, "read": (0.0,) * 3, "write": (0.5,) * 3, "setup": 0.0}
    assert best_path([1] * 4, Costs(**costs), 0)[0] == [1] * 4
    assert best_path([1] * 4, Costs(**costs, fills=4), 0)[0] == [0] * 4
    assert Costs(**costs, fills=4).move(0, 1, 2) == 2 * Costs(**costs).move(0, 1, 2)
