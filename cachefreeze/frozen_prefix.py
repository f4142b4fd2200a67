"""The frozen prefix as rows are made with it, and proof that it did not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cachefreeze.errors import StaleCacheError
from cachefreeze.fingerprint import state_tensors, structure, tensors_digest
from cachefreeze.portions import EqualPortions, Portions
from cachefreeze.running import NumericMode, autocast, float32_precision, model_device
from cachefreeze.splitting import BoundaryTensor, Parts
from cachefreeze.tracing import Example
from cachefreeze.weights import WeightWatch, held


class FrozenPrefix:
    """The prefix of a split as rows are made with it: its numeric mode, its device, and proof that it did not change.

    Attributes:
        parts: The split.
        mode: The autocast state in which it runs, whatever the ambient one is.
        dtype: In which rows are kept, as the user said it.
        device: Of the model.
        rows_ahead: Rows that were absent from the stores when these were opened.
        tolerance: How far rows may be from what the model computes, relative to a sample's largest magnitude.
    """

    tolerance = 0.0

    def __init__(self, parts: Parts, mode: NumericMode, dtype: str | torch.dtype | None) -> None:
        self.parts = parts
        self.mode = mode
        self.dtype = dtype
        self.device = model_device(parts.model)
        self.rows_ahead = 0
        self._portions = Portions()
        self._equal = EqualPortions()
        self._digest = self._weights()
        self._watch = WeightWatch(parts.prefix)

    def run(self, example: Example, count: int) -> list[Tensor]:
        """Activations of the first ``count`` samples, one tensor per boundary tensor, as rows are made of them."""
        if self.device.type != "cpu" or self.parts.inputs or example.beside:  # or samples of different shapes
            return self.exact(example, count)
        with torch.no_grad(), autocast(self.device, self.mode.autocast):
            specs = self.parts.boundary.tensors
            return self._equal.run(self.parts.prefix, example.to(self.device), count, specs, self.rows_ahead)

    def exact(self, example: Example, count: int) -> list[Tensor]:
        """The same as the model computes them."""
        return self._run(self.parts.prefix, example, count, self._portions)

    def facts(self) -> dict[str, Any]:
        """How rows are made, for reports."""
        return {"choice": "exact"}

    def release(self) -> None:
        """Give back what is kept only to make rows: all are there."""

    def _run(self, prefix: Callable[..., Any], example: Example, count: int, portions: Portions) -> list[Tensor]:
        with torch.no_grad(), autocast(self.device, self.mode.autocast):
            return portions.run(prefix, example.to(self.device), count, self.parts.boundary.tensors)

    def check(self) -> None:
        """Raise if rows made earlier would be stale."""
        boundary = self.parts.boundary.name
        tensors = held(self.parts.prefix)
        if any(tensor.requires_grad for tensor in tensors):
            thawed = [name for name, p in self.parts.prefix.named_parameters() if p.requires_grad]
            raise StaleCacheError(
                f"{thawed[0].removeprefix('graph.')} before the boundary {boundary!r} is trainable again, so its "
                "cached rows would be stale. Freeze it, or make a new Engine"
            )
        self.parts.follow()
        if not self._watch.changed(tensors):
            return
        # tensors that were moved (to another memory format, say) have another place, and maybe still their values
        if self._weights() != self._digest:
            raise StaleCacheError(
                f"weights or buffers before the boundary {boundary!r} changed since the cache was opened, so its rows "
                "are stale. Load weights before making the Engine; frozen parts must not move"
            )
        self._watch = WeightWatch(self.parts.prefix)

    def identity(self) -> dict[str, str]:
        """Fingerprint fields of the prefix and of how it computes."""
        tensors = [
            f"{_own_shape(t)} {str(t.dtype).removeprefix('torch.')} batch {t.batch_dim} layout {t.layout}"
            for t in self.parts.boundary.tensors
        ]
        return {
            "torch": torch.__version__,
            "device": self.device.type,
            "autocast": str(self.mode.autocast),
            "matmul": float32_precision(self.device),
            "boundary": f"{self.parts.boundary.name}: {'; '.join(tensors)}",
            "weights": self._digest,
            "structure": structure(self.parts.prefix),
            "prefix": "exact",
        }

    def _weights(self) -> str:
        return tensors_digest(state_tensors(self.parts.prefix))


def _own_shape(tensor: BoundaryTensor) -> tuple[int | str, ...]:
    """A sample's shape, without the padded length of the batch that happened to be split with."""
    sizes: list[int | str] = list(tensor.shape)
    for dim, _, _ in tensor.follows:
        sizes[dim - (dim > tensor.batch_dim)] = "*"
    return tuple(sizes)
