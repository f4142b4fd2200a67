"""Traps of datasets: what a batch is made of, and samples that do not stay what they were."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from cachefreeze.testing.loader_table import COUNT, WIDTH, Items, LoaderTable, labels, loader, pair, values

table = LoaderTable()


@table()
def tensors() -> DataLoader[Any]:
    """A TensorDataset."""
    return loader(TensorDataset(values(), labels()))


@table()
def inputs_alone() -> DataLoader[Any]:
    """A batch is one tensor."""
    return loader(Items(lambda i: values()[i]))


@table()
def python_labels() -> DataLoader[Any]:
    """Labels are Python numbers, of two kinds."""
    return loader(Items(lambda i: (values()[i], i % 3, float(i))))


@table()
def numpy_samples() -> DataLoader[Any]:
    """Samples are numpy arrays and scalars."""
    return loader(Items(lambda i: (values()[i].numpy(), np.int64(i % 3))))


@table()
def double_inputs() -> DataLoader[Any]:
    """Inputs in float64."""
    return loader(Items(lambda i: (values()[i].double(), i % 3)))


@table()
def byte_images() -> DataLoader[Any]:
    """Inputs are bytes."""
    return loader(Items(lambda i: ((values()[i] * 20 + 100).to(torch.uint8), i % 3)))


@table()
def dicts() -> DataLoader[Any]:
    """Samples are dicts whose first key is not the input."""
    return loader(Items(lambda i: {"id": i, "x": values()[i], "y": labels()[i]}))


Pair = namedtuple("Pair", ["x", "y"])


@table()
def named_tuples() -> DataLoader[Any]:
    """Samples are named tuples."""
    return loader(Items(lambda i: Pair(*pair(i))))


@table()
def nested_targets() -> DataLoader[Any]:
    """Targets are a tree."""
    return loader(Items(lambda i: (values()[i], {"class": i % 3, "boxes": [torch.ones(2, 4) * i, i]})))


@table(inputs=1)
def inputs_second() -> DataLoader[Any]:
    """The model consumes the second element."""
    return loader(Items(lambda i: (i, values()[i], i % 3)))


@table(refused="not a tensor")
def strings() -> DataLoader[Any]:
    """File names travel with the batch."""
    return loader(Items(lambda i: (values()[i], f"sample-{i}.png")))


class Record:
    """A batch class of the user's own."""

    def __init__(self, samples: list[Any]) -> None:
        self.x, self.y = default_collate(samples)


@table(refused="type Record cannot be taken apart")
def batch_class() -> DataLoader[Any]:
    """The collate function returns an object."""
    return loader(Items(pair), collate_fn=Record)


@table(refused="belongs to the batch")
def batch_scalar() -> DataLoader[Any]:
    """The collate function adds a number of the batch."""
    return loader(Items(pair), collate_fn=lambda s: (*default_collate(s), torch.tensor(1.0)))


@table()
def batched_fetch() -> DataLoader[Any]:
    """The dataset fetches whole batches with ``__getitems__``."""

    class Batched(Items):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self.item(i) for i in indices]

    return loader(Batched(pair))


@table()
def writes_its_sample() -> DataLoader[Any]:
    """The dataset normalises a stored array in place, idempotently."""
    data = values()

    def item(index: int) -> tuple[Tensor, int]:
        row = data[index]
        row.clamp_(-1, 1)
        return row, index % 3

    return loader(Items(item))


class Memo(Items):
    """Keeps what it has loaded, counts its loads, holds a lock."""

    def __init__(self) -> None:
        super().__init__(pair)
        self.kept: dict[int, Any] = {}
        self.loads = 0
        self.lock = threading.Lock()

    def __getitem__(self, index: int) -> Any:
        with self.lock:
            self.loads += 1
            if index not in self.kept:
                self.kept[index] = self.item(index)
            return self.kept[index]


@table()
def memo() -> DataLoader[Any]:
    """A dataset whose attributes change with every access, with a lock among them."""
    return loader(Memo())


@table()
def seeded_by_index() -> DataLoader[Any]:
    """Samples are drawn from a generator seeded by their index."""

    def item(index: int) -> tuple[Tensor, int]:
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(index)), index % 3

    return loader(Items(item))


@table()
def partial_transform() -> DataLoader[Any]:
    """Transforms are partials, lambdas and bound methods."""

    class Scaled(Items):
        def __init__(self) -> None:
            super().__init__(pair)
            self.transform = functools.partial(torch.mul, other=2.0)
            self.more: Callable[[Tensor], Tensor] = lambda x: x + 1
            self.own: Callable[[Tensor], Tensor] = self.shifted

        def shifted(self, x: Tensor) -> Tensor:
            return x - 0.5

        def __getitem__(self, index: int) -> Any:
            x, y = self.item(index)
            return self.own(self.more(self.transform(x))), y

    return loader(Scaled())


@table()
def nested_subsets() -> DataLoader[Any]:
    """A subset of a concatenation of subsets, one sample twice."""
    whole = TensorDataset(values(), labels())
    joined: ConcatDataset[Any] = ConcatDataset([Subset(whole, [3, 1, 4, 1, 5]), Subset(whole, range(8))])
    return loader(Subset(joined, [12, 0, 3, 3, 7, 8, 2]))


