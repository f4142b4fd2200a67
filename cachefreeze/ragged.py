"""Samples of different lengths: whether a loader has them, how long each is, and how the collate function pads them.

The collate function is the only authority: what it makes of one sample alone is the sample's content, what it adds to a
short sample beside a long one is padding. Where a batch has a padding mask, masked steps that look like padding (as
with ``pad_to_multiple_of``) are padding too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from cachefreeze.batches import BatchLayout
from cachefreeze.errors import LoaderError
from cachefreeze.fingerprint import digest, tensor_bytes
from cachefreeze.isolation import preserved_random_state
from cachefreeze.items import ItemCodec
from cachefreeze.padding import Axis, Padded, input_leaves, ladder
from cachefreeze.sides import Place, Sides

# Samples collated alone to see whether lengths differ, evenly spread over the dataset: images are not all decoded.
_PROBED = 12
# Samples among which those to split and to verify with are chosen.
_CANDIDATES = 64
# Items fetched at a time where a dataset has ``__getitems__``.
_CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class RaggedSamples:
    """Every sample's lengths and bytes, as read once from the dataset.

    Attributes:
        codec: Between items and their bytes.
        collate: The user's collate function.
        layout: What the model consumes of a batch.
        axes: The lengths that a sample has.
        sizes: (samples, axes) int64: to how much each sample is padded when it is collated alone.
        lengths: (samples, axes) int64: how much of that is content.
        item_bytes: (samples,) int64.
        identity: Fingerprint fields: every byte of every item, and all that the collate function makes of each alone.
    """

    codec: ItemCodec
    collate: Callable[[list[Any]], Any]
    layout: BatchLayout
    axes: tuple[Axis, ...]
    sizes: Tensor
    lengths: Tensor
    item_bytes: Tensor
    identity: dict[str, str]

    def batch(self, data: Sequence[bytes]) -> Any:
        """The user's own batch of some items. Random states are as before afterwards."""
        with preserved_random_state():
            return self.collate([self.codec.decode(item) for item in data])

    def padded(self, batch: Any, rows: Sequence[int]) -> Padded:
        """The model's inputs within a collated batch of ``rows``, and where its content is.

        Raises:
            BatchDependentError: The batch is not padded as its samples were when they were measured.
        """
        lengths = self.lengths[torch.tensor(list(rows))].unbind(1)
        example = self.layout.example(batch)
        for axis, column in zip(self.axes, lengths, strict=True):
            axis.check(example, column)
        return Padded(example, self.axes, lengths)

    def batches(self) -> list[list[int]]:
        """Samples of batches to split and to verify with.

        Three and two samples, padded to different lengths; a short one alone, without padding; some, evenly spread.

        Raises:
            LoaderError: The lengths differ too little to tell what follows them.
        """
        order = torch.argsort(self.sizes.sum(dim=1), stable=True)
        among = order[torch.linspace(0, len(order) - 1, min(_CANDIDATES, len(order))).round().long()]
        found = ladder(self.sizes[among], self.lengths[among])
        if found is None:
            raise LoaderError(
                f"the lengths of {'; '.join(axis.name for axis in self.axes)} take too few values to tell which "
                "activations follow which of them: three samples are needed, each longer than the one before, and two "
                "that are padded to different lengths. Pad to a fixed length in the collate function"
            )
        short, long, longer = (int(among[i]) for i in found)
        spread = among[torch.linspace(0, len(among) - 1, 4).round().long()].tolist()
        return [[short, longer, long], [short, long], [short, short], spread]


def evenly(count: int, some: int) -> list[int]:
    """At most ``some`` of ``count`` indices, evenly spread, each once, the first and the last among them."""
    return sorted({round(i * (count - 1) / (some - 1)) for i in range(some)})


def varying(one: Callable[[int], Any], layout: BatchLayout, count: int) -> frozenset[Place]:
    """Dimensions of the inputs that differ between samples collated alone; empty where all have one shape.

    Args:
        one: The collated batch of one sample.
        layout: What the model consumes.
        count: Samples of the dataset.
    """
    some = evenly(count, _PROBED)
    with preserved_random_state():
        shapes = [_shapes(layout.example(one(index))) for index in some]
    return frozenset(
        (leaf, dim)
        for leaf, first in enumerate(shapes[0])
        for dim in range(len(first))
        if any(len(other[leaf]) != len(first) or other[leaf][dim] != first[dim] for other in shapes)
    )


