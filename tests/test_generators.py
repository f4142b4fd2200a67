"""Generators are found wherever a dataset keeps them, told apart by state, and put back."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

import cachefreeze as cf
from cachefreeze.errors import RandomSampleError
from cachefreeze.generators import generators_of, preserved_generators, state_of

KINDS = {
    "torch": (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand(1, generator=g)),
    "numpy": (lambda: np.random.default_rng(1), lambda g: g.random()),
    "numpy, Mersenne twister": (lambda: np.random.Generator(np.random.MT19937(1)), lambda g: g.random()),
    "RandomState": (lambda: np.random.RandomState(1), lambda g: g.rand()),
    "random": (lambda: random.Random(1), lambda g: g.random()),
}
RNG = random.Random(3)


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)


class Slots:
    __slots__ = ("rng",)

    def __init__(self):
        self.rng = random.Random(1)


class Method:
    def __init__(self):
        self.rng = random.Random(1)

    def draw(self):
        return self.rng.random()


class Global:
    def __getitem__(self, index):
        return RNG.random() + index


def closed_over():
    rng = random.Random(1)
    return lambda x: x + rng.random()


PLACES = {
    "an attribute": lambda: Holder(rng=random.Random(1)),
    "a transform among others": lambda: Holder(transform=Holder(transforms=[len, Holder(rng=random.Random(1))])),
    "a dict": lambda: Holder(by_name={"a": random.Random(1)}),
    "a slot": Slots,
    "a closure": closed_over,
    "a partial": lambda: functools.partial(divmod, random.Random(1)),
    "a keyword of a partial": lambda: functools.partial(divmod, rng=random.Random(1)),
    "the object of a method": lambda: Method().draw,
    "a global of its method": Global,
    "a subset": lambda: Subset(Holder(rng=random.Random(1)), [0]),
    "a concatenation": lambda: ConcatDataset([[1], Subset(Holder(rng=random.Random(1)), [0])]),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_generator_is_found_in(place):
    found = generators_of(PLACES[place](), "dataset")
    assert [type(generator) for _, generator in found] == [random.Random]
    assert found[0][0].startswith("dataset")


def test_where_it_is_can_be_read():
    held = Holder(inner=Holder(steps=[1, Holder(rng=random.Random(1))]))
    assert generators_of(held, "dataset")[0][0] == "dataset.inner.steps[1].rng"


def test_what_points_at_itself_ends():
    held = Holder(rng=random.Random(1))
    held.own = [held, {"again": held}]
    assert len(generators_of(held, "dataset")) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_told_apart_and_put_back(kind):
    make, draw = KINDS[kind]
    generator = make()
    before = state_of(generator)
    assert state_of(make()) == before
    with preserved_generators(Holder(rng=generator)):
        drawn = float(draw(generator))
        assert state_of(generator) != before
    assert state_of(generator) == before
    assert float(draw(generator)) == drawn


class Noisy(Dataset):
    """Adds nothing, but draws: from a generator that may be seeded by the index."""

    def __init__(self, seeded):
        self.rng, self.seeded = torch.Generator(), seeded

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if self.seeded:
            self.rng.manual_seed(index)
        draw = torch.rand(3, generator=self.rng)
        return draw if self.seeded else torch.full((3,), float(index))


def model():
    made = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    cf.freeze(made, "1")
    return made


def test_a_draw_that_changed_nothing_is_refused_by_the_name_of_its_generator():
    dataset = Noisy(seeded=False)
    before = state_of(dataset.rng)
    with pytest.raises(RandomSampleError, match=r"dataset\[0\] draws from dataset\.rng"):
        cf.Engine(model(), "host").loader(DataLoader(dataset, 2))
    assert state_of(dataset.rng) == before


def test_a_generator_that_is_seeded_by_the_index_is_no_chance():
    loader = cf.Engine(model(), "host").loader(DataLoader(Noisy(seeded=True), 2))
    assert [len(rows) for rows in loader] == [2, 2, 2]


def test_a_collate_function_that_draws_is_refused_by_the_name_of_its_generator():
    class Collate:
        rng = None

        def __call__(self, samples):
            self.rng = self.rng or np.random.default_rng(1)  # made when it is needed
            self.rng.random()
            return torch.stack(samples)

    with pytest.raises(RandomSampleError, match=r"collate function is random .*collate_fn\.rng"):
        cf.Engine(model(), "host").loader(DataLoader(list(torch.ones(6, 3)), 2, collate_fn=Collate()))
