"""What a sample is: the deterministic view of a dataset, and what of it enters the fingerprint."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from cachefreeze.batches import BatchLayout, Inputs, joined, lists_samples
from cachefreeze.errors import BatchDependentError, UsageError
from cachefreeze.fingerprint import digest
from cachefreeze.generators import preserved_generators
from cachefreeze.isolation import preserved_random_state
from cachefreeze.listed_samples import ListedSamples, measure_lists
from cachefreeze.padding import Padded, input_leaves
from cachefreeze.probing import check_deterministic, collated, copies_of
from cachefreeze.ragged import RaggedSamples, evenly, measure, varying
from cachefreeze.sample_keys import Keyed, described, keyed, listed_labels
from cachefreeze.sides import Place
from cachefreeze.tracing import Example
from cachefreeze.variants import Turns, Variants, draw_variants


@dataclass(frozen=True)
class View:
    """The deterministic samples behind a loader, as they are collated.

    Attributes:
        dataset: The dataset whose sample *i* row *i* stands for.
        collate_fn: The user's collate function.
        layout: The fields of a batch.
        ragged: How long each sample is, where samples have different lengths.
        source: The loader's own dataset; another one under ``view=``.
        listed: The items, where batches are lists with one entry a sample.
        turns: Which of its rows stands for a sample in an epoch, where each has several (``variants=``).
    """

    dataset: Any
    collate_fn: Callable[[list[Any]], Any]
    layout: BatchLayout
    ragged: RaggedSamples | None = None
    source: Any = None
    listed: ListedSamples | None = None
    turns: Turns | None = None

    @classmethod
    def of(
        cls,
        dataloader: DataLoader[Any],
        arguments: Sequence[str],
        *,
        inputs: Inputs = None,
        view: Any = None,
        assume_deterministic: bool = False,
        variants: int | None = None,
        seed: int = 0,
        padded: frozenset[Place] = frozenset(),
    ) -> View:
        """Take the samples of a DataLoader, or of ``view``, and refuse what no single row can stand for.

        Args:
            dataloader: The user's loader.
            arguments: Names of the arguments of the model's forward.
            inputs: What the model consumes; see :class:`cachefreeze.batches.BatchLayout`.
            view: A deterministic transform or dataset in place of the loader's own.
            assume_deterministic: Skip the probe for randomness.
            variants: Seeded draws of every sample in place of one.
            seed: Of the draws.
            padded: Input leaves and their dimensions that are known to be padded in other loaders.
        """
        if variants is not None:
            if view is not None or assume_deterministic:
                other = "view=" if view is not None else "assume_deterministic=True"
                raise UsageError(
                    f"variants= caches random draws and {other} says that there are none: give one of them"
                )
            return cls._of_variants(dataloader, arguments, inputs, variants, seed)
        dataset = deterministic_view(dataloader.dataset, view)
        collate: Any = dataloader.collate_fn
        if not assume_deterministic:
            check_deterministic(dataset, collate)
        with preserved_random_state():
            batch = collate_samples(dataset, collate, _first(dataset))
            # a list of three entries may be of three fields
            listed = lists_samples(batch, 3) and lists_samples(collate_samples(dataset, collate, [0]), 1)
        if listed:
            layout = BatchLayout(batch, inputs, arguments, stored=False, listed=True)
            items = measure_lists(lambda some: fetch_samples(dataset, some), collate, layout, len(dataset))
            return cls(dataset, collate, layout, listed=items)
        layout = BatchLayout(batch, inputs, arguments, stored=False)
        dims = [leaf.dim() if isinstance(leaf, Tensor) else 0 for leaf in input_leaves(layout.example(batch))]
        padded = frozenset((leaf, dim) for leaf, dim in padded if leaf < len(dims) and dim < dims[leaf])
        padded |= varying(lambda index: collate_samples(dataset, collate, [index]), layout, len(dataset))
        if padded:
            samples = measure(lambda some: fetch_samples(dataset, some), collate, layout, len(dataset), padded)
            made = cls(dataset, collate, layout, samples, dataloader.dataset)
        else:
            made = cls(dataset, collate, BatchLayout(batch, inputs, arguments), source=dataloader.dataset)
        check_batch_dims(made, batch)
        return made

    @classmethod
    def _of_variants(
        cls, dataloader: DataLoader[Any], arguments: Sequence[str], inputs: Inputs, count: int, seed: int
    ) -> View:
        """The draws of a random loader's samples, each a row of its own."""
        source: Any = dataloader.dataset
        collate: Any = dataloader.collate_fn
        drawn = draw_variants(source, collate, count, seed)
        layout = BatchLayout(drawn[0], inputs, arguments)
        if varying(lambda row: drawn[row], layout, len(drawn)):
            raise UsageError(
                "variants= is for samples of one size, and draws of these differ in theirs: crop or pad to one size in "
                "the dataset or the collate function"
            )
        made = cls(drawn, joined, layout, source=source, turns=Turns(len(source), count, seed))
        check_batch_dims(made, made.fetch(_first(drawn)))
        return made

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def samples(self) -> int:
        """How many samples there are; each has one row, or as many as it has variants."""
        return len(self) if self.turns is None else self.turns.samples

    @property
    def padded(self) -> frozenset[Place]:
        """Input leaves and their dimensions in which samples differ."""
        return frozenset() if self.ragged is None else frozenset(p for axis in self.ragged.axes for p in axis.places)

    @property
    def kind(self) -> str:
        """What batches give the model: all loaders of a split give it the same."""
        if self.listed is not None:
            return "lists with one entry a sample"
        return "samples of one shape" if self.ragged is None else f"{', '.join(self.layout.input_names)}, padded"

    def fetch(self, rows: Sequence[int], collate: Callable[[list[Any]], Any] | None = None) -> Any:
        """The collated raw batch of some samples. Random states are as before afterwards.

        Args:
            rows: Indices of the samples.
            collate: In place of the user's collate function.
        """
        with preserved_random_state():
            return collate_samples(self.dataset, collate or self.collate_fn, rows)

    def example(self) -> Example:
        """The model's inputs for a few samples (at least two rows)."""
        rows = _first(self.dataset) if self.ragged is None else self.ragged.batches()[0]
        return self.layout.example(self.fetch(rows))

    def padded_batches(self, device: torch.device) -> list[tuple[Padded, list[int]]]:
        """Batches of samples of different lengths, to split and to verify with, and the samples in them."""
        assert self.ragged is not None
        made = []
        for rows in self.ragged.batches():
            batch = self.ragged.padded(self.fetch(rows), rows)
            made.append((replace(batch, example=batch.example.to(device)), rows))
        return made

    @cached_property
    def made_of(self) -> Keyed | None:
        """What the samples are made of, one by one, when this was first asked; None where that cannot be told."""
        single = self.ragged is None and self.listed is None and self.turns is None
        return keyed(self.dataset) if single else None

    def identity(self) -> dict[str, str]:
        """Fingerprint fields of the data: what the dataset is made of, and the content of some samples.

        Files on disk are known by relative path, size and time of modification: an edit that keeps all three, in a
        sample that is not among those digested here, goes unnoticed. Where samples have different lengths, or
        are listed, all of them are read and digested. :data:`OF_ROWS` names the fields that speak of single samples.
        """
        if self.ragged is not None:
            return self.ragged.identity
        if self.listed is not None:
            return self.listed.identity
        count = len(self)
        batch = self.fetch(evenly(count, _DIGESTED))
        made_of = self.made_of
        consumed = self.layout.example(batch)
        drawn = self.dataset if isinstance(self.dataset, Variants) else None
        dataset, collate = (self.dataset, self.collate_fn) if drawn is None else (drawn.dataset, drawn.collate_fn)
        return {
            "samples": f"{count}" if drawn is None else f"{len(dataset)}, {drawn.count} variants, seed {drawn.seed}",
            "inputs": digest((consumed.args, consumed.kwargs)),
            "labels": digest([self.layout.field_tensors(batch), listed_labels(dataset)]),
            "dataset": digest(described(dataset) if made_of is None else made_of.rest),
            "collate": digest(collate),
            **({} if made_of is None else {"rows": digest(made_of.keys)}),
        }


