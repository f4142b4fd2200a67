"""What a row holds, and how the user's batch is made of rows again.

Samples of one shape: the activations, and every other tensor of the batch beside them. Samples of different lengths:
the activations of their content, and the raw item, of which the user's collate function makes each batch anew. Samples
that are only listed: the activations, and the item without the pixels of its image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from cachefreeze.batches import map_tensors
from cachefreeze.errors import LoaderError
from cachefreeze.listed_samples import ListedSamples
from cachefreeze.padding import Padded, input_leaves
from cachefreeze.ragged import RaggedSamples
from cachefreeze.samples import View
from cachefreeze.splitting import Parts
from cachefreeze.splitting.boundary import BoundaryTensor
from cachefreeze.splitting.padded_verification import dims_of, padded, unpadded
from cachefreeze.stores import FieldSpec, Lengths
from cachefreeze.stores.codec import RowCodec, stored_dtype
from cachefreeze.tracing import Example

# Raw items are kept in steps of this many bytes: a batch of them is gathered step by step.
_RAW_STEP_BYTES = 16


class RowFormat(ABC):
    """What a store's rows hold for the samples of one view.

    A *raw batch* is what :meth:`collate` makes of samples, in this process or in a worker; only a format looks inside.

    Attributes:
        view: The samples.
        fields: Of the store.
        attributes: Readable facts about the fields.
    """

    def __init__(self, parts: Parts, view: View, dtype: str | torch.dtype | None) -> None:
        self.view = view
        self.parts = parts
        self.dtype = dtype
        self.fields: tuple[FieldSpec, ...] = ()
        self.attributes: dict[str, str] = {}
        self._made: list[RowCodec] = []

    @property
    def rounding(self) -> dict[str, float]:
        """Per field in a narrower dtype than the model's: norm of the rounding over the norm of the rows, as measured.

        Rows that this process encoded count, the few that are recomputed when a file is opened among them.
        """
        found = {codec.name: codec.rounding.relative for codec in self._made if codec.stored != codec.dtype}
        return {name: error for name, error in found.items() if error is not None}

    @property
    def travelling(self) -> list[str]:
        """Names of the fields that :meth:`decode` sends to the device, if they are not there yet."""
        return [field.name for field in self.fields if field.name != "raw"]

    def fetch(self, rows: Sequence[int]) -> Any:
        """The raw batch of some samples. Random states are as before afterwards."""
        return self.view.fetch(rows, self.collate)

    @property
    @abstractmethod
    def collate(self) -> Callable[[list[Any]], Any]:
        """Makes the raw batch of a dataset's items. It goes to workers, and takes nothing of the model along."""

    @abstractmethod
    def example(self, rows: Sequence[int], raw: Any) -> Example:
        """The model's inputs within the raw batch of ``rows``."""

    @abstractmethod
    def encode(self, rows: Sequence[int], raw: Any, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """What is stored for some samples: of their raw batch, and of the activations that the prefix made of it."""

    @abstractmethod
    def activations(self, rows: Sequence[int], batch: Any, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """What is stored of the activations alone that were made of the user's batch of some samples."""

    def encode_again(
        self, rows: Sequence[int], values: Mapping[str, Tensor], batch: Any, tensors: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """What is stored for activations that were made of stored rows; what lies beside these stays as it is.

        Args:
            rows: The samples.
            values: Their stored rows, of the same view.
            batch: What :meth:`decode` made of ``values``.
            tensors: The activations.
        """
        made = self.activations(rows, batch, tensors)
        return {**made, **{f.name: values[f.name] for f in self.fields if f.name not in made}}

    @abstractmethod
    def decode(self, rows: Tensor, values: dict[str, Tensor], device: torch.device) -> tuple[list[Tensor], Any]:
        """What the suffix takes for ``rows``, and the user's batch in which it goes, both on ``device``.

        :meth:`assemble` joins them.
        """

    def lists(self, batch: Any) -> tuple[Example, ...]:
        """What suffix and segment take after the activations, of what :meth:`decode` returned: a detector's lists."""
        return ()

    @abstractmethod
    def assemble(self, batch: Any, rows: Any) -> Any:
        """The user's batch with ``rows`` in place of what the model consumes."""

    def _codec(self, number: int, spec: BoundaryTensor, shape: tuple[int, ...] | None = None) -> RowCodec:
        lies = {} if shape is not None else {"batch_dim": spec.batch_dim, "layout": spec.layout}
        codec = RowCodec(
            name=f"activation.{number}",
            shape=spec.shape if shape is None else shape,
            dtype=spec.dtype,
            stored=stored_dtype(spec.dtype, self.dtype),
            **lies,  # type: ignore[arg-type]
        )
        self._made.append(codec)
        return codec


def format_of(parts: Parts, view: View, dtype: str | torch.dtype | None) -> RowFormat:
    """The format that fits a split and the samples.

    Raises:
        LoaderError: The samples have different lengths, and the split was made for one length, or with other inputs;
            or they are listed, and the split was made for tensors, or the other way round.
    """
    lists = bool(parts.origin[1].beside)
    if lists != (view.listed is not None):
        given, split = ("tensors", "lists with one entry a sample")[:: 1 if lists else -1]
        raise LoaderError(
            f"the batches of this loader give the model {given}, but it was split with {split}: use the same collate "
            "function for all loaders of an engine"
        )
    if view.listed is not None:
        return ListedRows(parts, view, dtype)
    if view.ragged is None:
        return UniformRows(parts, view, dtype)
    if not parts.padded:
        raise LoaderError(
            f"the samples of this loader have different lengths ({'; '.join(a.name for a in view.ragged.axes)}), but "
            "the model was split for samples of one length: let the Engine or "
            "CacheManager.of(model, loader) split it, and give it a loader with different lengths first"
        )
    if parts.inputs != view.layout.input_names:
        raise LoaderError(
            f"the batches of this loader give the model {', '.join(view.layout.input_names)}, but it was split with "
            f"{', '.join(parts.inputs)}: give it the same inputs in the same order, labels included"
        )
    return RaggedRows(parts, view, dtype)


@final
class UniformRows(RowFormat):
    """Activations, and the other tensors of a batch beside them."""

    def __init__(self, parts: Parts, view: View, dtype: str | torch.dtype | None) -> None:
        super().__init__(parts, view, dtype)
        self._codecs = [self._codec(i, spec) for i, spec in enumerate(parts.boundary.tensors)]
        self._shapes = _shapes(view.example())
        beside = [
            FieldSpec(name=f"field.{i}", shape=tuple(values.shape[1:]), dtype=values.dtype)
            for i, (_, values) in enumerate(view.layout.fields)
        ]
        self.fields = (*(codec.field for codec in self._codecs), *beside)
        self.attributes = {f"field.{i}": path for i, path in enumerate(view.layout.field_names)}

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """The user's own."""
        return self.view.collate_fn

    def example(self, rows: Sequence[int], raw: Any) -> Example:
        """Of the user's batch.

        Raises:
            LoaderError: It lacks samples or has too many, or its samples have another shape than the others.
        """
        example = self.view.layout.example(raw)
        tensors = [leaf for leaf in input_leaves(example) if isinstance(leaf, Tensor)]
        counts = {len(tensor) for tensor in (*tensors, *self.view.layout.field_tensors(raw))}
        if counts != {len(rows)}:
            raise LoaderError(
                f"the collate function made {' and '.join(map(str, sorted(counts)))} rows of the {len(rows)} samples "
                f"{list(rows)}, so no row belongs to a sample. Leave out samples that cannot be read in the dataset or "
                "the sampler, and repeat none in the collate function"
            )
        if _shapes(example) != self._shapes:
            raise LoaderError(
                f"a batch has inputs of shapes {_shapes(example)} for each sample, the samples that were looked at "
                f"when the loader was made have {self._shapes}: few samples differ, so none of them was seen. Pad "
                "to a fixed length in the collate function"
            )
        return example

    def encode(self, rows: Sequence[int], raw: Any, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Activations and fields."""
        beside = self.view.layout.field_tensors(raw)
        names = (field.name for field in self.fields[len(self._codecs) :])
        return {**self.activations(rows, None, tensors), **dict(zip(names, beside, strict=True))}

    def activations(self, rows: Sequence[int], batch: Any, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """One field each."""
        return _encoded(self._codecs, rows, tensors)

    def decode(self, rows: Tensor, values: dict[str, Tensor], device: torch.device) -> tuple[list[Tensor], Any]:
        """Activations, and the fields."""
        sent = [send(values[field.name], device) for field in self.fields]
        count = len(self._codecs)
        return [codec.decode(v) for codec, v in zip(self._codecs, sent[:count], strict=True)], sent[count:]

    def assemble(self, batch: Any, rows: Any) -> Any:
        """In the structure of the first batch."""
        return self.view.layout.assemble(rows, batch)


@final
class RaggedRows(RowFormat):
    """Activations of each sample's content, and its raw item."""

    def __init__(self, parts: Parts, view: View, dtype: str | torch.dtype | None) -> None:
        super().__init__(parts, view, dtype)
        assert view.ragged is not None
        self._samples = view.ragged
        lengths = [Lengths(column) for column in self._samples.lengths.unbind(1)]
        self._kept: list[tuple[int, BoundaryTensor, RowCodec]] = []
        fields = []
        for i, spec in enumerate(parts.boundary.tensors):
            if spec.input is not None:
                continue
            codec, field = self._field(i, spec, lengths)
            self._kept.append((i, spec, codec))
            fields.append(field)
        self.fields = (*fields, _raw_field(self._samples.item_bytes))
        self.attributes = {"raw": "items of the dataset: a JSON list, and the bytes of arrays behind a zero byte"}

    def _field(self, number: int, spec: BoundaryTensor, lengths: list[Lengths]) -> tuple[RowCodec, FieldSpec]:
        dims = dims_of(spec)
        if dims is None:
            codec = self._codec(number, spec)
            return codec, codec.field
        sizes = list(spec.shape)
        sizes.insert(spec.batch_dim, 0)
        rest = tuple(size for d, size in enumerate(sizes) if d not in dims)
        place = spec.follows[0][1:]
        axis = next(i for i, axis in enumerate(self._samples.axes) if place in axis.places)
        codec = self._codec(number, spec, (lengths[axis].longest, *rest))
        return codec, FieldSpec.ragged(name=codec.name, lengths=lengths[axis], rest=rest, dtype=codec.stored)

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """Makes the bytes of the items, and the user's batch of what is read back from them, as in later passes."""
        return partial(_read_back, self._samples)

    def example(self, rows: Sequence[int], raw: Any) -> Example:
        """Of the user's batch."""
        return self.view.layout.example(raw[1])

    def encode(self, rows: Sequence[int], raw: Any, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Activations of the content, and the bytes of the items."""
        data, batch = raw
        return {**self.activations(rows, batch, tensors), "raw": _packed(data)}

    def activations(self, rows: Sequence[int], batch: Any, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Of the content."""
        given = self._samples.padded(batch, rows)
        kept = [tensors[i] if dims_of(spec) is None else unpadded(spec, tensors[i], given) for i, spec, _ in self._kept]
        return _encoded([codec for _, _, codec in self._kept], rows, kept)

    def decode(self, rows: Tensor, values: dict[str, Tensor], device: torch.device) -> tuple[list[Tensor], Any]:
        """What the suffix takes, padded as the user's batch is, and that batch."""
        batch = self._samples.batch(_unpacked(values["raw"], self._samples.item_bytes[rows]))
        given = self._samples.padded(batch, rows.tolist())
        leaves = input_leaves(given.example)
        kept = {i: (spec, codec) for i, spec, codec in self._kept}
        tensors = []
        for i, spec in enumerate(self.parts.boundary.tensors):
            if spec.input is not None:
                tensors.append(send(leaves[spec.input], device))
            else:
                codec = kept[i][1]
                tensors.append(self._padded(spec, codec, send(values[codec.name], device), given))
        return tensors, _sent(batch, device)

    def _padded(self, spec: BoundaryTensor, codec: RowCodec, rows: Tensor, given: Padded) -> Tensor:
        decoded = codec.decode(rows)
        return decoded if dims_of(spec) is None else padded(spec, decoded, given)

    def assemble(self, batch: Any, rows: Any) -> Any:
        """In the user's own batch, with what they stand in place of."""
        return self.view.layout.replace(batch, rows.beside)


@final
class ListedRows(RowFormat):
    """Activations of each image, and the item it came with, without its pixels."""

    def __init__(self, parts: Parts, view: View, dtype: str | torch.dtype | None) -> None:
        super().__init__(parts, view, dtype)
        assert view.listed is not None
        self._samples = view.listed
        self._codecs = [self._codec(i, spec) for i, spec in enumerate(parts.boundary.tensors)]
        self.fields = (*(codec.field for codec in self._codecs), _raw_field(self._samples.item_bytes))
        self.attributes = {
            "raw": "items of the dataset with the sizes of images in their place, as a JSON list and bytes"
        }

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """Makes the bytes of the items, and the user's batch."""
        return partial(_with_bytes, self._samples)

    def example(self, rows: Sequence[int], raw: Any) -> Example:
        """Of the user's batch."""
        return self.view.layout.example(raw[1])

    def encode(self, rows: Sequence[int], raw: Any, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Activations, and the bytes of the items."""
        return {**self.activations(rows, None, tensors), "raw": _packed(raw[0])}

    def activations(self, rows: Sequence[int], batch: Any, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """One field each."""
        return _encoded(self._codecs, rows, tensors)

    def decode(self, rows: Tensor, values: dict[str, Tensor], device: torch.device) -> tuple[list[Tensor], Any]:
        """Activations, and the user's batch with sizes in place of images."""
        batch = self._samples.batch_of_sizes(_unpacked(values["raw"], self._samples.item_bytes[rows]))
        tensors = [codec.decode(send(values[codec.name], device)) for codec in self._codecs]
        return tensors, _sent(batch, device)

    def lists(self, batch: Any) -> tuple[Example, ...]:
        """With empty images of the sizes that they had."""
        return (self._samples.given(batch),)

    def assemble(self, batch: Any, rows: Any) -> Any:
        """In the user's own batch, in the place of every list that the model consumes."""
        (lists,) = self.lists(batch)
        return self.view.layout.replace(batch, rows.with_lists(lists).beside)


def _encoded(codecs: Sequence[RowCodec], rows: Sequence[int], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    samples = torch.tensor(list(rows))
    return {codec.name: codec.encode(tensor, samples) for codec, tensor in zip(codecs, tensors, strict=True)}


def _read_back(samples: RaggedSamples, items: list[Any]) -> tuple[list[bytes], Any]:
    data = [samples.codec.encode(item) for item in items]
    return data, samples.batch(data)


def _with_bytes(samples: ListedSamples, items: list[Any]) -> tuple[list[bytes], Any]:
    return [samples.encode(item) for item in items], samples.batch(items)


def _raw_field(item_bytes: Tensor) -> FieldSpec:
    steps = [ceil(n / _RAW_STEP_BYTES) for n in item_bytes.tolist()]
    return FieldSpec.ragged(name="raw", lengths=steps, rest=(_RAW_STEP_BYTES,), dtype=torch.uint8)


def _packed(data: Sequence[bytes]) -> Tensor:
    """Raw items, as wide as the largest of them."""
    width = max(ceil(len(item) / _RAW_STEP_BYTES) for item in data)
    packed = np.zeros((len(data), width * _RAW_STEP_BYTES), np.uint8)
    for i, item in enumerate(data):
        packed[i, : len(item)] = np.frombuffer(item, np.uint8)
    return torch.from_numpy(packed).view(len(data), width, _RAW_STEP_BYTES)


def _unpacked(packed: Tensor, item_bytes: Tensor) -> list[bytes]:
    raw = packed.cpu().flatten(1).numpy()
    return [raw[i, :size].tobytes() for i, size in enumerate(item_bytes.tolist())]


def _shapes(example: Example) -> list[tuple[int, ...]]:
    """Of each input, without the batch."""
    return [tuple(leaf.shape[1:]) for leaf in input_leaves(example) if isinstance(leaf, Tensor)]


def _sent(batch: Any, device: torch.device) -> Any:
    """Every tensor of a batch on ``device``."""
    return map_tensors(lambda leaf: send(leaf, device), batch)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, without waiting for what is queued there.

    From pageable memory CUDA waits for the stream before it copies, ``non_blocking`` or not; pinned batches pass as
    they are.
    Source: https://docs.nvidia.com/cuda/cuda-driver-api/api-sync-behavior.html
    """
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
