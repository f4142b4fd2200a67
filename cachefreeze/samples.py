"""What a sample is: the fields of a batch, the deterministic view of a dataset, the probe for randomness."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from cachefreeze.batches import BatchLayout, Inputs, leaves_of
from cachefreeze.errors import BatchDependentError, RandomSampleError, UsageError
from cachefreeze.fingerprint import digest
from cachefreeze.isolation import RandomState, preserved_random_state
from cachefreeze.padding import Padded
from cachefreeze.ragged import RaggedSamples, evenly, measure, varying
from cachefreeze.tracing import Example


@dataclass(frozen=True)
class View:
    """The deterministic samples behind a loader, as they are collated.

    Attributes:
        dataset: The dataset whose sample *i* row *i* stands for.
        collate_fn: The user's collate function.
        layout: The fields of a batch.
        ragged: How long each sample is, where samples have different lengths.
    """

    dataset: Any
    collate_fn: Callable[[list[Any]], Any]
    layout: BatchLayout
    ragged: RaggedSamples | None = None

    @classmethod
    def of(
        cls,
        dataloader: DataLoader[Any],
        arguments: Sequence[str],
        *,
        inputs: Inputs = None,
        view: Any = None,
        assume_deterministic: bool = False,
        padded: frozenset[tuple[int, int]] = frozenset(),
    ) -> View:
        """Take the samples of a DataLoader, or of ``view``, and refuse what no single row can stand for.

        Args:
            dataloader: The user's loader.
            arguments: Names of the arguments of the model's forward.
            inputs: What the model consumes; see :class:`cachefreeze.batches.BatchLayout`.
            view: A deterministic transform or dataset in place of the loader's own.
            assume_deterministic: Skip the probe for randomness.
            padded: Input leaves and their dimensions that are known to be padded.
        """
        dataset = deterministic_view(dataloader.dataset, view)
        collate: Any = dataloader.collate_fn
        if not assume_deterministic:
            check_deterministic(dataset, collate)
        with preserved_random_state():
            batch = collate_samples(dataset, collate, _first(dataset))
        layout = BatchLayout(batch, inputs, arguments, stored=False)
        padded |= varying(lambda index: collate_samples(dataset, collate, [index]), layout, len(dataset))
        if padded:
            samples = measure(lambda some: fetch_samples(dataset, some), collate, layout, len(dataset), padded)
            made = cls(dataset, collate, layout, samples)
        else:
            made = cls(dataset, collate, BatchLayout(batch, inputs, arguments))
        check_batch_dims(made)
        return made

    def __len__(self) -> int:
        return len(self.dataset)

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

    def fields(self) -> list[tuple[str, Tensor]]:
        """Path of every stored field, and its values for a few samples."""
        values = self.layout.field_tensors(self.fetch(_first(self.dataset)))
        return list(zip(self.layout.field_names, values, strict=True))

    def identity(self) -> dict[str, str]:
        """Fingerprint fields of the data: what the dataset is made of, and the content of some samples.

        Files on disk are known by relative path, size and time of modification: an edit that keeps all three, in a
        sample that is not among those digested here, goes unnoticed. Where samples have different lengths, all of
        them are read and digested, as items and as they are collated.
        """
        if self.ragged is not None:
            return self.ragged.identity
        count = len(self)
        some = evenly(count, _DIGESTED)
        batch = self.fetch(some)
        consumed = self.layout.example(batch)
        return {
            "samples": f"{count}",
            "inputs": digest((consumed.args, consumed.kwargs)),
            "labels": digest([self.layout.field_tensors(batch), _labels(self.dataset)]),
            "dataset": digest(_described(self.dataset)),
            "collate": digest(self.collate_fn),
        }


# Samples whose content enters the fingerprint, evenly spread over the dataset.
_DIGESTED = 8
# Samples that are collated together to see whether each has its own row.
_COLLATED = 5


def _first(dataset: Any) -> list[int]:
    count = len(dataset)
    return [0, 1 % count, 2 % count]


def collate_samples(dataset: Any, collate: Callable[[list[Any]], Any], indices: Sequence[int]) -> Any:
    """What a DataLoader's fetcher does for one batch of indices."""
    return collate(fetch_samples(dataset, indices))


