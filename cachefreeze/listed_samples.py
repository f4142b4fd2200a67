"""Samples that a collate function only lists, as for detectors: ``lambda batch: tuple(zip(*batch))``.

Nothing of such a batch has a row a sample. What is kept beside a sample's activations is its item, with the size of the
image in place of the image; of such items the user's collate function makes every later batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.utils import _pytree as pytree

from cachefreeze.batches import BatchLayout, lists_samples
from cachefreeze.errors import BatchDependentError, FieldError
from cachefreeze.fingerprint import digest, tensor_bytes
from cachefreeze.isolation import preserved_random_state
from cachefreeze.items import ItemCodec, is_plain
from cachefreeze.listed import SampleLists

# Items fetched at a time where a dataset has ``__getitems__``: images of one batch are in memory.
_CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class ListedSamples:
    """The items of a dataset, as read once.

    Attributes:
        codec: Between items without pixels and their bytes.
        collate: The user's collate function.
        layout: What the model consumes of a batch.
        at: Which leaf of an item is its image.
        dtype: Of the images.
        item_bytes: (samples,) int64.
        identity: Fingerprint fields: every byte of every item, images included.
    """

    codec: ItemCodec
    collate: Callable[[list[Any]], Any]
    layout: BatchLayout
    at: int
    dtype: torch.dtype
    item_bytes: Tensor
    identity: dict[str, str]

    def encode(self, item: Any) -> bytes:
        """The bytes of an item without its pixels."""
        return self.codec.encode(_without_pixels(item, self.at))

    def batch(self, items: list[Any]) -> Any:
        """The user's own batch. Random states are as before afterwards.

        Raises:
            BatchDependentError: The collate function does more than listing its items.
        """
        return _collated(items, self.collate, self.layout, self.at)

    def batch_of_sizes(self, data: Sequence[bytes]) -> Any:
        """The user's batch of stored items, with sizes in place of images."""
        return self.sized(self.batch([self._with_size(self.codec.decode(item)) for item in data]))

    def sized(self, batch: Any) -> Any:
        """A batch with sizes in place of its images."""
        images = self.layout.lists(batch).images
        sizes = [list(image.shape) for image in images]
        return self.layout.replace(batch, lambda entries: sizes if entries is images else entries)

    def given(self, batch: Any) -> SampleLists:
        """What the suffix takes of a batch with sizes in place of images."""
        lists = self.layout.lists(batch)
        sizes: Any = lists.images
        images = [torch.empty(size, dtype=self.dtype, device="meta") for size in sizes]
        return lists.with_images(images)

    def _with_size(self, item: Any) -> Any:
        leaves, tree = pytree.tree_flatten(item, is_leaf=is_plain)
        leaves[self.at] = torch.empty(leaves[self.at], dtype=self.dtype, device="meta")
        return pytree.tree_unflatten(leaves, tree)


def measure_lists(
    fetch: Callable[[Sequence[int]], list[Any]], collate: Callable[[list[Any]], Any], layout: BatchLayout, count: int
) -> ListedSamples:
    """Read every item once. Random states are as before afterwards.

    Args:
        fetch: Items of some indices, as the dataset gives them.
        collate: The user's collate function.
        layout: What the model consumes.
        count: Samples of the dataset.

    Raises:
        FieldError: An item cannot be kept, or its image is not a tensor of the item, alike in all of them.
        BatchDependentError: The collate function does more than listing its items.
    """
    state, sizes = xxhash.xxh3_128(), []
    with preserved_random_state():
        first = fetch([0])[0]
        at = _image_of(first, collate, layout)
        dtype = _leaves(first)[at].dtype
        codec = ItemCodec(_without_pixels(first, at))
        for start in range(0, count, _CHUNK):
            items = fetch(range(start, min(start + _CHUNK, count)))
            _collated(items, collate, layout, at)
            for index, item in enumerate(items, start):
                image = _leaves(item)[at]
                if image.dtype != dtype:
                    raise FieldError(
                        f"the image of sample {index} is {image.dtype}, that of sample 0 {dtype}; convert all images "
                        "to one dtype in the dataset"
                    )
                data = codec.encode(_without_pixels(item, at))
                sizes.append(len(data))
                state.update(len(data).to_bytes(8, "little") + data)
                state.update(tensor_bytes(image))
        made = ListedSamples(
            codec=codec,
            collate=collate,
            layout=layout,
            at=at,
            dtype=dtype,
            item_bytes=torch.tensor(sizes, dtype=torch.int64),
            identity={"samples": f"{count}", "items": state.hexdigest(), "collate": digest(collate)},
        )
        _check_stored(made, fetch(range(min(count, 3))))
    return made


def _collated(items: list[Any], collate: Callable[[list[Any]], Any], layout: BatchLayout, at: int) -> Any:
    with preserved_random_state():
        batch = collate(items)
    same = lists_samples(batch, len(items))
    if same:
        images = layout.lists(batch).images
        same = all(image is _leaves(item)[at] for image, item in zip(images, items, strict=True))
    if not same:
        raise BatchDependentError(
            f"the collate function does not hand on the images of {len(items)} items as the dataset gave them, in "
            "their order, so no row can stand for one; use collate_fn=lambda batch: tuple(zip(*batch)), and resize or "
            "convert images in the dataset"
        )
    return batch


def _image_of(item: Any, collate: Callable[[list[Any]], Any], layout: BatchLayout) -> int:
    """Which leaf of an item its collate function lists among the images."""
    image = layout.lists(collate([item])).images[0]
    found = [at for at, leaf in enumerate(_leaves(item)) if leaf is image]
    if len(found) != 1 or not isinstance(image, Tensor):
        raise FieldError(
            f"the first thing that the model consumes of a sample is {type(image).__name__}: expected one of the "
            "tensors of the dataset's item, its image, listed by the collate function as it is: lambda batch: "
            "tuple(zip(*batch))"
        )
    return found[0]


def _leaves(item: Any) -> list[Any]:
    return pytree.tree_leaves(item, is_leaf=is_plain)


def _without_pixels(item: Any, at: int) -> Any:
    """The item with the image's size in its place."""
    leaves, tree = pytree.tree_flatten(item, is_leaf=is_plain)
    if not at < len(leaves) or not isinstance(leaves[at], Tensor):
        raise FieldError("the items of the dataset differ in structure; give all items the same keys and types")
    leaves[at] = list(leaves[at].shape)
    return pytree.tree_unflatten(leaves, tree)


def _check_stored(samples: ListedSamples, items: list[Any]) -> None:
    """Items that went through their bytes are collated as the items themselves, but for the pixels."""
    wanted = samples.sized(samples.batch(items))
    if digest(wanted) != digest(samples.batch_of_sizes([samples.encode(item) for item in items])):
        raise BatchDependentError(
            "the collate function makes something else of items without pixels, or of items that were stored and read "
            "back; use collate_fn=lambda batch: tuple(zip(*batch)), and do everything else in the dataset"
        )
