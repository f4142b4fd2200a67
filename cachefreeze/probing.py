"""The probe for randomness: datasets and collate functions whose samples no single row can stand for are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import ConcatDataset, Subset

from cachefreeze.batches import leaves_of, lists_samples
from cachefreeze.errors import BatchDependentError, LoaderError, RandomSampleError
from cachefreeze.fingerprint import digest
from cachefreeze.generators import generators_of, preserved_generators, state_of
from cachefreeze.isolation import RandomState, preserved_random_state
from cachefreeze.ragged import evenly

# Samples that are collated together to see whether each has its own row.
_COLLATED = 5


def check_deterministic(dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
    """Refuse a dataset or a collate function that is random.

    A random transform shows itself by moving a random state, the global ones or that of a generator of its own, also
    when the draw changed nothing; two differing draws catch fresh generators. Drawing twice alone misses rare
    transforms.

    Raises:
        RandomSampleError: With a line to paste.
        BatchDependentError: The collate function mixes samples.
        LoaderError: The collate function fails on some samples.
    """
    count = len(dataset)
    some = sorted({0, count // 2, count - 1})
    with preserved_random_state(), preserved_generators(dataset, collate):
        for index in some:
            drawn, equal = drawn_twice(partial(dataset.__getitem__, index), dataset, "dataset")
            if drawn or not equal:
                how = f"draws from {', '.join(drawn)}" if drawn else "returns something else every time"
                raise RandomSampleError(
                    f"dataset[{index}] {how}, so no single row stands for the sample. Cache a deterministic view: "
                    f"{view_line(dataset)}; or several draws of every sample: variants=4; or pass "
                    "assume_deterministic=True if the draw changes nothing"
                )
        items = [dataset[index] for index in evenly(count, _COLLATED)]
        drawn, equal = drawn_twice(partial(_copied, collate, *items), collate, "collate_fn")
        if drawn or not equal:
            how = f", it draws from {', '.join(drawn)}" if drawn else ""
            raise RandomSampleError(
                f"the collate function is random (CutMix, MixUp, masking?){how}, so no single row stands for a sample. "
                "Give the loader a deterministic collate_fn and mix in the training loop; cache several draws of every "
                "sample with variants=4 where it does not mix them; or pass assume_deterministic=True"
            )
        _check_rows_of(collate, items)
        _check_rows_of(collate, items[::-1])  # a batch that is sorted would come in the order of one of the two


def drawn_twice(draw: Callable[[], Any], owner: Any, name: str) -> tuple[list[str], bool]:
    """The random states that two equal draws moved, and whether both gave the same.

    A global state counts when the first draw moves it, a generator of the owner's own when the second does: one that is
    seeded by the sample's index stands where it stood.
    """
    before = RandomState.capture()
    first = digest(draw())
    moved = before.moved()
    own = generators_of(owner, name)  # some are made on the first draw
    states = [state_of(generator) for _, generator in own]
    second = digest(draw())
    moved += [where for (where, generator), state in zip(own, states, strict=True) if state_of(generator) != state]
    return moved, first == second


def collated(collate: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    """What a collate function makes of some items.

    Raises:
        LoaderError: It fails, perhaps since the loader's own batches never are what they are here.
    """
    try:
        return collate(items)
    except Exception as error:  # the user's function may raise anything
        raise LoaderError(
            f"the collate function fails on a batch of {len(items)} samples ({type(error).__name__}: {error}). A row "
            "belongs to every sample and is made beside any others, or alone, so each must come through: leave out "
            "samples that cannot be read in the dataset or the sampler"
        ) from error


def _copied(collate: Callable[[list[Any]], Any], *items: Any) -> Any:
    """A batch of copies: collate functions take items apart."""
    return collated(collate, copies_of(items))


def copies_of(items: Sequence[Any]) -> list[Any]:
    """Copies of a dataset's items that share nothing with it, nor with each other."""
    return [_copy_of(item) for item in items]


def _copy_of(item: Any) -> Any:
    """A deep copy; of a tensor that is a part of a larger one, without the memory of all other samples."""
    leaves = [leaf for leaf in pytree.tree_leaves(item) if type(leaf) is Tensor and not leaf.requires_grad]
    parts = {id(leaf): leaf.clone() for leaf in leaves if _is_part(leaf)}
    return copy.deepcopy(item, parts)


def _is_part(tensor: Tensor) -> bool:
    try:
        return tensor.untyped_storage().nbytes() > tensor.nbytes
    except (RuntimeError, NotImplementedError):  # a sparse one has no memory of its own
        return False


def _check_rows_of(collate: Callable[[list[Any]], Any], items: list[Any]) -> None:
    """Row *i* of a batch must be item *i*, whatever the others are."""
    batch = _copied(collate, *items)
    together = leaves_of(batch)
    for position, item in enumerate(items):
        pair = _copied(collate, item, item)
        if lists_samples(batch, len(items)) and lists_samples(pair, 2):
            if digest(_entries(batch, position)) != digest(_entries(pair, 0)):
                _refuse_mixing()
            continue
        alone = leaves_of(pair)
        for one, many in zip(alone, together, strict=False):
            rows = isinstance(one, Tensor) and isinstance(many, Tensor) and one.dim() and many.dim()
            if rows and (len(one), len(many)) == (2, len(items)) and not same_row(one[0], many[position]):
                _refuse_mixing()


def _entries(batch: Any, position: int) -> list[Any]:
    """What lists with one entry a sample have for one sample."""
    return [entries[position] for entries in (batch.values() if isinstance(batch, Mapping) else batch)]


def _refuse_mixing() -> NoReturn:
    raise BatchDependentError(
        "the collate function makes a sample depend on the others of its batch, or does not keep their order, so no "
        "single row stands for it. Give the loader a collate_fn that only stacks or pads, and mix or sort in the "
        "training loop"
    )


def view_line(dataset: Any) -> str:
    """A line to paste: the user's own pipeline with its random steps replaced or left out."""
    transform = _transform_of(dataset)
    steps = list(getattr(transform, "transforms", [transform] if transform is not None else []))
    if not steps:
        return "view=<the same dataset without its random steps>"
    written = [text for step in steps for text in _deterministic(step)]
    return f"view=Compose([{', '.join(written)}])" if written else "view=<a deterministic transform>"


def same_row(a: Any, b: Any) -> bool:
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
