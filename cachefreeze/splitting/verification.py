"""No split is handed out unverified: outputs, gradients, buffers and separability against the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cachefreeze import trees
from cachefreeze.errors import BatchDependentError, SplitError, first_line
from cachefreeze.isolation import RandomState, preserved_random_state, preserved_state, seed_generators
from cachefreeze.splitting.boundary import BoundaryTensor, Cut, Site, rows_of
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
# Rounding among other samples, over rounding in batches of other sizes.
_AMPLIFIED = 10.0
_ROUNDING_AT_MOST = 1e-2
# Samples of the example whose rows are compared with what each gives alone.
_SAMPLES = 8
# Copies of a sample that is alone: of a single one kernels may be others.
_ALONE = 2
# Training steps compared: what is random in one of them may take the same way by chance.
_SEEDS = 2


def verify(cut: Cut, site: Site, example: Example) -> list[Tensor]:
    """Compare a proposed split with the model.

    Checks, with everything put back afterwards: eval outputs at two batch sizes; that the prefix draws no random
    numbers; that a row does not depend on the batch; train-mode outputs, gradients and buffers from equal seeds.

    Returns:
        The rows of two samples.

    Raises:
        SplitError: The split is not the model; the message says in what.
        BatchDependentError: A row depends on the other samples of its batch.
    """
    pool, two = _differing(example)
    # a few samples make the second batch; of many only the rows are made for all
    few = 2 < pool.batch <= _SAMPLES
    batches = [two, list(range(pool.batch)) if few else [*two, two[0]]]
    written: str | None = None
    with preserved_random_state() as random_state, preserved_state(site.model):
        made = _make_rows(cut, site, pool, batches, random_state)
        with site.mode(train=False), torch.no_grad():
            for samples, rows in zip(batches, made.together, strict=False):
                some = pool.take(samples)
                random_state.restore()  # a suffix may be random even in eval mode
                expected, found = _call_model(site, some)
                written = written or found
                random_state.restore()
                with preserved_state(site.model):
                    got = trees.without_generation_caches(suffix_of(cut, _copies(rows), site, some.fresh()))
                compare("eval output", expected, got, site)
            if written is not None:
                raise SplitError(written)
        with site.mode(train=True), torch.enable_grad():
            _check_separable(cut, site, pool, made)
            for seed in range(_SEEDS):
                if not _compare_training(cut, site, pool.take(two), made.together[0], seed):
                    break  # nothing is random, and every seed the same
    return made.together[0]


class _Made(NamedTuple):
    """Rows of batches, of which samples each is, and the rows of each sample alone."""

    batches: list[list[int]]
    together: list[list[Tensor]]
    alone: dict[int, list[Tensor]]


def _make_rows(cut: Cut, site: Site, pool: Example, batches: list[list[int]], random_state: RandomState) -> _Made:
    """Run the prefix over batches in eval mode, and over each sample alone in the mode that a fill runs in.

    Nothing is put back in between: what rows owe to earlier forwards shows.

    Raises:
        SplitError: The prefix draws random numbers.
    """
    with preserved_state(site.model) as attributes:
        with site.mode(train=False), torch.no_grad():
            together = [rows_of(cut.prefix, pool.take(samples).fresh()) for samples in batches]
            if pool.batch > _SAMPLES:
                batches = [*batches, list(range(_SAMPLES))]
                together.append(rows_of(cut.prefix, pool.fresh()))
        with site.mode(train=True), torch.enable_grad():
            samples = sorted({sample for batch in batches for sample in batch})
            alone = {sample: rows_of(cut.prefix, pool.take([sample] * _ALONE)) for sample in samples}
        moved = [*random_state.moved(), *attributes.drawn()]
    if moved:
        raise SplitError(
            f"something before {site.name!r} draws random numbers ({', '.join(moved)}) even in eval mode, so no row is "
            "fixed; train from an earlier block"
        )
    return _Made(batches, together, alone)


def _call_model(site: Site, some: Example) -> tuple[Any, str | None]:
    """The model's output, and what is wrong where a frozen module writes a buffer even in eval mode."""
    frozen = [(name, site.model.get_submodule(name)) for name in site.before]
    buffers = [(name, m, key, b, b.clone()) for name, m in frozen for key, b in m.named_buffers(recurse=False)]
    with preserved_state(site.model):
        output = trees.without_generation_caches(some.fresh().call(site.model))
        for name, module, key, buffer, value in buffers:
            now = module._buffers.get(key)
            if now is not buffer or not torch.equal(now.nan_to_num(0), value.nan_to_num(0)):
                return output, (
                    f"{name!r} ({type(module).__name__}) runs before {site.name!r} and writes its buffer {key!r} even "
                    "in eval mode, so rows would depend on what was computed before them; train from it"
                )
    return output, None