# Samples whose content enters the fingerprint, evenly spread over the dataset.
_DIGESTED = 8
# Fields of the fingerprint that a change of single samples changes, where every row says what it was made from.
OF_ROWS = frozenset({"inputs", "labels", "rows"})


def example_of(dataloader: DataLoader[Any], arguments: Sequence[str], inputs: Inputs) -> Example:
    """A few samples as the model's inputs, of a loader that is not cached. Random states are as before afterwards.

    Args:
        dataloader: The user's loader.
        arguments: Names of the arguments of the model's forward.
        inputs: What the model consumes.
    """
    dataset: Any = dataloader.dataset
    with preserved_random_state(), preserved_generators(dataset, dataloader.collate_fn):
        batch = collate_samples(dataset, dataloader.collate_fn, _first(dataset))
    return BatchLayout(batch, inputs, arguments, stored=False).example(batch)


def alike_example_of(dataloader: DataLoader[Any], arguments: Sequence[str], inputs: Inputs) -> tuple[Example, float]:
    """:func:`example_of` with three samples, each of the same shape alone as beside the others.

    Returns:
        The samples, and seconds that a sample took to fetch.

    Raises:
        BatchDependentError: They are not alike.
    """
    dataset: Any = dataloader.dataset
    collate: Any = dataloader.collate_fn
    with preserved_random_state(), preserved_generators(dataset, collate):
        began = time.perf_counter()
        items = fetch_samples(dataset, _first(dataset))
        fetched = time.perf_counter() - began
        single = [collated(collate, [item]) for item in copies_of(items)]
        began = time.perf_counter()
        batch = collated(collate, items)
        fetched += time.perf_counter() - began
    layout = BatchLayout(batch, inputs, arguments, stored=False)
    example = layout.example(batch)
    if any(_shapes_of(layout.example(one)) != _shapes_of(example) for one in single):
        raise BatchDependentError("samples have different shapes, or are lists")
    return example, fetched / len(items)


