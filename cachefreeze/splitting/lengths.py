"""Which dimensions follow a batch's padded length, read from recordings at two padded lengths."""

from __future__ import annotations

from dataclasses import replace

from cachefreeze.errors import SplitError
from cachefreeze.splitting.boundary import BoundaryTensor
from cachefreeze.splitting.recording import OpenInstead, Recording

# In place of an input's leaf and dimension: the size changes with the padded length, but is not any input's.
_NO_INPUT = (-1, -1)


def follow_lengths(longer: Recording, shorter: Recording, boundary: str) -> None:
    """Note in ``longer`` which dimensions of its values follow which input, and which values are inputs.

    Raises:
        SplitError: The forward does something else at another padded length.
        OpenInstead: A call returns a constant that does.
    """
    same = longer.operations == shorter.operations and len(longer.values) == len(shorter.values)
    if not same or longer.closed.keys() != shorter.closed.keys():
        raise SplitError(
            f"replay: what runs before {boundary!r} depends on how far a batch is padded, so no row is independent of "
            "its batch; pad to a fixed length in the collate function, or train from an earlier block"
        )
    for key, call in longer.closed.items():
        for (kind, what), (other_kind, other) in zip(call.leaves, shorter.closed[key].leaves, strict=True):
            if kind != other_kind or (kind == "constant" and what != other):
                raise OpenInstead(call.name, "returns a value that depends on how far a batch is padded")
    pairs = list(zip(longer.values, shorter.values, strict=True))
    inputs = {a.place[3]: (a.shape, b.shape) for a, b in pairs if a.place is not None and a.place[0] == "input"}
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    for leaf, (long, short) in inputs.items():
        for dim, pair in enumerate(zip(long, short, strict=True)):
            if pair[0] != pair[1]:
                sizes.setdefault(pair, (leaf, dim))
    for a, b in pairs:
        if a.spec is not None and len(a.shape) == len(b.shape):
            moving = [(d, pair) for d, pair in enumerate(zip(a.shape, b.shape, strict=True)) if pair[0] != pair[1]]
            known = {} if a.spec.folded else sizes  # the dimensions of a folded tensor are not those of its rows
            follows = tuple((d, *known.get(pair, _NO_INPUT)) for d, pair in moving)
            number = a.place[3] if a.place is not None and a.place[0] == "input" else None
            a.spec = replace(a.spec, input=number, follows=follows)


def fits_a_row(spec: BoundaryTensor | None) -> bool:
    """Whether a sample's part can be taken out of one padded batch and put into another."""
    return spec is not None and (not spec.follows or (len(spec.follows) == 1 and spec.follows[0][1:] != _NO_INPUT))
