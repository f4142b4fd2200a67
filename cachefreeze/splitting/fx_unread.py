"""Rows that a traced suffix takes and that decide nothing: what a block hands on, and no one uses (CoaT, SelecSLS)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from cachefreeze.isolation import preserved_random_state, preserved_state
from cachefreeze.splitting.boundary import BoundaryTensor, Site


def unread_rows(suffix: nn.Module, rows: list[Tensor], site: Site) -> frozenset[int]:
    """Which rows the suffix does not need.

    No gradient comes to them, no output is fake where they are, and with NaN in their place outputs and buffers are as
    before, in both modes. The verification of the split then sees them no more.

    Args:
        suffix: Takes ``rows``.
        rows: Of two samples.
        site: Where the model is cut.
    """
    if len(rows) < 2:
        return frozenset()
    try:
        found = _without_gradient(suffix, rows, site)
        decide = found and any(_decide(found, suffix, rows, site, train=train) for train in (False, True))
    except Exception:  # whatever the model's forward raises on a value that is not there, or at all
        return frozenset()
    return frozenset() if decide else found


def absent(row: Tensor, batch: int, shape: tuple[int, ...], batch_dim: int, dtype: torch.dtype) -> Tensor:
    """What stands for a row that is not kept, where ``row`` is one that is."""
    return torch.full((*shape[:batch_dim], batch, *shape[batch_dim:]), float("nan"), dtype=dtype, device=row.device)


def absent_arguments(spec: BoundaryTensor) -> tuple[tuple[int, ...], int, torch.dtype]:
    """The last arguments of :func:`absent`."""
    return spec.shape, spec.batch_dim, spec.dtype


def _without_gradient(suffix: nn.Module, rows: list[Tensor], site: Site) -> frozenset[int]:
    leaves = [row.detach().clone().requires_grad_(row.is_floating_point()) for row in rows]
    with preserved_random_state(), preserved_state(site.model), site.mode(train=False), torch.enable_grad():
        outputs = pytree.tree_leaves(suffix(*[leaf.clone() for leaf in leaves]))
    todo = [leaf.grad_fn for leaf in outputs if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    seen, reached = set(todo), set()
    while todo:
        node = todo.pop()
        reached.add(id(getattr(node, "variable", None)))
        fresh = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= fresh
        todo.extend(fresh)
    return frozenset(at for at, leaf in enumerate(leaves) if leaf.requires_grad and id(leaf) not in reached)


def _decide(found: frozenset[int], suffix: nn.Module, rows: list[Tensor], site: Site, *, train: bool) -> bool:
    """Whether outputs or buffers follow from one of these rows."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = {at: torch.empty_like(rows[at]) for at in found}
    outputs, _ = _run(suffix, rows, site, fake, train=train)
    if any(isinstance(leaf, FakeTensor) for leaf in outputs):
        return True
    nan = {at: torch.full_like(rows[at], float("nan")) for at in found}
    return not _same(_run(suffix, rows, site, nan, train=train), _run(suffix, rows, site, {}, train=train))


def _run(
    suffix: nn.Module, rows: list[Tensor], site: Site, instead: dict[int, Tensor], *, train: bool
) -> tuple[list[Any], list[Tensor]]:
    """The leaves of the output, and the model's buffers afterwards."""
    given = [instead.get(at, row.clone()) for at, row in enumerate(rows)]
    with preserved_random_state(), preserved_state(site.model), site.mode(train=train), torch.no_grad():
        outputs = pytree.tree_leaves(suffix(*given))
        return outputs, [buffer.clone() for buffer in site.model.buffers()]


def _same(got: tuple[list[Any], list[Tensor]], wanted: tuple[list[Any], list[Tensor]]) -> bool:
    pairs = zip([*got[0], *got[1]], [*wanted[0], *wanted[1]], strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
