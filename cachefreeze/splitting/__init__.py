"""Split a model at a boundary into a frozen prefix and a trainable suffix, verified against the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from cachefreeze.blocks import is_stochastic
from cachefreeze.errors import FreezeError, SplitError
from cachefreeze.flops import count_flops
from cachefreeze.freezing import (
    block_list,
    boundary_event,
    boundary_of,
    hooks_of,
    is_locked,
    runs_before,
    stochastic_of,
)
from cachefreeze.isolation import evaluating, preserved_buffers, preserved_parameters
from cachefreeze.listed import SampleLists, example_of
from cachefreeze.padding import Padded
from cachefreeze.splitting.boundary import Boundary, BoundaryTensor, Cut, Executor, Site, Uncopied, rows_of
from cachefreeze.splitting.costs import blocks, blocks_padded
from cachefreeze.splitting.fx_executor import FxExecutor
from cachefreeze.splitting.padded_verification import verify_padded
from cachefreeze.splitting.planner import check_reads
from cachefreeze.splitting.replay_executor import ReplayExecutor
from cachefreeze.splitting.segment import make_segment
from cachefreeze.splitting.verification import verify
from cachefreeze.tracing import Example, Usage, record_usage

__all__ = [
    "Boundary",
    "BoundaryTensor",
    "Cut",
    "Executor",
    "Parts",
    "blocks",
    "blocks_padded",
    "split",
    "split_padded",
    "split_recorded",
    "usage_for",
]

# The first executor whose cut passes the verification is taken; another one plugs in here.
_EXECUTORS: tuple[Executor, ...] = (FxExecutor(), ReplayExecutor())

_LOG = logging.getLogger("cachefreeze")


@dataclass(frozen=True, eq=False)
class Parts(Uncopied):
    """A verified split.

    Attributes:
        model: The user's model.
        prefix: Raw inputs -> activations, over the same Parameter objects as ``model``.
        suffix: Activations -> the model's output, over the same Parameter objects as ``model``.
        boundary: Name of the first trainable block, and the tensors that cross.
        executor: Which executor made the cut.
        cached_fraction: Share of the forward's FLOPs that the cache removes, 0 to 1.
        frozen_after: Names of frozen parameters that lie behind trainable ones, so that the cache spares them nothing.
        origin: Where the model was cut, and the inputs that the split was verified with.
        inputs: Names of the leaves of the model's inputs, where samples have different lengths.
        batches: Padded batches that the split was verified with, and the samples in them; where these have different
            lengths.
    """

    model: nn.Module
    prefix: nn.Module
    suffix: nn.Module
    boundary: Boundary
    executor: str
    cached_fraction: float
    frozen_after: tuple[str, ...]
    origin: tuple[Site, Example] = field(repr=False)
    inputs: tuple[str, ...] = ()
    batches: tuple[tuple[Padded, Sequence[int]], ...] = field(repr=False, default=())

    @property
    def padded(self) -> frozenset[tuple[int, int]]:
        """Input leaves and their dimensions that rows follow, where samples have different lengths."""
        return frozenset((leaf, dim) for tensor in self.boundary.tensors for _, leaf, dim in tensor.follows)

    def follow(self) -> None:
        """Check that prefix and suffix are still the model's own; called at the start of every pass.

        Raises:
            StaleCacheError: A module was replaced after the split.
            FreezeError: What runs before the boundary is in train mode, which rows cannot follow.
        """
        site = self.origin[0]
        if site.by_flags:
            _check_modes(site)
        follow = getattr(self.suffix, "follow", None)
        if follow is not None:
            follow()

    def segment_to(self, deeper: Parts) -> nn.Module:
        """What turns rows here into rows at a deeper boundary of the same model, verified likewise.

        Args:
            deeper: ``split(model, example_inputs, train_from=…)`` at the deeper boundary.

        Returns:
            A module: one tensor per tensor of this boundary, and after them a detector's lists -> what
            ``deeper.prefix`` returns. It runs in eval mode without gradients, and may write into the rows it is given.

        Raises:
            SplitError: ``deeper`` is not deeper, or of another model, or needs what rows here do not hold.
        """
        return make_segment(self, deeper)

    def __repr__(self) -> str:
        tensors = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in self.boundary.tensors)
        return (
            f"Parts({type(self.model).__name__} at {self.boundary.name!r}: {tensors}, "
            f"{self.boundary.bytes_per_sample:,} bytes a sample, {self.cached_fraction:.0%} of the forward cached, "
            f"{self.executor}{self._after})"
        )

    @property
    def _after(self) -> str:
        if not self.frozen_after:
            return ""
        return f"; {len(self.frozen_after)} frozen parameters lie after trainable ones: {self.frozen_after[0]!r}, …"


def split(model: nn.Module, example_inputs: Any, train_from: str | None = None) -> Parts:
    """Find prefix and suffix so that ``suffix(prefix(x))`` is ``model(x)``: outputs, gradients and buffers.

    Args:
        model: Any module. Modes, flags, buffers, gradients and random states are as before afterwards.
        example_inputs: A tensor, a tuple (positional) or a dict (keyword) with a batch of at least 2. Of a detector
            with a fixed input size: its lists, ``(images, targets)``; the suffix takes them after the activations, and
            reads of the images only their sizes.
        train_from: The first module to train. None reads ``requires_grad``.

    Returns:
        The verified parts.

    Raises:
        FreezeError: There is no such module, nothing is frozen, nothing trains, or a frozen part that was
            frozen by hand is still in train mode.
        SplitError: No executor can cut here exactly; the message names the module or op in the way.
    """
    example = example_of(model, example_inputs)
    return split_recorded(model, example, usage_for(model, example), train_from)


def usage_for(model: nn.Module, example: Example) -> Usage:
    """What a forward uses, as :func:`split_recorded` and :func:`split_padded` take it.

    Raises:
        SplitError: There is only one sample.
    """
    if example.batch < 2:
        raise SplitError(
            f"example_inputs hold a batch of {example.batch}; pass at least 2 samples: a split is verified at two "
            "batch sizes, and batch norm cannot train on one"
        )
    return record_usage(model, example)


def split_recorded(model: nn.Module, example: Example, usage: Usage, train_from: str | None = None) -> Parts:
    """:func:`split` on what :func:`usage_for` recorded of the same inputs, in the same autocast state."""
    site = _located(model, usage, train_from)
    with preserved_parameters(site.written):
        return _first_verified(site, example)


def _first_verified(site: Site, example: Example) -> Parts:
    reasons = []
    # a traced graph goes through a list once for every entry that its example has
    for executor in (ReplayExecutor(),) if isinstance(example, SampleLists) else _EXECUTORS:
        try:
            with preserved_buffers(site.model.modules()):  # a frozen module may write one even in eval mode
                cut = executor.cut(site, example)
            rows = verify(cut, site, example)
            flops = check_reads(site, example)
        except SplitError as error:
            reasons.append(str(error))
            continue
        return _parts(cut, site, example, rows, executor.name, flops)
    raise SplitError("; ".join(dict.fromkeys(reasons)))


def split_padded(
    model: nn.Module,
    batches: Sequence[tuple[Padded, Sequence[int]]],
    usage: Usage,
    inputs: tuple[str, ...] = (),
    train_from: str | None = None,
) -> Parts:
    """:func:`split` for samples of different lengths: rows hold content alone, raw inputs are given with them.

    Only the replay executor cuts here: a traced graph has the padded length of its example in it.

    Args:
        model: As for :func:`split`.
        batches: Padded batches and the samples in them: of at least three samples, then of two and padded less, then
            any others. Some samples are in several of them.
        usage: Recorded of the first batch, by :func:`usage_for`.
        inputs: Names of the leaves of the model's inputs: rows are given with these, in this order.
        train_from: As for :func:`split`.

    Raises:
        FreezeError, SplitError: As for :func:`split`.
        BatchDependentError: A row depends on how far its batch is padded.
    """
    site, example = _located(model, usage, train_from), batches[0][0].example
    executor = ReplayExecutor()
    with preserved_parameters(site.written):
        with preserved_buffers(site.model.modules()):
            cut = executor.cut(site, example, batches[1][0].example)
        rows = verify(cut, site, example)
        verify_padded(cut, site, batches)
        made = _parts(cut, site, example, rows, executor.name)
        return replace(made, inputs=inputs, batches=tuple(batches))


def _located(model: nn.Module, usage: Usage, train_from: str | None) -> Site:
    name = train_from if train_from is not None else boundary_of(model, usage)
    if name is None:
        drawing = stochastic_of(model) == "train"
        what = "first module that draws (stochastic='train')" if drawing else "first trainable block"
        raise FreezeError(
            f"nothing of {type(model).__name__} is frozen before its {what}, so there is nothing to cache; freeze "
            f"{'with stochastic=' + repr('eval') if drawing else 'first'}: cf.freeze(model, train_from=…)"
        )
    site = _site(model, name, usage, train_from is None)
    if train_from is None:
        _check_modes(site)
    _check_trainable(site)
    return site


def _parts(
    cut: Cut, site: Site, example: Example, rows: list[Tensor] | None, executor: str, flops: int | None = None
) -> Parts:
    model = site.model
    _tell_of_hooks(site)
    return Parts(
        model=model,
        prefix=cut.prefix,
        suffix=cut.suffix,
        boundary=Boundary(name=site.name, tensors=cut.tensors),
        executor=executor,
        cached_fraction=_cached_fraction(cut, model, example.take([0, 1]), rows, flops),
        frozen_after=tuple(n for n, p in model.named_parameters() if not p.requires_grad and n not in site.frozen),
        origin=(site, example),
    )


def _tell_of_hooks(site: Site) -> None:
    """What a user's hook does is part of how rows are made, and then nothing calls it any more."""
    modules = dict(site.model.named_modules(remove_duplicate=False))
    # torch's own (weight norm, pruning) make weights, and do nothing else
    hooked = [n for n in site.before if any(not type(h).__module__.startswith("torch.") for h in hooks_of(modules[n]))]
    if hooked:
        _LOG.warning(
            "forward hooks of frozen modules (%s) run while rows are made and not in cached epochs, where no frozen "
            "module runs; what a hook changes in an output is in the rows, what it does beside that is done no more",
            ", ".join(hooked[:3]) + (", …" if len(hooked) > 3 else ""),
        )