@table()
def stacked() -> DataLoader[Any]:
    """A StackDataset."""
    return loader(StackDataset(x=Items(lambda i: values()[i]), y=Items(lambda i: i % 3)))


@table(refused="draws from torch")
def random_noise() -> DataLoader[Any]:
    """Noise from the global generator."""
    return loader(Items(lambda i: (values()[i] + torch.randn(WIDTH), i % 3)))


@table(refused="draws from torch")
def seeds_globally() -> DataLoader[Any]:
    """The dataset seeds the global generator by the index."""

    def item(index: int) -> tuple[Tensor, int]:
        torch.manual_seed(index)
        return torch.randn(WIDTH), index % 3

    return loader(Items(item))


@table(refused="draws from (numpy|random)")
def rare_flip() -> DataLoader[Any]:
    """A flip of one sample in a hundred, from Python's and numpy's generators."""

    def item(index: int) -> tuple[Tensor, int]:
        rare = random.random() < 0.01 or np.random.rand() < 0.01  # noqa: NPY002
        return values()[index].flip(0) if rare else values()[index], index % 3

    return loader(Items(item))


@table(refused="something else every time")
def fresh_generator() -> DataLoader[Any]:
    """A fresh generator of its own for every sample."""
    return loader(Items(lambda i: (torch.as_tensor(np.random.default_rng().normal(size=WIDTH)), i % 3)))


@table(refused=r"draws from dataset\.rng")
def rare_flip_of_its_own_generator() -> DataLoader[Any]:
    """A rare flip from a generator that the dataset keeps: two draws show nothing."""

    class Own(Items):
        def __init__(self) -> None:
            super().__init__(pair)
            self.rng = np.random.default_rng(1)

        def __getitem__(self, index: int) -> Any:
            x, y = self.item(index)
            return (x.flip(0) if self.rng.random() < 0.1 else x), y

    return loader(Own())


@table(refused="something else every time")
def clock() -> DataLoader[Any]:
    """Samples depend on the time."""
    return loader(Items(lambda i: (values()[i] * (time.perf_counter() % 10), i % 3)))


@table(refused="something else every time")
def counting() -> DataLoader[Any]:
    """Samples depend on how often they were asked for."""
    seen = [0]

    def item(index: int) -> tuple[Tensor, int]:
        seen[0] += 1
        return values()[index] + seen[0], index % 3

    return loader(Items(item))


class Staged(Items):
    """A dataset with an epoch, a transform and labels that a user changes between passes."""

    def __init__(self) -> None:
        super().__init__(pair)
        self.epoch = 0
        self.targets = labels()

    def __getitem__(self, index: int) -> Any:
        return values()[index] * (1 + self.epoch), self.targets[index]


def _set_epoch(made: DataLoader[Any], epoch: int) -> None:
    dataset: Any = made.dataset
    dataset.epoch = epoch


def _pseudo_labels(made: DataLoader[Any], epoch: int) -> None:
    dataset: Any = made.dataset
    dataset.targets = (dataset.targets + epoch) % 3


def _pseudo_labels_in_place(made: DataLoader[Any], epoch: int) -> None:
    dataset: Any = made.dataset
    dataset.targets.add_(epoch).remainder_(3)


@table(between=_set_epoch, refused=r"inputs of sample 0 .*set since: dataset\.epoch\)")
def curriculum() -> DataLoader[Any]:
    """``dataset.epoch`` is set before each epoch and changes the samples."""
    return loader(Staged())


@table(between=_pseudo_labels, refused=r"dataset\.targets is not what it was")
def pseudo_labels() -> DataLoader[Any]:
    """Labels are replaced between the epochs."""
    return loader(Staged())


@table(between=_pseudo_labels_in_place, refused=r"dataset\.targets is not what it was")
def pseudo_labels_in_place() -> DataLoader[Any]:
    """Labels are written between the epochs."""
    return loader(Staged())


class Growing(Items):
    """A dataset that grows."""

    def __init__(self) -> None:
        super().__init__(lambda i: (values(40)[i], i % 3))


def _grow(made: DataLoader[Any], epoch: int) -> None:
    dataset: Any = made.dataset
    dataset.count = COUNT + 4 * epoch


@table(between=_grow, refused="there are 18 samples, there were 14")
def growing() -> DataLoader[Any]:
    """The dataset is longer in the second epoch."""
    return loader(Growing())


@table()
def one_sample() -> DataLoader[Any]:
    """A dataset of one sample."""
    return loader(Items(pair, 1))


@table()
def batch_larger_than_dataset() -> DataLoader[Any]:
    """One batch holds everything."""
    return loader(Items(pair), batch_size=50)


@table()
def last_batch_dropped() -> DataLoader[Any]:
    """``drop_last``: rows of samples that were left out are filled in later epochs."""
    return loader(Items(pair), drop_last=True)


@table()
def last_batch_of_one() -> DataLoader[Any]:
    """The last batch has one sample."""
    return loader(Items(pair, 13))


TRAPS, REFUSED = table.traps, table.refused