def _shapes_of(example: Example) -> tuple[Any, list[Any]]:
    """What a batch is made of, but for the number of its samples."""
    leaves, structure = pytree.tree_flatten((example.args, example.kwargs))
    return structure, [leaf.shape[1:] if isinstance(leaf, Tensor) else None for leaf in leaves]


def _first(dataset: Any) -> list[int]:
    count = len(dataset)
    return [0, 1 % count, 2 % count]


def collate_samples(dataset: Any, collate: Callable[[list[Any]], Any], indices: Sequence[int]) -> Any:
    """What a DataLoader's fetcher does for one batch of indices."""
    return collated(collate, fetch_samples(dataset, indices))


def fetch_samples(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """The dataset's items of some indices, fetched as a DataLoader does."""
    batched = getattr(dataset, "__getitems__", None)
    return list(batched(list(indices))) if batched else [dataset[i] for i in indices]


def check_batch_dims(view: View, three: Any) -> None:
    """Every tensor of a batch must have one row per sample in its first dimension.

    Args:
        view: Whose batches.
        three: The batch of the first three samples; that of two is fetched.

    Raises:
        BatchDependentError: A field has another number of rows, so it belongs to the batch and not to samples.
    """
    layout = view.layout
    for count, batch in ((2, view.fetch(_first(view.dataset)[:2])), (3, three)):
        example = layout.example(batch)
        consumed = [leaf for leaf in pytree.tree_leaves((example.args, example.kwargs)) if isinstance(leaf, Tensor)]
        named: list[tuple[str, Tensor]] = []
        if view.ragged is None:  # else what is not consumed is the user's own in every batch
            named += zip(layout.field_names, layout.field_tensors(batch), strict=True)
        named += [(str(layout.consumed[0]), leaf) for leaf in consumed]
        for name, leaf in named:
            if leaf.dim() == 0 or leaf.shape[0] != count:
                raise BatchDependentError(
                    f"field {name!r} has shape {tuple(leaf.shape)} for a batch of {count} samples: it belongs to the "
                    "batch, not to its samples, so it cannot be cached; make it in the training loop instead"
                )


def deterministic_view(dataset: Any, view: Any) -> Any:
    """The dataset whose samples are cached: ``view`` itself, or ``dataset`` with ``view`` as its transform.

    Raises:
        UsageError: ``view`` is neither a dataset of the same length nor a transform that can be put in place.
    """
    if view is None:
        return dataset
    if hasattr(view, "__getitem__") and hasattr(view, "__len__"):
        if len(view) != len(dataset):
            raise UsageError(
                f"view= has {len(view)} samples, the dataset {len(dataset)}: view[i] must be the same sample as "
                "dataset[i]"
            )
        return view
    if not callable(view):
        raise UsageError(f"view={type(view).__name__}: expected a deterministic transform or a dataset of equal length")
    return _with_transform(dataset, view)


def _with_transform(dataset: Any, transform: Any) -> Any:
    made = copy.copy(dataset)
    if isinstance(dataset, Subset):
        made.dataset = _with_transform(dataset.dataset, transform)
        return made
    if isinstance(dataset, ConcatDataset):
        made.datasets = [_with_transform(inner, transform) for inner in dataset.datasets]
        return made
    if not hasattr(dataset, "transform"):
        raise UsageError(
            f"view= is a transform, but {type(dataset).__name__} has no attribute 'transform' to put it in; pass a "
            "dataset of the same samples instead: view=MyDataset(..., transform=deterministic)"
        )
    made.transform = transform
    both = getattr(dataset, "transforms", None)
    if both is not None and hasattr(both, "target_transform"):  # torchvision's VisionDataset calls this one
        made.transforms = type(both)(transform, both.target_transform)
    return made


def is_map_style(dataset: Dataset[Any]) -> bool:
    """Whether samples have indices, so that a row can belong to one."""
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
