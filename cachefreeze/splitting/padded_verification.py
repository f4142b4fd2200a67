"""Rows of samples that have different lengths: each must be its sample's own, whatever its batch was padded to.

What is compared. *Content*: the steps of a sample that are not padding. A row is what the prefix makes of a sample's
content, and a batch of rows has zeros where the padding is. Equal means: rows made in differently padded batches are
equal; outputs are equal on content (an output has padded steps where its size follows that of an input), a loss and
every output without padded steps as a whole; gradients and buffers are equal. Outputs on padded steps are not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cachefreeze import trees
from cachefreeze.errors import BatchDependentError, SplitError
from cachefreeze.isolation import preserved_random_state, preserved_state
from cachefreeze.padding import Padded, content, pad, unpad
from cachefreeze.splitting.boundary import BoundaryTensor, Cut, Site, rows_of
from cachefreeze.splitting.verification import close, compare, difference, suffix_of, train_once

# Relative to the largest magnitude, in units of what one batch's rounding may differ by: another padded length is
# another blocking of the same sums, and masked steps add exact zeros.
_ACROSS_LENGTHS = 10.0
_FIX = "pad to a fixed length in the collate function, or train from an earlier block"


def verify_padded(cut: Cut, site: Site, batches: Sequence[tuple[Padded, Sequence[int]]]) -> None:
    """Compare a proposed split with the model where padding is replaced by zeros.

    Args:
        cut: What an executor proposes.
        site: Where.
        batches: Padded batches and the samples in them. The first two differ in padded lengths and sample counts, and
            some samples are in several batches.

    Raises:
        BatchDependentError: A row depends on how far its batch was padded.
        SplitError: With zeros for padding, what trains computes something else on content, or trains differently.
    """
    with preserved_random_state() as random_state, preserved_state(site.model):
        with site.mode(train=False), torch.no_grad():
            _check_rows(cut, site, batches)
            outputs = []
            for batch, _ in batches[:2]:
                random_state.restore()
                outputs.append(trees.without_generation_caches(batch.example.fresh().call(site.model)))
            real = _Content(batches[0][0], batches[1][0], *outputs)
            for batch, _ in batches:
                random_state.restore()
                expected = real.of(batch.example.fresh().call(site.model), batch)
                random_state.restore()
                _compare(
                    "eval output",
                    expected,
                    real.of(suffix_of(cut, _zeroed(cut, batch), site, batch.example), batch),
                    site,
                )
        with site.mode(train=True), torch.enable_grad():
            for batch, _ in batches[:2]:
                _compare_training(cut, site, batch, real)


def dims_of(spec: BoundaryTensor) -> tuple[int, int] | None:
    """Batch dimension and padded dimension; None where a tensor has no padding."""
    return (spec.batch_dim, spec.follows[0][0]) if spec.follows else None


def unpadded(spec: BoundaryTensor, tensor: Tensor, batch: Padded) -> Tensor:
    """The rows of one boundary tensor: (n, …), its padded dimension second and zero after the content."""
    dims = dims_of(spec)
    if dims is None:
        return tensor.movedim(spec.batch_dim, 0)
    number = batch.axis(spec.follows[0][1:])
    axis = batch.axes[number]
    size = axis.size(batch.example)
    if tensor.shape[dims[1]] != size:
        raise BatchDependentError(
            f"an activation has {tensor.shape[dims[1]]} steps in a batch whose {axis.name} are padded to {size}, so it "
            f"follows another length than it did when the model was split; {_FIX}"
        )
    return unpad(tensor, dims, batch.lengths[number], left=axis.left)


def padded(spec: BoundaryTensor, rows: Tensor, batch: Padded) -> Tensor:
    """The inverse of :func:`unpadded`, as far as ``batch`` is padded."""
    dims = dims_of(spec)
    if dims is None:
        return rows.movedim(0, spec.batch_dim)
    number = batch.axis(spec.follows[0][1:])
    axis = batch.axes[number]
    return pad(rows, dims, batch.lengths[number], axis.size(batch.example), left=axis.left)


def _check_rows(cut: Cut, site: Site, batches: Sequence[tuple[Padded, Sequence[int]]]) -> None:
    seen: dict[tuple[int, int], Tensor] = {}
    for batch, samples in batches:
        made = rows_of(cut.prefix, batch.example.fresh())
        for number, (spec, tensor) in enumerate(zip(cut.tensors, made, strict=True)):
            if spec.input is not None:
                continue
            rows = unpadded(spec, tensor, batch)
            for position, sample in enumerate(samples):
                row = rows[position]
                if spec.follows:
                    row = row[: int(batch.lengths[batch.axis(spec.follows[0][1:])][position])]
                known = seen.setdefault((number, sample), row)
                if not close(known, row, _ACROSS_LENGTHS):
                    raise BatchDependentError(
                        f"a row before {site.name!r} depends on how far its batch is padded (sample {sample}: "
                        f"{difference(known, row)}; a mask that hides too little, positions counted from the padding, "
                        f"a convolution or norm over padding?), so it cannot be cached; {_FIX}"
                    )


def as_stored(specs: Sequence[BoundaryTensor], made: Sequence[Tensor], batch: Padded) -> list[Tensor]:
    """Rows as a store would give them back: content, and zeros for padding."""
    return [
        tensor if spec.input is not None else padded(spec, unpadded(spec, tensor, batch), batch)
        for spec, tensor in zip(specs, made, strict=True)
    ]


def _zeroed(cut: Cut, batch: Padded) -> list[Tensor]:
    return as_stored(cut.tensors, rows_of(cut.prefix, batch.example.fresh()), batch)


def _compare_training(cut: Cut, site: Site, batch: Padded, real: _Content) -> None:
    whole = train_once(site.model, lambda: real.of(batch.example.fresh().call(site.model), batch), 0)
    split = train_once(site.model, lambda: real.of(suffix_of(cut, _zeroed(cut, batch), site, batch.example), batch), 0)
    for what, expected, got in zip(("train output", "gradient", "buffer"), whole[:3], split[:3], strict=True):
        _compare(what, expected, got, site)


def _compare(what: str, expected: Any, got: Any, site: Site) -> None:
    try:
        compare(what, expected, got, site)
    except SplitError as error:
        raise SplitError(
            f"samples have different lengths, and with zeros in place of the padding's activations the {error}: what "
            f"trains lets padding reach its results (a loss or norm over padding, the first token of a text predicted "
            f"from padding on its left, a mask cached as numbers?); {_FIX}"
        ) from error


class _Content:
    """Which elements of a model's output are content."""

    def __init__(self, first: Padded, second: Padded, one: Any, two: Any) -> None:
        counts = (len(first.lengths[0]), len(second.lengths[0]))
        sizes = [(a.size(first.example), b.size(second.example)) for a, b in zip(first.axes, second.axes, strict=True)]
        self._dims: list[tuple[int | None, list[tuple[int, int]]]] = []
        for a, b in zip(trees.leaves(one), trees.leaves(two), strict=True):
            if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dim() != b.dim():
                self._dims.append((None, []))
                continue
            pairs = list(zip(a.shape, b.shape, strict=True))
            batch = next((d for d, pair in enumerate(pairs) if pair == counts), None)
            follow = [(d, sizes.index(p)) for d, p in enumerate(pairs) if d != batch and p in sizes]
            self._dims.append((batch, follow))

    def of(self, output: Any, batch: Padded) -> Any:
        """The output with zeros on padded steps, so that they count neither in it nor in its gradient."""
        leaves, tree = trees.flatten(trees.without_generation_caches(output))
        made = []
        for leaf, (batch_dim, follow) in zip(leaves, self._dims, strict=True):
            kept = leaf
            if batch_dim is not None:
                for dim, number in follow:
                    axis = batch.axes[number]
                    real = content(batch.lengths[number], leaf.shape[dim], left=axis.left).to(leaf.device)
                    sizes = [1] * (leaf.dim() - 2)
                    shaped = real.reshape(*real.shape, *sizes).movedim((0, 1), (batch_dim, dim))
                    kept = torch.where(shaped, kept, kept.new_zeros(()))
            made.append(kept)
        return tree.build(made)
