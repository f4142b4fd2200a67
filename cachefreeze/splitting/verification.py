"""No split is handed out unverified: outputs, gradients, buffers and separability against the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

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
# Training steps compared: what is random in one of them may take the same way by chance.
_SEEDS = 2


def verify(cut: Cut, site: Site, example: Example) -> None:
    """Compare a proposed split with the model.

    Checks, with everything put back afterwards: eval outputs at two batch sizes; that the prefix draws no random
    numbers; that a row does not depend on the batch; train-mode outputs, gradients and buffers from equal seeds.

    Raises:
        SplitError: The split is not the model; the message says in what.
        BatchDependentError: A row depends on the other samples of its batch.
    """
    two, other = _differing(example)
    pairs = [two, two.take([0, 1, 0])]
    before = [site.model.get_submodule(name) for name in site.before]
    with preserved_random_state() as random_state, preserved_state(site.model):
        with site.mode(train=False), torch.no_grad():
            for some in pairs:
                random_state.restore()  # a suffix may be random even in eval mode
                expected = _fresh_call(site, some.fresh().call, site.model)
                random_state.restore()
                with preserved_state(site.model) as attributes:
                    rows = rows_of(cut.prefix, some.fresh())
                    moved = [*random_state.moved(), *attributes.drawn()]
                if moved:
                    raise SplitError(
                        f"something before {site.name!r} draws random numbers ({', '.join(moved)}) even in eval mode, "
                        "so no row is fixed; train from an earlier block"
                    )
                compare("eval output", expected, _fresh_call(site, suffix_of, cut, rows, site, some.fresh()), site)
            _check_unwritten(two, before, site)
            alone: dict[int, list[Tensor]] = {}
            _check_separable(cut, site, two, (0, other), alone)
            _check_separable(cut, site, example, range(min(example.batch, _SAMPLES)), alone)
        with site.mode(train=True), torch.enable_grad():
            for seed in range(_SEEDS):
                _compare_training(cut, site, pairs[0], seed)


def _fresh_call(site: Site, function: Any, *arguments: Any) -> Any:
    """A forward that starts from the model's state as it is, and leaves it so."""
    with preserved_state(site.model):
        return trees.without_generation_caches(function(*arguments))


def suffix_of(cut: Cut, rows: list[Tensor], site: Site, some: Example) -> Any:
    """What the suffix makes of the rows of some samples; raises SplitError where it cannot run."""
    try:
        return cut.suffix(*rows, *some.beside)
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:  # the model itself ran
        kind = type(error).__name__
        raise SplitError(f"the suffix cut at {site.name!r} cannot run: {kind}: {first_line(error)}") from error


def _differing(example: Example) -> tuple[Example, int]:
    """Two samples that differ, else noise beside the first: two equal ones would show no dependence on a batch.

    Returns:
        The pair, and which sample of the example the second one is: -1 for noise.
    """
    for other in range(1, example.batch):
        pair = example.take([0, other])
        if any(not torch.equal(a, b) for a, b in pair.first_two()):
            return pair, other
    pair = example.take([0, 1]).fresh()
    generator = torch.Generator().manual_seed(0)
    for _, second in pair.first_two():
        if second.is_floating_point():
            second.copy_(torch.randn(second.shape, generator=generator))
    return pair, -1


def _check_unwritten(some: Example, before: list[nn.Module], site: Site) -> None:
    """A frozen module that writes a buffer even in eval mode makes rows depend on what was computed before."""
    names = {id(module): name for name, module in site.model.named_modules()}
    buffers = [(m, key, b, b.clone()) for m in before for key, b in m.named_buffers(recurse=False)]
    with preserved_state(site.model):
        some.fresh().call(site.model)
        for module, key, buffer, value in buffers:
            now = module._buffers.get(key)
            if now is not buffer or not torch.equal(now.nan_to_num(0), value.nan_to_num(0)):
                raise SplitError(
                    f"{names[id(module)]!r} ({type(module).__name__}) runs before {site.name!r} and writes its buffer "
                    f"{key!r} even in eval mode, so rows would depend on what was computed before them; train from it"
                )


def _check_separable(
    cut: Cut, site: Site, example: Example, samples: Iterable[int], alone: dict[int, list[Tensor]]
) -> None:
    """Compare rows of the first samples of a batch with those among copies of their own.

    Args:
        cut: The split.
        site: Where it is.
        example: The batch.
        samples: What its first samples are known as in ``alone``.
        alone: Rows made before, to which those made here are added.
    """
    together = rows_of(cut.prefix, example.fresh())
    for sample, known_as in enumerate(samples):
        if known_as not in alone:
            made = rows_of(cut.prefix, example.take([sample] * 3))  # other samples, and another number of them
            alone[known_as] = [_sample(one, spec, 0).clone() for spec, one in zip(cut.tensors, made, strict=True)]
        for number, (spec, all_rows, got) in enumerate(zip(cut.tensors, together, alone[known_as], strict=True)):
            wanted = _sample(all_rows, spec, sample)
            if not close(wanted, got, _ACROSS_BATCHES) and not _rounds_as_much(
                cut, example, sample, number, got, wanted
            ):
                if _amplifies_rounding(cut, example, sample, number, wanted, got):
                    raise BatchDependentError(
                        f"a row before {site.name!r} follows rounding, which differs between batches (sample {sample}: "
                        f"{difference(wanted, got)}): inputs that differ in their last bit move it as far, so it "
                        "cannot be cached; are these real inputs, and weights and batch statistics that fit them? If "
                        "so, train from an earlier block"
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
    for count in (2, 4, 5, 8):
        copies = _sample(rows_of(cut.prefix, example.take([sample] * count))[number], spec, 0)
        noise = max(noise, float((copies.double() - row.double()).abs().max()))
    if noise > _ROUNDING_AT_MOST * float(
        row.double().abs().max()
    ):  # no rounding: a row that depends on the batch's size
        return False
    return float((other.double() - row.double()).abs().max()) <= _AMPLIFIED * noise


def _sample(rows: Tensor, spec: BoundaryTensor, index: int) -> Tensor:
    return rows.select(spec.batch_dim, index)


def _compare_training(cut: Cut, site: Site, some: Example, seed: int) -> None:
    """One seeded forward and backward of the model and of the split: outputs, gradients, buffers, random draws."""
    try:
        whole = train_once(site.model, lambda: some.fresh().call(site.model), seed)
    except SplitError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise SplitError(
            f"{type(site.model).__name__} itself cannot be trained on these inputs: {first_line(error)}"
        ) from error
    try:
        split = train_once(
            site.model, lambda: suffix_of(cut, rows_of(cut.prefix, some.fresh()), site, some.fresh()), seed
        )
    except SplitError:
        raise
    except RuntimeError as error:  # the model's own backward went through
        raise SplitError(f"the suffix cut at {site.name!r} cannot be trained: {first_line(error)}") from error
    for what, expected, got in zip(("train output", "gradient", "buffer"), whole[:3], split[:3], strict=True):
        compare(what, expected, got, site)
    if whole[3] != split[3]:
        raise SplitError(f"the split at {site.name!r} draws other random numbers in training than the model")


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
