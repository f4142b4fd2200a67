"""Which dimensions follow a batch's padded length, read from recordings at two padded lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cachefreeze.errors import SplitError
from cachefreeze.splitting.boundary import BoundaryTensor, Site

if TYPE_CHECKING:
    from cachefreeze.splitting.values import Recording

# In place of an input's leaf and dimension: the size changes with the padded length, but is not any input's.
_NO_INPUT = (-1, -1)


def follow_lengths(site: Site, longer: Recording, shorter: Recording) -> None:
    """Note in ``longer`` which dimensions of its values follow which input, and which values are inputs.

    Raises:
        SplitError: The forward does something else at another padded length.
    """
    same = longer.operations == shorter.operations and len(longer.values) == len(shorter.values)
    if not same or longer.closed.keys() != shorter.closed.keys():
        raise SplitError(
            f"replay: what runs before {site.name!r} depends on how far a batch is padded, so no row is independent of "
            "its batch; pad to a fixed length in the collate function, or train from an earlier block"
        )
    for key, call in longer.closed.items():
        for (kind, what), (other_kind, other) in zip(call.leaves, shorter.closed[key].leaves, strict=True):
            if kind != other_kind or (kind == "constant" and what != other):
                raise SplitError(
                    f"replay: {call.name!r} returns a value that depends on how far a batch is padded, which no row "
                    "can carry; pad to a fixed length in the collate function, or train from another block"
                )
    pairs = list(zip(longer.values, shorter.values, strict=True))
    inputs = {a.place[3]: (a.shape, b.shape) for a, b in pairs if a.place is not None and a.place[0] == "input"}
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    for leaf, (long, short) in inputs.items():
        for dim, pair in enumerate(zip(long, short, strict=True)):
            if pair[0] != pair[1]:
                sizes.setdefault(pair, (leaf, dim))
    for a, b in pairs:
        if a.spec is not None and len(a.shape) == len(b.shape):
            moving = ((d, pair) for d, pair in enumerate(zip(a.shape, b.shape, strict=True)) if pair[0] != pair[1])
            follows = tuple((d, *sizes.get(pair, _NO_INPUT)) for d, pair in moving)
            number = a.place[3] if a.place is not None and a.place[0] == "input" else None
            a.spec = replace(a.spec, input=number, follows=follows)


def fits_a_row(spec: BoundaryTensor | None) -> bool:
    """Whether a sample's part can be taken out of one batch, however far it is padded, and put into another."""
    if spec is None:
        return False
    return not spec.follows or (len(spec.follows) == 1 and spec.follows[0][1:] != _NO_INPUT)


def sizes_at(spec: BoundaryTensor, batch: int, inputs: Sequence[tuple[int, ...]] = ()) -> tuple[int, ...]:
    """Shape of the batched tensor as the model makes it, for a batch whose inputs have these shapes."""
    sizes = list(spec.shape)
    if spec.folded:
        sizes[spec.batch_dim] *= batch
    else:
        sizes.insert(spec.batch_dim, batch)
    for dim, leaf, leaf_dim in spec.follows:
        if inputs and leaf >= 0:
            sizes[dim] = inputs[leaf][leaf_dim]
    return tuple(sizes)
