"""Traps of samplers and collate functions: which samples come when, and what becomes of them in a batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from cachefreeze.testing.loader_table import COUNT, Items, LoaderTable, labels, loader, pair, values

table = LoaderTable()


@table()
def weighted_sampler() -> DataLoader[Any]:
    """Samples repeat within a batch."""
    return loader(Items(pair), shuffle=None, sampler=WeightedRandomSampler([1.0, 9.0] * (COUNT // 2), 20))


@table()
def subset_sampler() -> DataLoader[Any]:
    """A sampler over some of the samples."""
    return loader(Items(pair), shuffle=None, sampler=SubsetRandomSampler([9, 3, 5, 1, 0]))


@table()
def sampler_of_numpy_integers() -> DataLoader[Any]:
    """Indices are numpy integers."""
    return loader(Items(pair), shuffle=None, sampler=list(np.random.default_rng(0).permutation(COUNT)))


@table()
def sampler_of_tensors() -> DataLoader[Any]:
    """Indices are tensors without dimensions."""
    return loader(Items(pair), shuffle=None, sampler=list(torch.arange(COUNT).flip(0)))


@table(refused="asked for sample -14 of a dataset of 14")
def negative_indices() -> DataLoader[Any]:
    """A sampler counts from the end."""
    return loader(Items(pair), shuffle=None, sampler=list(range(-COUNT, 0)))


class Curriculum(BatchSampler):
    """Batches that grow, with fresh order each epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(COUNT).tolist()
        size = 2
        while order:
            yield order[:size]
            order = order[size:]
            size += 1


@table()
def growing_batches() -> DataLoader[Any]:
    """A batch sampler of the user's own with batches of two, three, four samples."""
    return DataLoader(Items(pair), batch_sampler=Curriculum(RandomSampler(range(COUNT)), 4, drop_last=False))


@table()
def numpy_shuffled_sampler() -> DataLoader[Any]:
    """A batch sampler that draws from numpy and Python."""

    class Drawn(BatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            order = np.random.permutation(COUNT).tolist()  # noqa: NPY002
            random.shuffle(order)
            yield from (order[at : at + 5] for at in range(0, COUNT, 5))

        def __len__(self) -> int:
            return 3

    return DataLoader(Items(pair), batch_sampler=Drawn(RandomSampler(range(COUNT)), 5, drop_last=False))


@table()
def one_shot_batches() -> DataLoader[Any]:
    """Batches come from a list of lists."""
    return DataLoader(Items(pair), batch_sampler=[[3, 1], [0, 2, 5], [4, 4]])


@table(refused="sample 's0': expected an index")
def string_keys() -> DataLoader[Any]:
    """Samples are known by strings."""
    names = {f"s{i}": i for i in range(COUNT)}

    class Named(Items):
        def __getitem__(self, key: Any) -> Any:
            return self.item(names[key] if isinstance(key, str) else key)

    return loader(Named(pair), shuffle=None, sampler=list(names))


@table(refused="sample '3': expected an index")
def numerals() -> DataLoader[Any]:
    """Samples are known by strings that look like indices, and are others."""

    class Named(Items):
        def __getitem__(self, key: Any) -> Any:
            return self.item(COUNT - 1 - int(key))

    return loader(Named(pair), shuffle=None, sampler=list("3571"))


@table(refused=r"sample \(0, 1\): expected an index")
def tuple_keys() -> DataLoader[Any]:
    """The sampler hands over an index and a size (multi-scale training)."""

    class Scaled(Items):
        def __getitem__(self, key: Any) -> Any:
            index, scale = key if isinstance(key, tuple) else (key, 1)
            x, y = self.item(index)
            return x * scale, y

    return loader(Scaled(pair), shuffle=None, sampler=[(i, 1 + i % 2) for i in range(COUNT)])


@table(refused="asked for sample 14 of a dataset of 14")
def index_beyond_the_end() -> DataLoader[Any]:
    """A sampler reaches beyond the dataset's length."""
    return loader(Items(lambda i: (values(40)[i], i % 3)), shuffle=None, sampler=range(20))


@table()
def collate_by_hand() -> DataLoader[Any]:
    """A collate function that stacks."""
    return loader(Items(pair), collate_fn=lambda s: (torch.stack([x for x, _ in s]), torch.stack([y for _, y in s])))


@table(refused="depend on the others|order")
def collate_sorts() -> DataLoader[Any]:
    """The collate function sorts its samples, the largest first; the first samples of the dataset are in order."""

    def collate(samples: list[Any]) -> Any:
        return default_collate(sorted(samples, key=lambda s: -float(s[0][0])))

    ordered = values()[values()[:, 0].argsort(descending=True)]
    return loader(Items(lambda i: (ordered[i], i % 3)), collate_fn=collate)


def _readable(samples: list[Any]) -> Any:
    """Leaves out samples that could not be read."""
    return default_collate([s for s in samples if s is not None])


@table(refused="fails on a batch of 1 samples")
def collate_drops() -> DataLoader[Any]:
    """The collate function leaves out a sample that could not be read, which the probe meets."""
    return loader(Items(lambda i: None if i == 9 else pair(i)), collate_fn=_readable)


@table(refused=r"made 3 rows of the 4 samples \[.*9.*\]")
def collate_drops_late() -> DataLoader[Any]:
    """The same, where no probe meets that sample."""
    return loader(Items(lambda i: None if i == 9 else (values(40)[i], i % 3), 40), collate_fn=_readable)


@table(refused="belongs to the batch|samples|rows")
def collate_repeats() -> DataLoader[Any]:
    """The collate function hands out every sample twice."""
    return loader(Items(pair), collate_fn=lambda s: default_collate([*s, *s]))


@table(refused="random")
def collate_mixes() -> DataLoader[Any]:
    """MixUp in the collate function."""

    def collate(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        share = torch.rand(())
        return share * x + (1 - share) * x.roll(1, 0), y

    return loader(Items(pair), collate_fn=collate)


@table(refused="depend on the others")
def collate_normalises() -> DataLoader[Any]:
    """The collate function normalises by the batch."""

    def collate(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return (x - x.mean(0)) / (x.std(0) + 1), y

    return loader(Items(pair), collate_fn=collate)


@table()
def workers() -> DataLoader[Any]:
    """Two workers, a worker_init_fn that seeds, a generator of the loader's own."""
    return loader(
        TensorDataset(values(), labels()),
        num_workers=2,
        worker_init_fn=random.seed,
        generator=torch.Generator().manual_seed(3),
    )


TRAPS, REFUSED = table.traps, table.refused