def _copies(rows: list[Tensor]) -> list[Tensor]:
    """Rows for a suffix, which may write into them."""
    return [row.clone() for row in rows]


def suffix_of(cut: Cut, rows: list[Tensor], site: Site, some: Example) -> Any:
    """What the suffix makes of the rows of some samples; raises SplitError where it cannot run."""
    try:
        return cut.suffix(*rows, *some.beside)
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:  # the model itself ran
        kind = type(error).__name__
        raise SplitError(f"the suffix cut at {site.name!r} cannot run: {kind}: {first_line(error)}") from error


def _differing(example: Example) -> tuple[Example, list[int]]:
    """Samples of which two differ, and these two: equal ones would show no dependence on a batch.

    Where all are equal, there is noise beside the first.
    """
    for other in range(1, example.batch):
        if any(not torch.equal(a, b) for a, b in example.take([0, other]).first_two()):
            return example, [0, other]
    pair = example.take([0, 1]).fresh()
    generator = torch.Generator().manual_seed(0)
    for _, second in pair.first_two():
        if second.is_floating_point():
            second.copy_(torch.randn(second.shape, generator=generator))
    return pair, [0, 1]


def _check_separable(cut: Cut, site: Site, pool: Example, made: _Made) -> None:
    """Compare each sample's rows in batches with those it has alone: no other samples, another number of them."""
    for samples, together in zip(made.batches, made.together, strict=True):
        for at, sample in enumerate(samples):
            for number, spec in enumerate(cut.tensors):
                wanted, got = _sample(together[number], spec, at), _sample(made.alone[sample][number], spec, 0)
                if not close(wanted, got, _ACROSS_BATCHES) and not _rounds_as_much(
                    cut, pool, sample, number, got, wanted
                ):
                    if _amplifies_rounding(cut, pool, sample, number, wanted, got):
                        raise BatchDependentError(
                            f"a row before {site.name!r} follows rounding, which differs between batches (sample "
                            f"{sample}: {difference(wanted, got)}): inputs that differ in their last bit move it as "
                            "far, so it cannot be cached; are these real inputs, and weights and batch statistics that "
                            "fit them? If so, train from an earlier block"
                        )
                    raise BatchDependentError(
                        f"a row before {site.name!r} depends on the other samples of its batch (sample {sample}: "
                        f"{difference(wanted, got)}), so it cannot be cached; train from an earlier block"
                    )


def _amplifies_rounding(cut: Cut, example: Example, sample: int, number: int, row: Tensor, other: Tensor) -> bool:
    """Whether a row moves about as far where the last bit of its inputs does: then no other sample is to blame."""
    if not row.is_floating_point() or row.shape != other.shape:
        return False
    copies = example.take([sample] * 3)
    moved = copies.map(lambda t: t * (1 + torch.finfo(t.dtype).eps) if t.is_floating_point() else t)
    spec = cut.tensors[number]
    exact, nudged = (_sample(rows_of(cut.prefix, some)[number], spec, 0).double() for some in (copies, moved))
    return float((row.double() - other.double()).abs().max()) <= _AMPLIFIED * float((exact - nudged).abs().max())


def _rounds_as_much(cut: Cut, example: Example, sample: int, number: int, row: Tensor, other: Tensor) -> bool:
    """Whether a row differs by no more than its own rounding in batches of other sizes of the very same sample.

    A deep network may amplify one unit in the last place to any size. A row that depends on its batch differs among
    other samples far more than among copies of its own.
    """
    if not row.is_floating_point() or row.shape != other.shape or not (row.isfinite().all() and other.isfinite().all()):
        return False
    spec = cut.tensors[number]
    noise = 0.0
    for count in (3, 4, 5, 8):
        copies = _sample(rows_of(cut.prefix, example.take([sample] * count))[number], spec, 0)
        noise = max(noise, float((copies.double() - row.double()).abs().max()))
    if noise > _ROUNDING_AT_MOST * float(
        row.double().abs().max()
    ):  # no rounding: a row that depends on the batch's size
        return False
    return float((other.double() - row.double()).abs().max()) <= _AMPLIFIED * noise


def _sample(rows: Tensor, spec: BoundaryTensor, index: int) -> Tensor:
    return rows.select(spec.batch_dim, index)


