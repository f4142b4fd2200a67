"""A cached pass visits the samples that the DataLoader would have visited, and draws what it would have drawn."""

from __future__ import annotations

import pickle
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import cachefreeze as cf
from cachefreeze.errors import BatchDependentError, FieldError, LoaderError, UsageError
from cachefreeze.fingerprint import digest
from cachefreeze.isolation import RandomState
from cachefreeze.row_source import Rows

COUNT = 23


class Numbered(Dataset):
    """Sample i is (a vector of i, label i), so that rows and labels tell which sample they are of."""

    def __init__(self, count=COUNT):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.full((4,), float(index)), index


class EagerSampler(torch.utils.data.Sampler):
    """Draws when its iterator is made, not at the first sample."""

    def __iter__(self):
        return iter(torch.randperm(COUNT).tolist())

    def __len__(self):
        return COUNT


class DrawingSampler(torch.utils.data.Sampler):
    """Draws from three global states at every sample."""

    def __iter__(self):
        for index in range(COUNT):
            torch.rand(1)
            np.random.rand()  # noqa: NPY002
            random.random()
            yield index

    def __len__(self):
        return COUNT


def make_model():
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.zero_()
    cf.freeze(model, "2")
    return model


def generator():
    return torch.Generator().manual_seed(5)


SAMPLERS = {
    "sequential": lambda: {"shuffle": False},
    "shuffle": lambda: {"shuffle": True},
    "shuffle, own generator": lambda: {"shuffle": True, "generator": generator()},
    "drop_last": lambda: {"shuffle": True, "drop_last": True},
    "with replacement": lambda: {"sampler": RandomSampler(range(COUNT), replacement=True, num_samples=40)},
    "weighted": lambda: {"sampler": WeightedRandomSampler([1.0 + i for i in range(COUNT)], 31)},
    "subset": lambda: {"sampler": SubsetRandomSampler(range(3, 15))},
    "distributed": lambda: {"sampler": DistributedSampler(range(COUNT), num_replicas=2, rank=1)},
    "batch sampler": lambda: {"batch_sampler": BatchSampler(RandomSampler(range(COUNT)), 5, drop_last=False)},
    "eager": lambda: {"sampler": EagerSampler()},
    "drawing": lambda: {"sampler": DrawingSampler()},
}


def make_loader(options, **more):
    options = dict(options)
    if "batch_sampler" not in options:
        options["batch_size"] = 4
    return DataLoader(Numbered(), **options, **more)


def states():
    """A number drawn from each global state: equal numbers, equal states."""
    return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002


def reseed():
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    random.seed(11)


def visit(loader, passes, stop_after=None):
    """Labels of every batch of some passes, with a draw of the user's own between batches."""
    seen = []
    for _ in range(passes):
        for position, (_, labels) in enumerate(loader):
            seen.append((labels.tolist(), states()))
            if stop_after is not None and position + 1 == stop_after:
                break
    return seen, states()


@pytest.mark.parametrize("name", SAMPLERS)
def test_order_and_draws_are_the_dataloaders(name):
    reseed()
    expected = visit(make_loader(SAMPLERS[name]()), 3)
    reseed()
    loader = make_loader(SAMPLERS[name]())
    cached = cf.Engine(make_model(), "host").loader(loader)
    assert visit(cached, 3) == expected


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("name", ["shuffle", "shuffle, own generator", "with replacement", "eager", "drawing"])
def test_order_and_draws_with_workers(name, persistent):
    workers = {"num_workers": 2, "persistent_workers": persistent, "prefetch_factor": 2}
    reseed()
    plain = make_loader(SAMPLERS[name](), **workers)
    expected = visit(plain, 3)
    del plain
    reseed()
    cached = cf.Engine(make_model(), "host").loader(make_loader(SAMPLERS[name](), **workers))
    assert visit(cached, 3) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_draws_after_an_early_break(workers):
    options = {"num_workers": workers}
    reseed()
    expected = visit(make_loader(SAMPLERS["drawing"](), **options), 3, stop_after=2)
    reseed()
    cached = cf.Engine(make_model(), "host").loader(make_loader(SAMPLERS["drawing"](), **options))
    assert visit(cached, 3, stop_after=2) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_belong_to_their_samples(workers):
    loader = DataLoader(Numbered(), 4, shuffle=True, num_workers=workers)
    cached = cf.Engine(make_model(), "host").loader(loader)
    for _ in range(3):
        for rows, labels in cached:
            assert isinstance(rows, Rows)
            assert len(rows) == len(labels)
            assert torch.equal(rows.tensors[0][:, 0], labels.float())
    assert cached.source == "cached"


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_of_a_pass_with_present_and_missing_rows(workers):
    dataset = Numbered()
    engine = cf.Engine(make_model(), "host")
    some = DataLoader(dataset, 4, sampler=SubsetRandomSampler(range(10)), num_workers=workers)
    every = DataLoader(dataset, 4, shuffle=True, num_workers=workers)
    first = engine.loader(some, name="train")
    both = engine.loader(every, name="train")
    for _ in first:
        pass
    assert (first.counts.cached, first.counts.computed) == (0, 10)
    for rows, labels in both:
        assert torch.equal(rows.tensors[0][:, 0], labels.float())
    assert (both.counts.cached, both.counts.computed, both.source) == (10, COUNT - 10, "fill")
    for _ in both:
        pass
    assert (both.counts.cached, both.counts.computed, both.source) == (COUNT, 0, "cached")


