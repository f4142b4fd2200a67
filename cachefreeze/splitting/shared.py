"""Values that frozen layers make of weights and shapes alone: the same for every sample, so they are in no row.

A table of positions that the first layer makes for all of them is one. Prefix and suffix of one plan hold such values
together: a prefix notes them in every forward, so that they are of the weights that made the rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cachefreeze.errors import SplitError
from cachefreeze.splitting.values import Place, Value


class Shared:
    """The shared values of one plan, by place: one sample's part, or all of what has no batch dimension."""

    def __init__(self, values: Iterable[Value]) -> None:
        self._values = {value.place: value for value in values if value.place is not None}
        self._held: dict[Place, Tensor] = {}

    @property
    def places(self) -> frozenset[Place]:
        """Where they are made."""
        return frozenset(self._values)

    def apart(self) -> Shared:
        """The same for a prefix of other precision, whose values are not to be handed out."""
        return Shared(self._values.values())

    def note(self, place: Place, made: Tensor) -> None:
        """Take what a prefix has made.

        Raises:
            SplitError: It has another shape than in the split, or is not the same for every sample.
        """
        spec = self._values[place].spec
        parts = made if spec is None else spec.unfold(made)
        one = parts if spec is None else parts.narrow(spec.batch_dim, 0, 1)
        known = self._held.get(place)
        if known is not None and known.shape != one.shape:
            raise SplitError(
                f"replay: {place[1]!r} made a tensor of shape {tuple(known.shape)} in the split, and now "
                f"{tuple(one.shape)}; split anew for inputs of another size"
            )
        if known is not None and known.dtype == one.dtype and known.device == one.device:
            known.copy_(one)  # of the weights that made these rows; no comparison, which would wait for the device
            return
        if not torch.equal(one.expand_as(parts), parts):
            raise SplitError(f"replay: what {place[1]!r} makes of its weights alone differs from sample to sample")
        self._held[place] = one.clone()

    def give(self, place: Place, batch: int, device: torch.device) -> Tensor:
        """A tensor of its own for as many samples, which a suffix may write into."""
        spec, held = self._values[place].spec, self._held[place].to(device)
        return held.clone() if spec is None else spec.fold(held.repeat_interleave(batch, spec.batch_dim))