def _compare_training(cut: Cut, site: Site, some: Example, rows: list[Tensor], seed: int) -> bool:
    """One seeded forward and backward of the model and of the split: outputs, gradients, buffers, random draws.

    Returns:
        Whether anything was drawn.
    """
    try:
        whole = train_once(site.model, lambda: some.fresh().call(site.model), seed)
    except SplitError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise SplitError(
            f"{type(site.model).__name__} itself cannot be trained on these inputs: {first_line(error)}"
        ) from error
    try:
        split = train_once(site.model, lambda: suffix_of(cut, _copies(rows), site, some.fresh()), seed)
    except SplitError:
        raise
    except RuntimeError as error:  # the model's own backward went through
        raise SplitError(f"the suffix cut at {site.name!r} cannot be trained: {first_line(error)}") from error
    for what, expected, got in zip(("train output", "gradient", "buffer"), whole[:3], split[:3], strict=True):
        compare(what, expected, got, site)
    if whole[3] != split[3]:
        raise SplitError(f"the split at {site.name!r} draws other random numbers in training than the model")
    with preserved_random_state():
        seed_generators(seed)
        return bool(whole[3] != RandomState.capture().key)


def train_once(model: nn.Module, forward: Any, seed: int) -> tuple[Any, Any, Any, Any]:
    """Output, gradients, buffers and random states of one seeded forward and backward; all put back."""
    parameters = dict(model.named_parameters())
    grads = {name: p.grad for name, p in parameters.items()}
    with preserved_state(model), preserved_random_state(), _no_gradient_hooks(parameters.values()):
        seed_generators(seed)
        try:
            for p in parameters.values():
                p.grad = None
            output = trees.without_generation_caches(forward())
            floats = [t for t in trees.tensors(output) if (t.is_floating_point() or t.is_complex()) and t.requires_grad]
            if not floats:
                raise SplitError("the model's output needs no gradient, so nothing after the boundary can be trained")
            # weights that differ between elements: a plain sum is blind to softmax and to the order of outputs
            loss = sum((_real(t).float() * _weights(_real(t))).sum() for t in floats)
            loss.backward()  # type: ignore[union-attr]
            gradients = {n: None if p.grad is None else _dense(p.grad).clone() for n, p in parameters.items()}
        finally:
            for name, p in parameters.items():
                p.grad = grads[name]
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        moved = RandomState.capture().key
    detached = trees.map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)
    return detached, gradients, buffers, moved


@contextmanager
def _no_gradient_hooks(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Without hooks that run once a gradient is there: an optimizer in the backward would train the model."""
    hooked = [hooks for p in parameters if (hooks := p._post_accumulate_grad_hooks)]
    kept = [dict(hooks) for hooks in hooked]
    for hooks in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(hooked, kept, strict=True):
            hooks.update(before)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def _weights(tensor: Tensor) -> Tensor:
    return torch.cos(torch.arange(tensor.numel(), device=tensor.device, dtype=torch.float32)).view(tensor.shape)


def compare(what: str, expected: Any, got: Any, site: Site) -> None:
    """Raise SplitError unless two trees of values are equal within rounding."""
    wanted, structure = trees.flatten(expected)
    found, other = trees.flatten(got)
    if structure != other:
        raise SplitError(f"{what} of the split at {site.name!r} has another structure than the model's")
    floor = _NEGLIGIBLE * max((_magnitude(leaf) for leaf in wanted if isinstance(leaf, Tensor)), default=0.0)
    names = list(expected) if isinstance(expected, dict) else []
    for at, (a, b) in enumerate(zip(wanted, found, strict=True)):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        if not both and not isinstance(a, (*trees.CONSTANTS, Tensor, torch.dtype, torch.device)):
            raise SplitError(
                f"{what} of {type(site.model).__name__} holds a {type(a).__name__}, which cannot be compared with that "
                f"of the split at {site.name!r}; return tensors, or a dataclass of them"
            )
        same = close(a, b, floor=floor) if both else type(a) is type(b) and a == b
        if not same:
            where = repr(names[at]) if len(names) == len(wanted) else f"leaf {at}" if len(wanted) > 1 else "it"
            raise SplitError(
                f"{what} of the split at {site.name!r} is not the model's: {where} differs ({difference(a, b)})"
            )


def close_rows(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of rows are equal within what another batch size rounds."""
    return close(a, b, _ACROSS_BATCHES)


def _magnitude(tensor: Tensor) -> float:
    """The largest finite magnitude of a floating tensor, 0 for any other."""
    tensor = _real(_dense(tensor))
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    return float(tensor.nan_to_num(0.0, 0.0, 0.0).abs().max())


def close(a: Tensor, b: Tensor, factor: float = 1.0, floor: float = 0.0) -> bool:
    """Equal within ``factor`` times the rounding of the dtype, relative to the largest magnitude."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = _real(_dense(a)), _real(_dense(b))
    if torch.equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(0), b[~finite].nan_to_num(0)):
        return False
    if not torch.equal(a.isnan(), b.isnan()):
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
        a, b = _real(_dense(a)), _real(_dense(b))
        return f"largest difference {float((a.double() - b.double()).abs().max()):.2g}"
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return f"shape {tuple(a.shape)} against {tuple(b.shape)}"
    return f"{type(a).__name__} against {type(b).__name__}"