def test_a_cached_pass_reads_two_samples_of_the_dataset():
    """To see that the data is still what its rows were made of; the store has the rest."""

    class Counting(Numbered):
        reads = 0

        def __getitem__(self, index):
            Counting.reads += 1
            return super().__getitem__(index)

    cached = cf.Engine(make_model(), "host").loader(DataLoader(Counting(), 4, shuffle=True))
    list(cached)
    before = Counting.reads
    list(cached)
    assert Counting.reads == before + 2


def test_handed_out_rows_are_fresh():
    """The suffix may write into its batch in place without harming the store."""
    cached = cf.Engine(make_model(), "host").loader(DataLoader(Numbered(), COUNT))
    (rows, labels) = next(iter(cached))
    rows.tensors[0].fill_(-1)
    labels.fill_(-1)
    again, labels = next(iter(cached))
    assert torch.equal(again.tensors[0][:, 0], labels.float())
    assert labels.tolist() == list(range(COUNT))


Sample = namedtuple("Sample", ["image", "target"])


def sample_of(kind):
    def pick(index):
        x, y = torch.full((4,), float(index)), torch.tensor(index)
        return {
            "tuple": (x, y),
            "list": [x, y, y * 2],
            "named": Sample(x, y),
            "dict": {"input": x, "label": y},
            "nested": (x, {"boxes": torch.full((2, 2), index), "extra": (y, y + 1)}),
            "tensor": x,
        }[kind]

    return pick


class Shaped(Dataset):
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return sample_of(self.kind)(index)


@pytest.mark.parametrize("kind", ["tuple", "list", "named", "dict", "nested", "tensor"])
def test_batches_keep_their_structure(kind):
    """Only what the model consumes is replaced; everything else is equal, types included."""
    loader = DataLoader(Shaped(kind), 3)
    cached = cf.Engine(make_model(), "host").loader(loader)
    for _ in range(2):
        for plain, batch in zip(loader, cached, strict=True):
            assert type(batch) is (Rows if kind == "tensor" else type(plain))
            swapped = batch
            if kind == "dict":
                assert list(batch) == list(plain)
                swapped = {**batch, "input": plain["input"]}
                assert isinstance(batch["input"], Rows)
            elif kind == "tensor":
                swapped = plain
            else:
                assert isinstance(batch[0], Rows)
                swapped = type(batch)(plain[0], *batch[1:]) if kind == "named" else [plain[0], *batch[1:]]
            left, right = torch.utils._pytree.tree_flatten(swapped), torch.utils._pytree.tree_flatten(plain)
            assert left[1] == right[1]
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(left[0], right[0], strict=True))


def test_dict_batches_go_through_the_engine_by_keyword():
    model = make_model()
    engine = cf.Engine(model, "host")
    cached = engine.loader(DataLoader(Shaped("dict"), 3))
    batch = next(iter(cached))
    expected = model(torch.stack([sample_of("dict")(i)["input"] for i in range(3)]))
    assert torch.equal(engine(**engine.model_inputs(batch)), expected)
    with pytest.raises(TypeError, match=r"'label'.*model_inputs"):
        engine(**batch)