def measure(
    fetch: Callable[[Sequence[int]], list[Any]],
    collate: Callable[[list[Any]], Any],
    layout: BatchLayout,
    count: int,
    places: frozenset[Place],
) -> RaggedSamples:
    """Read every item once. Random states are as before afterwards.

    Args:
        fetch: Items of some indices, as the dataset gives them.
        collate: The user's collate function.
        layout: What the model consumes.
        count: Samples of the dataset.
        places: Dimensions of the inputs that differ.

    Raises:
        FieldError: An item cannot be kept as the dataset gives it.
        LoaderError: An input is padded in more than one dimension, or in one that is not among ``places``.
        BatchDependentError: The collate function does more to a sample than padding it on one side.
    """
    twice = sorted(leaf for leaf, _ in places if sum(other == leaf for other, _ in places) > 1)
    names = _names(layout)
    if twice:
        raise LoaderError(
            f"{names(twice[0])} is padded in more than one dimension, so a sample's row would depend on how its batch "
            "is padded; resize or pad samples to one size in the dataset"
        )
    with preserved_random_state():
        first = fetch([0])[0]
        codec = ItemCodec(first)
        scan = _scan(fetch, collate, layout, count, places, codec)
        _check_items(fetch, collate, codec, count)
        return _axes(scan, fetch, collate, layout, codec)


@dataclass
class _Scan:
    """What the pass over all items found.

    Attributes:
        sizes: Per place (samples,) its size when the sample is collated alone.
        ends: Per place (samples, 2): how many equal steps the row begins and ends with.
        edges: Per place (samples, 2) float64: the value of those steps.
        item_bytes: (samples,)
        digests: Of all items; of all that is made of them.
    """

    sizes: dict[Place, Tensor]
    ends: dict[Place, Tensor]
    edges: dict[Place, Tensor]
    item_bytes: Tensor
    digests: tuple[str, str]


def _scan(
    fetch: Callable[[Sequence[int]], list[Any]],
    collate: Callable[[list[Any]], Any],
    layout: BatchLayout,
    count: int,
    places: frozenset[Place],
    codec: ItemCodec,
) -> _Scan:
    order = sorted(places)
    sizes = {place: torch.zeros(count, dtype=torch.int64) for place in order}
    ends = {place: torch.zeros(count, 2, dtype=torch.int64) for place in order}
    edges = {place: torch.zeros(count, 2, dtype=torch.float64) for place in order}
    item_bytes = torch.zeros(count, dtype=torch.int64)
    items, inputs = xxhash.xxh3_128(), xxhash.xxh3_128()
    fixed: list[Any] | None = None
    for index, item in _each(fetch, count):
        data = codec.encode(item)
        item_bytes[index] = len(data)
        items.update(len(data).to_bytes(8, "little") + data)
        example = layout.example(collate([codec.decode(data)]))
        leaves = input_leaves(example)
        rest = [_fixed(leaf, {d for i, d in places if i == number}) for number, leaf in enumerate(leaves)]
        fixed = rest if fixed is None else fixed
        if rest != fixed:
            _refuse_shape(index, rest, fixed, _names(layout))
        for leaf in leaves:
            inputs.update(str(tuple(leaf.shape)).encode() if isinstance(leaf, Tensor) else digest(leaf).encode())
            inputs.update(tensor_bytes(leaf) if isinstance(leaf, Tensor) else b"")
        for place in order:
            row = leaves[place[0]].movedim(place[1], 0)
            sizes[place][index] = len(row)
            ends[place][index], edges[place][index] = _run(row)
    return _Scan(sizes, ends, edges, item_bytes, (items.hexdigest(), inputs.hexdigest()))


def _fixed(leaf: Any, padded: set[int]) -> Any:
    """What must be equal for all samples: an input's shape with -1 for its length, or the value of a constant."""
    return [-1 if d in padded else n for d, n in enumerate(leaf.shape)] if isinstance(leaf, Tensor) else leaf


def _run(row: Tensor) -> tuple[Tensor, Tensor]:
    """How many equal steps a row begins and ends with, and their value; (steps, *rest) -> (2,), (2,)."""
    steps = row.double().reshape(len(row), -1).numpy() if row.numel() else np.zeros((0, 1))
    if not steps.size:
        return torch.zeros(2, dtype=torch.int64), torch.full((2,), float("nan"), dtype=torch.float64)
    edges = [steps[0, 0], steps[-1, 0]]
    runs = []
    for ordered, edge in zip((steps, steps[::-1]), edges, strict=True):
        other = np.flatnonzero((ordered != edge).any(axis=1))
        runs.append(int(other[0]) if len(other) else len(steps))
    return torch.tensor(runs), torch.tensor(edges, dtype=torch.float64)


