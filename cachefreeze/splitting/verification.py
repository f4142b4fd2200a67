"""No split is handed out unverified: outputs, gradients, buffers and separability against the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachefreeze.errors import BatchDependentError, SplitError
from cachefreeze.isolation import preserved_buffers, preserved_random_state
from cachefreeze.splitting.boundary import BoundaryTensor, Cut, Site
from cachefreeze.tracing import Example

# Relative to the largest magnitude. The same ops in the same order are bit-equal on the CPU; the allowance is for
# kernels that torch chooses by grad mode (LSTM, nested-tensor attention) and for atomics on a GPU.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# One row computed among other rows: another blocking of the same sums.
_ACROSS_BATCHES = 100.0


def verify(cut: Cut, site: Site, example: Example) -> None:
    """Compare a proposed split with the model.

    Checks, with everything put back afterwards: eval outputs at two batch sizes; that the prefix draws no random
    numbers; that a row does not depend on the batch; train-mode outputs, gradients and buffers from equal seeds.

    Raises:
        SplitError: The split is not the model; the message says in what.
        BatchDependentError: A row depends on the other samples of its batch.
    """
    pairs = [example.take([0, 1]), example.take([0, 1, 2 % example.batch])]
    with preserved_random_state() as random_state, preserved_buffers(site.model):
        with site.mode(train=False), torch.no_grad():
            for some in pairs:
                expected = some.call(site.model)
                random_state.restore()
                rows = _rows(cut, _fresh(some))
                moved = random_state.moved()
                if moved:
                    raise SplitError(
                        f"something before {site.name!r} draws random numbers ({', '.join(moved)}) even in eval mode, "
                        "so no row is fixed; train from an earlier block"
                    )
                _compare("eval output", expected, cut.suffix(*rows), site)
            _check_separable(cut, site, example)
        with site.mode(train=True):
            _compare_training(cut, site, pairs[0])


def _rows(cut: Cut, some: Example) -> list[Tensor]:
    made = some.call(cut.prefix)
    return [row.clone() for row in (made if isinstance(made, tuple) else (made,))]


def _fresh(some: Example) -> Example:
    return some.take(list(range(some.batch)))


def _check_separable(cut: Cut, site: Site, example: Example) -> None:
    together = _rows(cut, example.take([0, 1]))
    for sample in (0, 1):
        alone = _rows(cut, example.take([sample, sample]))
        for spec, all_rows, one in zip(cut.tensors, together, alone, strict=True):
            wanted, got = _sample(all_rows, spec, sample), _sample(one, spec, 0)
            if not _close(wanted, got, _ACROSS_BATCHES):
                raise BatchDependentError(
                    f"a row before {site.name!r} depends on the other samples of its batch (sample {sample}: "
                    f"{_difference(wanted, got)}), so it cannot be cached; train from an earlier block"
                )


def _sample(rows: Tensor, spec: BoundaryTensor, index: int) -> Tensor:
    return rows.select(spec.batch_dim, index)


def _compare_training(cut: Cut, site: Site, some: Example) -> None:
    """One seeded forward and backward of the model and of the split: outputs, gradients, buffers."""
    trained = {n: p for n, p in site.model.named_parameters() if p.requires_grad}
    whole = _train_once(site.model, trained, lambda: _fresh(some).call(site.model))
    split = _train_once(site.model, trained, lambda: cut.suffix(*_rows(cut, _fresh(some))))
    for what, expected, got in zip(("train output", "gradient", "buffer"), whole, split, strict=True):
        _compare(what, expected, got, site)


def _train_once(model: nn.Module, trained: dict[str, nn.Parameter], forward: Any) -> tuple[Any, Any, Any]:
    with preserved_buffers(model):
        torch.manual_seed(0)
        output = forward()
        floats = [
            t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad
        ]
        if not floats:
            raise SplitError("the model's output needs no gradient, so nothing after the boundary can be trained")
        # weights that differ between elements: a plain sum is blind to softmax and to the order of outputs
        loss = sum((t.float() * _weights(t)).sum() for t in floats)
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)  # type: ignore[arg-type]
        gradients = dict(zip(trained, found, strict=True))
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    detached = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)
    return detached, gradients, buffers


def _weights(tensor: Tensor) -> Tensor:
    return torch.cos(torch.arange(tensor.numel(), device=tensor.device, dtype=torch.float32)).view(tensor.shape)


def _compare(what: str, expected: Any, got: Any, site: Site) -> None:
    wanted, spec = pytree.tree_flatten_with_path(expected)
    found, other = pytree.tree_flatten_with_path(got)
    if spec != other:
        raise SplitError(f"{what} of the split at {site.name!r} has another structure than the model's")
    for (path, a), (_, b) in zip(wanted, found, strict=True):
        same = (a is None) == (b is None) and (_close(a, b) if isinstance(a, Tensor) and b is not None else a == b)
        if not same:
            where = pytree.keystr(path) or "it"
            raise SplitError(
                f"{what} of the split at {site.name!r} is not the model's: {where} differs ({_difference(a, b)})"
            )


def _close(a: Tensor, b: Tensor, factor: float = 1.0) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return False
    wanted, got = a[finite].double(), b[finite].double()
    if not wanted.numel():
        return True
    allowed = _TOLERANCE[a.dtype] * factor * max(float(wanted.abs().max()), 1e-6)
    return float((wanted - got).abs().max()) <= allowed


def _difference(a: Any, b: Any) -> str:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.numel():
        return f"largest difference {float((a.double() - b.double()).abs().max()):.2g}"
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return f"shape {tuple(a.shape)} against {tuple(b.shape)}"
    return f"{type(a).__name__} against {type(b).__name__}"
