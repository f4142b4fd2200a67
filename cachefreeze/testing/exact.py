"""Hold a split against the model itself, by other code than the library's own verification.

Outputs at several batch sizes and on other inputs than the example's, rows by themselves, and several steps of an
optimizer in train mode: outputs, gradients, buffers, weights and random draws.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachefreeze.freezing import freeze
from cachefreeze.isolation import RandomState
from cachefreeze.splitting import Parts, split
from cachefreeze.splitting.boundary import as_tuple
from cachefreeze.testing.traps import Trap
from cachefreeze.tracing import Example

# Batches of samples of the example: its own, fewer in another order, and one sample twice.
_BATCHES = ([0, 1, 2, 3], [2, 0, 1], [1, 1])
# One row computed among others: another blocking of the same sums.
_ACROSS_BATCHES = 1e-4


def assert_exact(trap: Trap, seed: int = 0) -> Parts:
    """Split a trap's model and hold the parts against an equal model that was not split.

    Args:
        trap: The model, its inputs, where to cut, and the tolerance (0: bit for bit).
        seed: Of the model's weights.

    Returns:
        The parts.

    Raises:
        AssertionError: The split is not the model; the message says where.
    """
    inputs = Example.of(trap.inputs())
    whole, other = (_made(trap, inputs, seed) for _ in range(2))
    _seed(seed + 1)
    random_state = RandomState.capture()
    parts = split(other, inputs)
    assert not random_state.moved(), f"split() moved the random state of {random_state.moved()}"
    assert_equal("state of the model that was split", state_of(whole), state_of(other))
    batches = [inputs.take(samples) for samples in _BATCHES] + [another(inputs), another(inputs).take([1, 2])]
    for train, count in ((False, 2), (True, 5), (False, 1), (True, 2)):
        if trap.train_from:  # what was frozen by hand has no lock: its modes stay as they were
            whole.train(train)
            other.train(train)
        made = [rows_of(parts, batch) for batch in batches]
        rows_of(parts, inputs)  # what the prefix saw last is another batch than those that are compared now
        for at, (batch, rows) in enumerate(list(zip(batches, made, strict=True))[-count:]):
            where = f"{'train' if train else 'eval'} batch {at}"
            _steps(where, (whole, other), batch, partial(parts.suffix, *rows), trap.tolerance, train=train)
    _rows_alone(parts, inputs)
    return parts


def _made(trap: Trap, inputs: Example, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = trap.make()  # made twice, not copied: a copy has no hooks on tensors
    if trap.train_from:
        freeze(model, trap.train_from, example_inputs=inputs)
    return model


def another(example: Example) -> Example:
    """Other inputs of the same shapes: floats scaled and turned, ids permuted, masks in another order of samples."""

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return leaf
        if leaf.is_floating_point() or leaf.is_complex():
            return leaf.flip(0) * 0.7
        return leaf.flip(0) if leaf.dtype == torch.bool else leaf.flatten().roll(1).view(leaf.shape)

    args, kwargs = pytree.tree_map(change, (example.args, example.kwargs))
    return Example(args, kwargs)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Weights, buffers, gradients, flags and modes, in copies of their own."""
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "buffers": {name: b.detach().clone() for name, b in model.named_buffers()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
    }


def rows_of(parts: Parts, batch: Example) -> list[Tensor]:
    """What the prefix makes of a batch, in tensors of their own."""
    return [row.clone() for row in as_tuple(batch.fresh().call(parts.prefix))]


def _steps(
    where: str,
    models: tuple[nn.Module, nn.Module],
    batch: Example,
    suffix: Callable[[], Any],
    tolerance: float,
    *,
    train: bool,
) -> None:
    whole, other = models
    found = []
    forwards: list[tuple[nn.Module, Callable[[], Any]]] = [(whole, lambda: batch.fresh().call(whole)), (other, suffix)]
    for model, forward in forwards:
        _seed(len(where) + batch.batch)
        output = opened(forward())
        if train:
            _step(model, output)
        state = state_of(model)
        state.pop("modes")  # what is locked goes back to eval mode when it is called, or at the start of an epoch
        found.append({"output": detached(output), "draws": _draws(), **state})
    assert_equal(where, found[0], found[1], tolerance)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - models draw from the global state


def _draws() -> tuple[Tensor, float, float]:
    return torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002 - models draw from the global state


def _step(model: nn.Module, output: Any) -> None:
    """Plain descent on a loss that weighs every element differently; the gradients stay to be compared."""
    model.zero_grad(set_to_none=True)
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    losses = [(leaf.abs() if leaf.is_complex() else leaf).double().flatten() for leaf in leaves]
    weighed = [(loss * torch.linspace(-1, 1, loss.numel()).double()).sum() for loss in losses]
    torch.stack(weighed).sum().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.05 * parameter.grad)


def _rows_alone(parts: Parts, inputs: Example) -> None:
    together = rows_of(parts, inputs)
    for sample in range(inputs.batch):
        alone = rows_of(parts, inputs.take([sample, sample, sample]))
        for spec, rows, row in zip(parts.boundary.tensors, together, alone, strict=True):
            one, own = rows.select(spec.batch_dim, sample), row.select(spec.batch_dim, 1)
            assert_equal(f"row of sample {sample}", one, own, _ACROSS_BATCHES)


def opened(output: Any) -> Any:
    """A dataclass as its class and its fields, which torch's pytrees do not look into; all else as it is."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return type(output).__name__, {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return output


def detached(tree: Any) -> Any:
    """A tree with every tensor cut from its graph and copied."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def assert_equal(where: str, expected: Any, got: Any, tolerance: float = 0.0) -> None:
    """Compare two trees: structure, types, shapes, dtypes, values bit for bit, or floats within ``tolerance``.

    Raises:
        AssertionError: It says at which path of ``where`` they differ, and by how much.
    """
    wanted, spec = pytree.tree_flatten_with_path(expected)
    found, other = pytree.tree_flatten_with_path(got)
    assert spec == other, f"{where}: another structure: {spec} against {other}"
    for (path, a), (_, b) in zip(wanted, found, strict=True):
        name = f"{where}: {pytree.keystr(path) or 'it'}"
        if not isinstance(a, Tensor):
            assert a == b, f"{name}: {a!r} against {b!r}"
            continue
        assert isinstance(b, Tensor), f"{name}: a tensor against {type(b).__name__}"
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{name}: {a.shape} {a.dtype} against {b.shape} {b.dtype}"
        a, b = (t.to_dense() if t.is_sparse else t for t in (a, b))
        if tolerance and (a.is_floating_point() or a.is_complex()):
            assert torch.allclose(a, b, tolerance, tolerance, equal_nan=True), f"{name}: off by {_largest(a, b):.3g}"
        else:
            assert torch.equal(a.isnan(), b.isnan()), f"{name}: NaN in other places"
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{name}: largest difference {_largest(a, b):.3g}"


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a.to(torch.complex128) - b.to(torch.complex128)).abs().max())