def test_inputs_names_what_the_model_consumes():
    class Swapped(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return index, torch.full((4,), float(index))

    cached = cf.Engine(make_model(), "host").loader(DataLoader(Swapped(), 3), inputs=1)
    labels, rows = next(iter(cached))
    assert torch.equal(rows.tensors[0][:, 0], labels.float())
    with pytest.raises(FieldError, match="names no element"):
        cf.Engine(make_model(), "host").loader(DataLoader(Swapped(), 3), inputs=5)


def test_dict_without_a_model_argument_is_refused_by_its_keys():
    class Images(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"image": torch.zeros(4), "label": index}

    with pytest.raises(FieldError, match=r"'image', 'label'.*inputs="):
        cf.Engine(make_model(), "host").loader(DataLoader(Images(), 2))
    cached = cf.Engine(make_model(), "host").loader(DataLoader(Images(), 2), inputs="image")
    assert isinstance(next(iter(cached))["image"], Rows)


def test_proxies():
    loader = DataLoader(Numbered(), 4, shuffle=True)
    cached = cf.Engine(make_model(), "host").loader(loader)
    assert len(cached) == len(loader)
    assert cached.dataset is loader.dataset
    assert cached.sampler is loader.sampler
    assert cached.batch_size == 4


def test_rows_are_a_pytree():
    cached = cf.Engine(make_model(), "host").loader(DataLoader(Numbered(), 4))
    rows, _ = next(iter(cached))
    doubled = torch.utils._pytree.tree_map(lambda t: t * 2, rows)
    assert isinstance(doubled, Rows)
    assert torch.equal(doubled.tensors[0], rows.tensors[0] * 2)
    assert torch.equal(rows.to(torch.float64).tensors[0], rows.tensors[0].double())


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(4), 0


class InBatches(Dataset):
    """Fetched by batches alone, as torch allows where a loader makes batches."""

    def __len__(self):
        return 8

    def __getitems__(self, indices):
        return [(torch.zeros(4), index) for index in indices]


class Text(Numbered):
    def __getitem__(self, index):
        return torch.zeros(4), f"sample {index}"


def mixing(samples):
    x = torch.stack([s[0] for s in samples])
    return x - x.mean(dim=0), torch.tensor([s[1] for s in samples])


def summing(samples):
    return torch.stack([s[0] for s in samples]), torch.tensor([s[1] for s in samples]).sum()


def ascending(samples):
    return torch.utils.data.default_collate(sorted(samples, key=lambda sample: sample[1]))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: DataLoader(Numbered(), 4, collate_fn=ascending), BatchDependentError, "does not keep their order"),
        (lambda: DataLoader(Stream(), 4), LoaderError, "iterable"),
        (lambda: DataLoader(InBatches(), 4), LoaderError, "InBatches has __getitems__ and no __getitem__.*one by one"),
        (lambda: DataLoader(Subset(InBatches(), [1, 2]), 2), LoaderError, "InBatches has __getitems__"),
        (lambda: DataLoader(Numbered(), batch_size=None), LoaderError, "batch_size=None"),
        (lambda: [1, 2], LoaderError, "DataLoader"),
        (lambda: DataLoader(Text(), 4), FieldError, "'1.*str"),
        (lambda: DataLoader(Numbered(), 4, collate_fn=mixing), BatchDependentError, "collate"),
        (lambda: DataLoader(Numbered(), 4, collate_fn=summing), BatchDependentError, "batch"),
    ],
)
def test_loaders_that_cannot_be_cached_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        cf.Engine(make_model(), "host").loader(make())


def test_a_wrapped_loader_is_not_wrapped_again():
    engine = cf.Engine(make_model(), "host")
    cached = engine.loader(DataLoader(Numbered(), 4))
    with pytest.raises(LoaderError, match="already"):
        engine.loader(cached)


def test_one_name_holds_the_rows_of_one_dataset():
    engine = cf.Engine(make_model(), "host")
    engine.loader(DataLoader(Numbered(), 4), name="train")
    with pytest.raises(UsageError, match="other samples"):
        engine.loader(DataLoader(Numbered(9), 4), name="train")


