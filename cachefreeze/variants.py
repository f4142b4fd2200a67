"""Several seeded draws of every sample: what ``variants=K`` caches in place of one deterministic view.

Row ``sample + N * variant`` of a store belongs to one draw of one sample. Each draw is collated alone, under random
states that follow from seed, sample and variant, so that it is the same in any batch, order, process and run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachefreeze.batches import leaves_of, lists_samples
from cachefreeze.errors import BatchDependentError, FieldError, RandomSampleError, UsageError
from cachefreeze.fingerprint import digest
from cachefreeze.generators import generators_of, preserved_generators, preserved_states, seed_generator
from cachefreeze.isolation import preserved_random_state, seed_generators
from cachefreeze.probing import collated, copies_of, drawn_twice, same_row
from cachefreeze.ragged import evenly

# Seeds under which a random collate function is tried: one that mixes samples now and then shows itself in some.
_TRIED_SEEDS = 32
# More would be a data set of its own; a slip of the keyboard is caught before memory is asked for.
_MOST = 1024


class Variants:
    """A dataset whose item *row* is draw ``row // N`` of sample ``row % N``, collated alone.

    Attributes:
        dataset: The user's, of N samples.
        collate_fn: The user's; :func:`cachefreeze.batches.joined` takes its place in a loader over the draws.
        count: K, the draws of a sample.
        seed: Of all draws.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any], count: int, seed: int) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.count = count
        self.seed = seed
        self._samples = len(dataset)
        self._own: list[Any] = []
        self[0]  # some generators are made on the first draw
        self._own = [generator for part in (dataset, collate_fn) for _, generator in generators_of(part, "")]

    def __len__(self) -> int:
        return self.count * len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        """The collated draws of some rows. All random states are as before afterwards."""
        with preserved_random_state(), preserved_states(self._own):
            return [self._drawn(int(row)) for row in rows]

    def _drawn(self, row: int) -> Any:
        variant, sample = divmod(row, self._samples)
        # one seed each: equal ones would make equal streams of torch and numpy, and a flip follow from a crop
        words = np.random.SeedSequence((self.seed, variant, sample)).generate_state(3 + len(self._own))
        seeds = [int(word) for word in words]
        torch.default_generator.manual_seed(seeds[0])
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seeds[0])
        np.random.seed(seeds[1])  # noqa: NPY002 - the state that the user's transforms draw from
        random.seed(seeds[2])
        for generator, seed in zip(self._own, seeds[3:], strict=True):
            seed_generator(generator, seed)
        return collated(self.collate_fn, [self.dataset[sample]])


class Turns:
    """Which variant of each sample an epoch uses: all K in an order of its own, then all K in another one.

    Args:
        samples: N.
        count: K.
        seed: Of the orders. They are drawn from a private generator.
    """

    def __init__(self, samples: int, count: int, seed: int) -> None:
        self.samples = samples
        self._count = count
        self._seed = seed
        self._cycle: tuple[int, Tensor] | None = None

    def at(self, epoch: int) -> Tensor:
        """The variant of every sample in an epoch: (N,) int64."""
        cycle, place = divmod(epoch, self._count)
        if self._cycle is None or self._cycle[0] != cycle:
            # a word more than a draw's seed, so that no order follows from a draw
            word = np.random.SeedSequence((self._seed, cycle, 0, 0)).generate_state(1)[0]
            generator = torch.Generator().manual_seed(int(word))
            keys = torch.rand(self.samples, self._count, generator=generator)
            self._cycle = cycle, keys.argsort(dim=1)
        return self._cycle[1][:, place]


def draw_variants(dataset: Any, collate_fn: Callable[[list[Any]], Any], count: Any, seed: Any) -> Variants:
    """The draws of a random dataset or collate function.

    Raises:
        UsageError: ``count`` or ``seed`` is no such number, or nothing is random.
        RandomSampleError: A draw cannot be repeated.
        BatchDependentError: The collate function mixes samples.
        FieldError: It only lists samples.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= _MOST:
        raise UsageError(
            f"variants={count!r}: expected a whole number, 2 to {_MOST}: so many draws of every sample are kept, and "
            "one alone would freeze a random draw; use view= for a single, deterministic one"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed={seed!r}: expected a whole number, 0 or more")
    samples = len(dataset)
    some = sorted({0, samples // 2, samples - 1})
    with preserved_random_state(), preserved_generators(dataset, collate_fn):
        draws = [partial(_alone, dataset, collate_fn, index) for index in some]
        found = [drawn_twice(draw, (dataset, collate_fn), "") for draw in draws]
        made = Variants(dataset, collate_fn, count, seed)
        for index in some:
            if digest(made[index]) != digest(made[index]):
                raise RandomSampleError(
                    f"dataset[{index}] returns something else under equal random states, so variants= cannot repeat "
                    "a draw: let it draw from torch, numpy, random, or a generator that the dataset keeps as an "
                    "attribute"
                )
        if not any(moved or not equal for moved, equal in found):
            raise UsageError(
                f"variants={count}: neither the dataset nor the collate function is random, so all draws would be "
                "equal; leave variants= out"
            )
        _check_alone(made, [dataset[index] for index in evenly(samples, 5)])
    return made


def _alone(dataset: Any, collate_fn: Callable[[list[Any]], Any], index: int) -> Any:
    return collated(collate_fn, [dataset[index]])


def _check_alone(made: Variants, items: list[Any]) -> None:
    """Row *i* of a batch must follow from item *i* and the random states, whatever the other items are."""
    last = len(items) - 1
    if lists_samples(collated(made.collate_fn, copies_of(items)), len(items)):
        raise FieldError("variants= needs batches of tensors; this collate function only lists its samples")
    for seed in range(_TRIED_SEEDS):
        first = _seeded(made, seed, items)
        for place in {0, last // 2, last}:
            others = [items[place] if at == place else items[last - at] for at in range(len(items))]
            second = _seeded(made, seed, others)
            for one, other in zip(leaves_of(first), leaves_of(second), strict=False):
                rows = isinstance(one, Tensor) and isinstance(other, Tensor) and one.dim() and other.dim()
                if rows and len(one) == len(other) == len(items) and not same_row(one[place], other[place]):
                    raise BatchDependentError(
                        "the collate function makes a sample depend on the others of its batch (CutMix, MixUp?), so no "
                        "row stands for a draw of one sample. Give the loader a collate_fn that only stacks, pads or "
                        "draws for each sample, and mix in the training loop"
                    )


def _seeded(made: Variants, seed: int, items: list[Any]) -> Any:
    seed_generators(seed)
    for generator in made._own:
        seed_generator(generator, seed)
    return collated(made.collate_fn, copies_of(items))