def fetch_samples(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """The dataset's items of some indices, fetched as a DataLoader does."""
    batched = getattr(dataset, "__getitems__", None)
    return list(batched(list(indices))) if batched else [dataset[i] for i in indices]


def check_batch_dims(view: View) -> None:
    """Every tensor of a batch must have one row per sample in its first dimension.

    Raises:
        BatchDependentError: A field has another number of rows, so it belongs to the batch and not to samples.
    """
    layout = view.layout
    for count in (2, 3):
        batch = view.fetch(_first(view.dataset)[:count])
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


def check_deterministic(dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
    """Refuse a dataset or a collate function that is random.

    A random transform shows itself by moving a random state, also when the draw changed nothing; two differing
    draws catch generators of its own. Drawing twice alone misses rare transforms.

    Raises:
        RandomSampleError: With a line to paste.
        BatchDependentError: The collate function mixes samples.
    """
    count = len(dataset)
    some = sorted({0, count // 2, count - 1})
    with preserved_random_state():
        for index in some:
            before = RandomState.capture()
            first = dataset[index]
            moved = before.moved()
            second = dataset[index]
            if moved or digest(first) != digest(second):
                how = f"draws from {', '.join(moved)}" if moved else "returns something else every time"
                raise RandomSampleError(
                    f"dataset[{index}] {how}, so no single row stands for the sample. Cache a deterministic view: "
                    f"{view_line(dataset)}; or pass assume_deterministic=True if the draw changes nothing"
                )
        items = [dataset[index] for index in evenly(count, _COLLATED)]
        before = RandomState.capture()
        together = collate(copy.deepcopy(items))
        moved = before.moved()
        again = collate(copy.deepcopy(items))
        if moved or digest(together) != digest(again):
            raise RandomSampleError(
                "the collate function is random (CutMix, MixUp, masking?), so no single row stands for a sample. Give "
                "the loader a deterministic collate_fn and mix in the training loop; or pass assume_deterministic=True"
            )
        _check_rows_of(collate, items)
        _check_rows_of(collate, items[::-1])  # a batch that is sorted would come in the order of one of the two


def _check_rows_of(collate: Callable[[list[Any]], Any], items: list[Any]) -> None:
    """Row *i* of a batch must be item *i*, whatever the others are."""
    together = leaves_of(collate(copy.deepcopy(items)))
    for position, item in enumerate(items):
        alone = leaves_of(collate([copy.deepcopy(item), copy.deepcopy(item)]))
        for one, many in zip(alone, together, strict=False):
            rows = isinstance(one, Tensor) and isinstance(many, Tensor) and one.dim() and many.dim()
            if rows and (len(one), len(many)) == (2, len(items)) and not _same_row(one[0], many[position]):
                raise BatchDependentError(
                    "the collate function makes a sample depend on the others of its batch, or does not keep their "
                    "order, so no single row stands for it. Give the loader a collate_fn that only stacks or pads, and "
                    "mix or sort in the training loop"
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


def view_line(dataset: Any) -> str:
    """A line to paste: the user's own pipeline with its random steps replaced or left out."""
    transform = _transform_of(dataset)
    steps = list(getattr(transform, "transforms", [transform] if transform is not None else []))
    if not steps:
        return "view=<the same dataset without its random steps>"
    written = [text for step in steps for text in _deterministic(step)]
    return f"view=Compose([{', '.join(written)}])" if written else "view=<a deterministic transform>"


def _same_row(a: Any, b: Any) -> bool:
    """Equal up to padding on either side: the common part, from the front or from the back, is equal."""
    if a.dim() != b.dim():
        return False
    sizes = [min(x, y) for x, y in zip(a.shape, b.shape, strict=True)]
    front = tuple(slice(0, size) for size in sizes)
    back = [tuple(slice(have - size, have) for have, size in zip(t.shape, sizes, strict=True)) for t in (a, b)]
    return torch.equal(a[front], b[front]) or torch.equal(a[back[0]], b[back[1]])


def _transform_of(dataset: Any) -> Any:
    inner = dataset.datasets[0] if isinstance(dataset, ConcatDataset) else dataset
    while isinstance(inner, Subset):
        inner = inner.dataset
    return getattr(inner, "transform", None)


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


# Random steps of torchvision's transforms and what stands for them in a deterministic view.
_LEFT_OUT = {"ColorJitter", "AutoAugment", "RandAugment", "TrivialAugmentWide", "AugMix", "ElasticTransform"}


def _deterministic(step: Any) -> list[str]:
    name = type(step).__name__
    if name == "RandomResizedCrop":
        size = step.size[0] if isinstance(step.size, tuple | list) else step.size
        return [f"Resize({round(size * 256 / 224)})", f"CenterCrop({size})"]
    if name == "RandomCrop":
        size = step.size[0] if isinstance(step.size, tuple | list) else step.size
        return [f"CenterCrop({size})"]
    if name.startswith("Random") or name in _LEFT_OUT:
        return []
    if name in ("Resize", "CenterCrop"):
        size = step.size[0] if isinstance(step.size, tuple | list) and len(set(step.size)) == 1 else step.size
        return [f"{name}({size})"]
    if name == "Normalize":
        return [f"Normalize({tuple(step.mean)}, {tuple(step.std)})"]
    if hasattr(step, "__name__"):
        return [step.__name__]
    text = repr(step)
    return [f"{name}()" if text.startswith("<") or "\n" in text else text]


def _labels(dataset: Any) -> Any:
    """All labels, where a dataset lists them; the samples digested stand for the others."""
    if isinstance(dataset, Subset):
        inner = _labels(dataset.dataset)
        return None if inner is None else (inner, list(dataset.indices))
    return getattr(dataset, "targets", getattr(dataset, "labels", None))


def _described(dataset: Any) -> Any:
    """What a dataset is made of, without the folder it lies in."""
    if isinstance(dataset, Subset):
        return ("Subset", list(dataset.indices), _described(dataset.dataset))
    if isinstance(dataset, ConcatDataset):
        return ("ConcatDataset", [_described(inner) for inner in dataset.datasets])
    state = dict(vars(dataset)) if hasattr(dataset, "__dict__") else {}
    files = [value for value in state.values() if _lists_files(value)]
    root = state.get("root")
    kept = {
        name: value
        for name, value in state.items()
        if not _lists_files(value) and name not in ("root", "targets", "labels") and not _is_path(value)
    }
    return (type(dataset).__qualname__, kept, [_file_facts(listing, root) for listing in files])


def _is_path(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, str) and value.startswith(("/", "./", "../")))


def _lists_files(value: Any) -> bool:
    """A list of paths, or of (path, label) as torchvision's folders keep them."""
    if not isinstance(value, list | tuple) or not value:
        return False
    first = value[0][0] if isinstance(value[0], tuple | list) and value[0] else value[0]
    return isinstance(first, str | Path) and Path(first).is_file()


def _file_facts(listing: Sequence[Any], root: Any) -> list[Any]:
    facts: list[Any] = []
    for item in listing:
        path = Path(item[0] if isinstance(item, tuple | list) else item)
        rest = item[1:] if isinstance(item, tuple | list) else ()
        try:
            status = path.stat()
            shown = path.relative_to(root) if root is not None else Path(path.name)
        except (OSError, ValueError):
            facts.append((path.name, rest))
            continue
        facts.append((shown.as_posix(), status.st_size, status.st_mtime_ns, rest))
    return facts


def is_map_style(dataset: Dataset[Any]) -> bool:
    """Whether samples have indices, so that a row can belong to one."""
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