def test_dataset_of_one_sample_is_computed_as_two():
    x = torch.randn(1, 4)
    model = make_model()
    engine = cf.Engine(model, "host")
    cached = engine.loader(DataLoader(TensorDataset(x, torch.tensor([1])), 4, sampler=SequentialSampler([0])))
    rows, _ = next(iter(cached))
    assert torch.equal(rows.tensors[0], model[:2](x.repeat(2, 1))[:1])


class Untraceable(torch.nn.Module):
    """Registered in another order than used, by a forward that no trace can follow."""

    def __init__(self):
        super().__init__()
        self.head, self.stem = torch.nn.Linear(3, 2), torch.nn.Linear(3, 3)
        self.stem.requires_grad_(False)

    def forward(self, x):
        return self.head(self.stem(x) if x.shape[0] > 0 and float(x.sum()) > -1e9 else x)


def test_the_baseline_knows_its_boundary_from_the_loaders_samples():
    engine = cf.Engine(Untraceable(), "off")
    state = RandomState.capture()
    loader = engine.loader(DataLoader(torch.ones(4, 3), 2, shuffle=True))
    assert (engine.boundary, loader.source) == ("head", "frozen")
    assert state.moved() == []


def test_the_baseline_takes_any_data():
    """Batches that cannot be taken apart are no error where nothing is cached; registration order has to do."""
    engine = cf.Engine(Untraceable(), "off")
    assert engine.loader(DataLoader(list("abcd"), 2, collate_fn=set)).source == "live"


Pair = namedtuple("Pair", "x y")


def as_pair(items):
    return Pair(*default_collate(items))


def as_dict(items):
    return {"input": default_collate(items)[0]}


def as_tensor(items):
    return default_collate(items)[0]


@pytest.mark.parametrize("collate", [default_collate, as_pair, as_dict, as_tensor])
def test_spawned_workers_take_the_users_function_along_and_nothing_else(collate):
    """What goes to a worker can be pickled and says nothing of the model: Python 3.14 forks none by default."""
    model = nn.Sequential(nn.Linear(4, 1000), nn.ReLU(), nn.Linear(1000, 2))
    cf.freeze(model, "2")
    data = TensorDataset(torch.randn(8, 4), torch.arange(8))
    rows = cf.Engine(model, "host").loader(DataLoader(data, 4, collate_fn=collate)).rows
    packed = pickle.dumps(rows.collate)
    assert len(packed) < 1000
    items = [data[0], data[5]]
    assert digest(pickle.loads(packed)(items)) == digest(collate(items))
    assert pickle.loads(packed)([]) is None
    again = pickle.loads(pickle.dumps(rows.view.layout))
    assert digest(again.assemble(1, again.field_tensors(collate(items)))) == digest(
        rows.view.layout.assemble(1, rows.view.layout.field_tensors(collate(items)))
    )


@pytest.mark.parametrize("store", ["host", "hdf5"])
@pytest.mark.parametrize("made_inside", [False, True])
def test_a_first_pass_in_inference_mode_spoils_nothing(store, made_inside, tmp_path):
    """Validation fills, and its stores and the memory of its batches are trained on, as without a cache."""

    class InPlace(nn.Module):
        def forward(self, x):
            return x.add_(1)  # to what it was given, which an inference tensor allows in its mode alone

    found = []
    for where in ("off", store if store == "host" else f"hdf5:{tmp_path}"):
        torch.manual_seed(0)
        model = nn.Sequential(InPlace(), nn.Linear(4, 40_000), nn.ReLU(), nn.Linear(40_000, 3))
        cf.freeze(model, "3")
        engine = cf.Engine(model, where)
        with torch.inference_mode(made_inside):
            train, val = engine.loader(DataLoader(Numbered(8), 4)), engine.loader(DataLoader(Numbered(8), 4))
        optimizer = torch.optim.SGD(model[3].parameters(), 1e-6)
        for _ in engine.epochs(2):
            with torch.inference_mode():
                found.append([engine(x) for x, _ in val])
                assert torch.is_inference_mode_enabled()
            for x, y in train:
                optimizer.zero_grad()
                nn.functional.cross_entropy(engine(x), y % 3).backward()
                optimizer.step()
        assert val.source == ("frozen" if where == "off" else "cached")
        engine.close()
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-4, atol=1e-5)