def _each(fetch: Callable[[Sequence[int]], list[Any]], count: int) -> Iterator[tuple[int, Any]]:
    for start in range(0, count, _CHUNK):
        indices = range(start, min(start + _CHUNK, count))
        yield from zip(indices, fetch(indices), strict=True)


def _check_items(
    fetch: Callable[[Sequence[int]], list[Any]],
    collate: Callable[[list[Any]], Any],
    codec: ItemCodec,
    count: int,
) -> None:
    """An item that went through its bytes is collated as the item itself."""
    some = sorted({0, count // 2, count - 1})
    kept = [codec.encode(item) for item in fetch(some)]
    if digest(collate([codec.decode(data) for data in kept])) != digest(collate(fetch(some))):
        raise LoaderError(
            "the collate function makes something else of items that were stored and read back, so it depends on more "
            "than their values (their identity, their types' attributes); have the dataset return plain tensors, "
            "arrays, numbers, texts or lists of them"
        )


def _axes(
    scan: _Scan,
    fetch: Callable[[Sequence[int]], list[Any]],
    collate: Callable[[list[Any]], Any],
    layout: BatchLayout,
    codec: ItemCodec,
) -> RaggedSamples:
    """Which inputs share a length, on which side each is padded, and how long every sample is."""
    groups: dict[bytes, list[Place]] = {}
    for place, sizes in scan.sizes.items():
        groups.setdefault(bytes(tensor_bytes(sizes)), []).append(place)
    names = _names(layout)
    axes, lengths = [], []
    for places in groups.values():
        size = scan.sizes[places[0]]
        sides = Sides(places, names)
        for short in _shorter(size):
            pair = [short, int(size.argmax())]
            items = [codec.decode(codec.encode(item)) for item in fetch(pair)]
            alone = [layout.example(collate([codec.decode(codec.encode(item))])) for item in fetch(pair)]
            sides.compare(input_leaves(layout.example(collate(items))), [input_leaves(one) for one in alone])
        left = sides.left()
        name = ", ".join(dict.fromkeys(names(leaf) for leaf, _ in places))
        axes.append(Axis(tuple(places), tuple(sides.values.get(place) for place in places), left, name))
        masked = torch.stack([_padding(scan, place, sides.values.get(place), left=left) for place in places])
        lengths.append(size - masked.min(dim=0).values if sides.has_mask(left=left) else size)
    shown = "; ".join(f"{axis.name} padded on the {'left' if axis.left else 'right'}" for axis in axes)
    return RaggedSamples(
        codec=codec,
        collate=collate,
        layout=layout,
        axes=tuple(axes),
        sizes=torch.stack([scan.sizes[axis.places[0]] for axis in axes], dim=1),
        lengths=torch.stack(lengths, dim=1),
        item_bytes=scan.item_bytes,
        identity={
            "samples": f"{len(scan.item_bytes)}",
            "items": scan.digests[0],
            "inputs": scan.digests[1],
            "padding": shown,
        },
    )


def _shorter(size: Tensor) -> list[int]:
    """A few samples that are shorter than the longest, the shortest first."""
    order = torch.argsort(size, stable=True)
    order = order[size[order] < size.max()]
    return [int(order[i]) for i in sorted({0, len(order) // 2, len(order) - 1})] if len(order) else []


def _padding(scan: _Scan, place: Place, value: float | None, *, left: bool) -> Tensor:
    """(samples,) how many steps at the padded end of a sample's own row hold the padding's value."""
    side = 0 if left else 1
    run = scan.ends[place][:, side]
    return torch.zeros_like(run) if value is None else run * (scan.edges[place][:, side] == value)


def _shapes(example: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else () for leaf in input_leaves(example)]


def _names(layout: BatchLayout) -> Callable[[int], str]:
    """The name of an input, by its number among the leaves."""
    return lambda leaf: layout.input_names[leaf] if leaf < len(layout.input_names) else f"input {leaf}"


def _refuse_shape(index: int, found: list[Any], wanted: list[Any], names: Callable[[int], str]) -> None:
    leaf = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), 0)
    raise LoaderError(
        f"{names(leaf)} of sample {index}, collated alone, is {found[leaf]} where of the first sample it is "
        f"{wanted[leaf]} (shapes, with -1 for the length that differs): an input is padded in one dimension at most, "
        "and what is no tensor is one constant. Resize or pad samples to one size, or make it a tensor"
    )