def _site(model: nn.Module, name: str, usage: Usage, by_flags: bool) -> Site:
    event = boundary_event(model, name, usage)
    if by_flags:  # a trainable parameter outside every block may be used before the boundary is called
        trainable = (e for n, e in usage.parameters.items() if model.get_parameter(n).requires_grad)
        event = min([event, *trainable])
    frozen = frozenset(n for n, used in usage.parameters.items() if used < event)
    return Site(model, name, event, usage, tuple(runs_before(model, usage, event)), frozen, by_flags)


def _check_trainable(site: Site) -> None:
    """A tied weight is frozen with its first use, which may leave nothing to train."""
    model = site.model
    if any(p.requires_grad and n not in site.frozen for n, p in model.named_parameters() if n in site.usage.parameters):
        return
    owned = {id(p) for p in model.get_submodule(site.name).parameters()}
    tied = next((n for n, p in model.named_parameters() if id(p) in owned and n in site.frozen), None)
    why = f": it is tied to {tied!r}, which is used before it" if tied else ""
    raise FreezeError(
        f"nothing of {type(model).__name__} is left to train from {site.name!r} on{why}. "
        f"{block_list(model, site.usage)} Train from an earlier one"
    )


def _check_modes(site: Site) -> None:
    """Flags set by hand freeze no statistics and no dropout: say so rather than cache something else."""
    name, module = next(_in_train_mode(site.model, "", set(site.before)), ("", None))
    if module is not None:
        raise FreezeError(
            f"{name!r} ({type(module).__name__}) runs before the boundary {site.name!r} and is in train mode: "
            "requires_grad=False alone freezes neither batch statistics nor dropout. Use "
            f"cf.freeze(model, train_from={site.name!r})"
        )


def _in_train_mode(module: nn.Module, path: str, names: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Those of some modules under ``module`` that train mode changes, and that no lock holds in eval mode."""
    for key, child in module._modules.items():
        if child is None or is_locked(child):  # which holds all that is in it
            continue
        name = f"{path}{key}"
        if child.training and name in names and is_stochastic(child):
            yield name, child
        yield from _in_train_mode(child, f"{name}.", names)


def _cached_fraction(cut: Cut, model: nn.Module, two: Example, rows: list[Tensor] | None, flops: int | None) -> float:
    """What the suffix does not do again, of all that the model does.

    Args:
        cut: Whose suffix.
        model: That was cut.
        two: Samples.
        rows: Of two samples, where there are some already.
        flops: Of the model's forward of two samples, where they were counted already.
    """
    with evaluating(model):
        if flops is None:
            with count_flops() as whole:
                two.fresh().call(model)
            flops = whole.total
        given = rows_of(cut.prefix, two.fresh()) if rows is None else [row.clone() for row in rows]
        with count_flops() as after:
            cut.suffix(*given, *two.beside)
    return max(0.0, 1 - after.total / flops) if flops else 0.0
