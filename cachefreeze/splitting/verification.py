"""No split is handed out unverified: outputs, gradients, buffers and separability against the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachefreeze.errors import BatchDependentError, SplitError
from cachefreeze.isolation import preserved_buffers, preserved_random_state, seed_initialised_generators
from cachefreeze.splitting.boundary import BoundaryTensor, Cut, Site
from cachefreeze.tracing import Example

# Relative to the largest magnitude. The same ops in the same order are bit-equal on the CPU; the allowance is for
# kernels that torch chooses by grad mode (LSTM, nested-tensor attention) and for atomics on a GPU.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# One row computed among other rows: another blocking of the same sums.
_ACROSS_BATCHES = 100.0
# Atomics add in any order there, and TF32 keeps 10 bits: still far below what a wrong split would show.
_ON_CUDA = 10.0
# Of the largest value among all tensors compared together: a gradient that is zero but for rounding has no digits.
_NEGLIGIBLE = 1e-3


def verify(cut: Cut, site: Site, example: Example) -> None:
    """Compare a proposed split with the model.

    Checks, with everything put back afterwards: eval outputs at two batch sizes; that the prefix draws no random
    numbers; that a row does not depend on the batch; train-mode outputs, gradients and buffers from equal seeds.

    Raises:
        SplitError: The split is not the model; the message says in what.
        BatchDependentError: A row depends on the other samples of its batch.
    """
    two = _differing(example)
    pairs = [two, two.take([0, 1, 0])]
    with preserved_random_state() as random_state, preserved_buffers(site.model):
        with site.mode(train=False), torch.no_grad():
            for some in pairs:
                random_state.restore()  # a suffix may be random even in eval mode
                expected = some.fresh().call(site.model)
                random_state.restore()
                rows = rows_of(cut, some.fresh())
                moved = random_state.moved()
                if moved:
                    raise SplitError(
                        f"something before {site.name!r} draws random numbers ({', '.join(moved)}) even in eval mode, "
                        "so no row is fixed; train from an earlier block"
                    )
                compare("eval output", expected, suffix_of(cut, rows, site), site)
            _check_separable(cut, site, two)
        with site.mode(train=True), torch.enable_grad():
            _compare_training(cut, site, pairs[0])


def rows_of(cut: Cut, some: Example) -> list[Tensor]:
    """What the prefix makes, in tensors of its own."""
    made = some.call(cut.prefix)
    return [row.clone() for row in (made if isinstance(made, tuple) else (made,))]


def suffix_of(cut: Cut, rows: list[Tensor], site: Site) -> Any:
    """What the suffix makes of rows; raises SplitError where it cannot run."""
    try:
        return cut.suffix(*rows)
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:  # the model itself ran
        first = "".join(str(error).strip().splitlines()[:1])
        raise SplitError(f"the suffix cut at {site.name!r} cannot run: {type(error).__name__}: {first}") from error


def _differing(example: Example) -> Example:
    """Two samples that differ, else noise beside the first: two equal ones would show no dependence on a batch."""
    for other in range(1, example.batch):
        pair = example.take([0, other])
        if any(not torch.equal(a[0], a[1]) for a in _batched(pair)):
            return pair
    pair = example.take([0, 1])
    generator = torch.Generator().manual_seed(0)
    for tensor in _batched(pair):
        if tensor.is_floating_point():
            tensor[1] = torch.randn(tensor[1].shape, generator=generator).to(tensor)
    return pair


def _batched(pair: Example) -> list[Tensor]:
    leaves = pytree.tree_leaves((pair.args, pair.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == 2]


def _check_separable(cut: Cut, site: Site, example: Example) -> None:
    together = rows_of(cut, example.fresh())
    for sample in (0, 1):
        alone = rows_of(cut, example.take([sample] * 3))  # other samples, and another number of them
        for spec, all_rows, one in zip(cut.tensors, together, alone, strict=True):
            wanted, got = _sample(all_rows, spec, sample), _sample(one, spec, 0)
            if not close(wanted, got, _ACROSS_BATCHES):
                raise BatchDependentError(
                    f"a row before {site.name!r} depends on the other samples of its batch (sample {sample}: "
                    f"{difference(wanted, got)}), so it cannot be cached; train from an earlier block"
                )


def _sample(rows: Tensor, spec: BoundaryTensor, index: int) -> Tensor:
    return rows.select(spec.batch_dim, index)


def _compare_training(cut: Cut, site: Site, some: Example) -> None:
    """One seeded forward and backward of the model and of the split: outputs, gradients, buffers."""
    trained = {n: p for n, p in site.model.named_parameters() if p.requires_grad}
    whole = train_once(site.model, trained, lambda: some.fresh().call(site.model))
    try:
        split = train_once(site.model, trained, lambda: suffix_of(cut, rows_of(cut, some.fresh()), site))
    except SplitError:
        raise
    except RuntimeError as error:  # the model's own backward went through
        first = "".join(str(error).strip().splitlines()[:1])
        raise SplitError(f"the suffix cut at {site.name!r} cannot be trained: {first}") from error
    for what, expected, got in zip(("train output", "gradient", "buffer"), whole, split, strict=True):
        compare(what, expected, got, site)


def train_once(model: nn.Module, trained: dict[str, nn.Parameter], forward: Any) -> tuple[Any, Any, Any]:
    """Output, gradients and buffers of one seeded forward and backward."""
    with preserved_buffers(model):
        seed_initialised_generators(0)
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


def compare(what: str, expected: Any, got: Any, site: Site) -> None:
    """Raise SplitError unless two trees of values are equal within rounding."""
    wanted, spec = pytree.tree_flatten_with_path(expected)
    found, other = pytree.tree_flatten_with_path(got)
    if spec != other:
        raise SplitError(f"{what} of the split at {site.name!r} has another structure than the model's")
    floor = _NEGLIGIBLE * max((_magnitude(leaf) for _, leaf in wanted if isinstance(leaf, Tensor)), default=0.0)
    for (path, a), (_, b) in zip(wanted, found, strict=True):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        same = close(a, b, floor=floor) if both else (a is None and b is None) or (a is not None and a == b)
        if not same:
            where = pytree.keystr(path) or "it"
            raise SplitError(
                f"{what} of the split at {site.name!r} is not the model's: {where} differs ({difference(a, b)})"
            )


def _magnitude(tensor: Tensor) -> float:
    """The largest finite magnitude of a floating tensor, 0 for any other."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    return float(tensor.nan_to_num(0.0, 0.0, 0.0).abs().max())


def close(a: Tensor, b: Tensor, factor: float = 1.0, floor: float = 0.0) -> bool:
    """Equal within ``factor`` times the rounding of the dtype, relative to the largest magnitude."""
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
    factor *= _ON_CUDA if a.is_cuda else 1.0
    allowed = _TOLERANCE[a.dtype] * factor * max(float(wanted.abs().max()), floor, 1e-6)
    return float((wanted - got).abs().max()) <= allowed


def difference(a: Any, b: Any) -> str:
    """How two values differ, in words."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.numel():
        return f"largest difference {float((a.double() - b.double()).abs().max()):.2g}"
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return f"shape {tuple(a.shape)} against {tuple(b.shape)}"
    return f"{type(a).__name__} against {type(b).__name__}"
