"""A frozen prefix rewritten for inference: a copy with batch norms folded, in another memory format or dtype.

The copy has weights of its own: the user's model is never touched. What can be folded is read from one recorded
forward rather than from a graph, so that it does not matter how the model is written: a batch norm goes into a layer
where it is all that reads that layer's output. Whether the copy computes what the prefix does is for others to compare.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cachefreeze.errors import UsageError
from cachefreeze.freezing import FrozenLock
from cachefreeze.running import convolves_in_tf32
from cachefreeze.splitting import BoundaryTensor, Parts
from cachefreeze.splitting.boundary import as_tuple
from cachefreeze.splitting.fx_executor import Prefix
from cachefreeze.splitting.replay_prefix import ReplayPrefix
from cachefreeze.splitting.segment import plan_of
from cachefreeze.tracing import METADATA, Example

# exact types: a subclass may compute anything
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (*_CONVOLUTIONS, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# what images and videos are laid out as; other tensors have no channels to move
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


# How far rows may be from the exact ones by default: folding and layouts round in the last digits, a half precision in
# its own. Rounding alone is far below: MobileNetV2 and ResNet-18 show 1e-5 and 3e-7 in float32.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Optimized:
    """What a prefix may become where ``prefix="optimized"``.

    Attributes:
        dtype: In which the copy computes, bfloat16 or float16; None: in the model's own.
        tolerance: How far activations may be from the exact ones, relative to a sample's largest magnitude. None: 1e-3
            in float32, 5e-3 in float16 and TF32, 2e-2 in bfloat16, whether asked for by ``dtype`` or by ``autocast=``.
        compile: Whether to try ``torch.compile``: None where the fill is predicted to be long enough to pay for it.

    Raises:
        UsageError: Another dtype, or a tolerance that is not above 0.
    """

    dtype: torch.dtype | None = None
    tolerance: float | None = None
    compile: bool | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in _HALVES.values():
            raise UsageError(f"Optimized(dtype={self.dtype}): expected None, torch.bfloat16 or torch.float16")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise UsageError(
                f"Optimized(tolerance={self.tolerance}): expected a share of the largest magnitude, 0 to 1"
            )

    @classmethod
    def of(cls, prefix: str | Optimized) -> Optimized | None:
        """What ``prefix=`` asks for; None for ``exact``.

        Raises:
            UsageError: It is none of the words.
        """
        if isinstance(prefix, Optimized):
            return prefix
        words: dict[str, Optimized | None] = {"exact": None, "optimized": cls()}
        words |= {f"optimized:{name}": cls(dtype=dtype) for name, dtype in _HALVES.items()}
        if not isinstance(prefix, str) or prefix not in words:
            raise UsageError(f"prefix={prefix!r}: expected one of {', '.join(words)}, or a cachefreeze.Optimized")
        return words[prefix]

    def allowed(self, autocast: torch.dtype | None, device: torch.device) -> float:
        """The tolerance, for a prefix that runs in this autocast state.

        A GPU's convolutions in TF32 have float16's ten bits, and the exact ones are no more exact than that.
        """
        if self.tolerance is not None:
            return self.tolerance
        tf32 = device.type == "cuda" and convolves_in_tf32()
        computed = self.dtype or autocast or (torch.float16 if tf32 else torch.float32)
        return _TOLERANCE.get(computed, _TOLERANCE[torch.float32])


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a copy of a prefix is rewritten; batch norms are always folded where they can be.

    Attributes:
        channels_last: Whether images, videos and their kernels have their channels last in memory.
        dtype: Of its weights and of what it computes; None: as they are.
        compiled: Whether ``torch.compile`` makes its code.
    """

    channels_last: bool = False
    dtype: torch.dtype | None = None
    compiled: bool = False

    def __str__(self) -> str:
        words = [
            "folded",
            "" if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "channels_last" if self.channels_last else "",
            "compiled" if self.compiled else "",
        ]
        return ", ".join(word for word in words if word)


class InferenceCopy:
    """A prefix with weights of its own; called as the prefix of the split is, in eval mode without gradients.

    Args:
        parts: The split; nothing of it is changed.
        form: How to rewrite the copy.
        example: Real inputs on the model's device, of which two samples are recorded.

    Attributes:
        folded: How many batch norms went into the layer before them.

    Raises:
        Exception: Of any type, what modules raise that cannot be copied; ValueError where ``form`` does not suit.
    """

    def __init__(self, parts: Parts, form: Form, example: Example) -> None:
        self._tensors = parts.boundary.tensors
        self._kind: _FxCopy | _ReplayCopy
        if isinstance(parts.prefix, Prefix):
            self._kind = _FxCopy(parts.prefix)
        else:
            self._kind = _ReplayCopy(parts)
        _unlock(self._kind.root)
        self.folded = _fold(self._kind, example.take([0, 1]).fresh())
        self._eager = self._kind.prefix()
        self.become(form)

    def become(self, form: Form) -> None:
        """Take another form; what a half precision has lost does not come back.

        Raises:
            Exception: As when it is made; it then has its weights in that form, and is not compiled.
        """
        self.form = form
        self._compiled: nn.Module | None = None
        self._compiled_size: int | None = None
        for owner, name, tensor in self._kind.own_tensors():
            owner[name] = _like(tensor, self._convert(tensor.detach()))
        if form.compiled:
            self._compiled = self._kind.compiled()

    @property
    def has_convolutions(self) -> bool:
        """Whether a memory format can matter."""
        return any(isinstance(module, _CONVOLUTIONS) for module in self._kind.before())

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """What the prefix makes of these inputs, within rounding, in the order of ``boundary.tensors``."""
        given = Example(*pytree.tree_map(self._input, (args, kwargs)))
        made = given.call(self._runner(given))
        return tuple(row.to(spec.dtype) for row, spec in zip(as_tuple(made), self._tensors, strict=True))

    def _runner(self, given: Example) -> Any:
        """Compiled code is for one batch size, the first: the last samples of a batch are too few to compile for."""
        if self._compiled is None:
            return self._eager
        self._compiled_size = self._compiled_size or given.batch
        return self._compiled if given.batch == self._compiled_size else self._eager

    def _input(self, leaf: Any) -> Any:
        return self._convert(leaf) if isinstance(leaf, Tensor) else leaf

    def _convert(self, tensor: Tensor) -> Tensor:
        """A floating tensor in this form."""
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor if self.form.dtype is None else tensor.to(self.form.dtype)
        last = _CHANNELS_LAST.get(tensor.dim(), torch.contiguous_format)
        return tensor.contiguous(memory_format=last if self.form.channels_last else torch.contiguous_format)


class _FxCopy:
    """A copy of a prefix that is a traced graph: it holds what runs before the boundary and nothing else."""

    def __init__(self, prefix: Prefix) -> None:
        self._prefix = copy.deepcopy(prefix)
        self.root: nn.Module = self._prefix

    def prefix(self) -> nn.Module:
        """What to call."""
        return self._prefix

    def before(self) -> list[nn.Module]:
        """Modules that run before the boundary."""
        return list(self.root.modules())

    def own_tensors(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """Where each weight and buffer of the copy is kept."""
        return _tensors_of(self.before(), frozenset())

    def compiled(self) -> nn.Module:
        """The same prefix with its graph compiled; fixed sizes make the faster code."""
        made = copy.copy(self._prefix)
        made.__dict__["_modules"] = {"graph": torch.compile(self._prefix.graph, dynamic=False)}
        return made


class _ReplayCopy:
    """A copy of the model for a prefix that runs the model's own forward; what trains is shared, never changed."""

    def __init__(self, parts: Parts) -> None:
        site, _ = parts.origin
        shared = [p for name, p in site.model.named_parameters() if name not in site.frozen]
        self.root: nn.Module = copy.deepcopy(site.model, {id(p): p for p in shared})
        self._site = replace(site, model=self.root)
        planned = plan_of(parts)
        self._plan = replace(planned, shared=planned.shared.apart())
        self._shared = frozenset(map(id, shared))

    def prefix(self) -> nn.Module:
        """What to call, of the modules as they are now; they are in eval mode already."""
        return ReplayPrefix(self._site, self._plan)

    def before(self) -> list[nn.Module]:
        """Modules that run before the boundary."""
        return [self.root.get_submodule(name) for name in self._site.before]

    def own_tensors(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """Where each weight and buffer of the copy is kept that no trainable module shares."""
        return _tensors_of(list(self.root.modules()), self._shared)

    def compiled(self) -> nn.Module:
        """Refused."""
        raise ValueError("a prefix that is replayed through the model's own forward is not compiled")


def _tensors_of(modules: list[nn.Module], shared: frozenset[int]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for module in modules:
        for kept in (module._parameters, module._buffers):
            for name, tensor in list(kept.items()):
                if tensor is not None and id(tensor) not in shared:
                    yield kept, name, tensor


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """``values`` as what ``tensor`` is, a frozen parameter or a buffer."""
    return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values


def _unlock(root: nn.Module) -> None:
    """Take the locks off a copy, which stays in eval mode anyway: compiled code would have to look at them."""
    root.eval()
    for module in root.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, FrozenLock)]:
            del module._forward_pre_hooks[key]


# --- folding ---


def _fold(made: _FxCopy | _ReplayCopy, some: Example) -> int:
    """Fold every batch norm of a copy that can be; returns how many."""
    before = made.before()
    prefix = made.prefix()
    with _recorded(before) as record:
        result = some.call(prefix)
    pairs = record.foldable(as_tuple(result))
    for layer, norm in pairs:
        _fold_pair(layer, norm)
    folded = {id(norm) for _, norm in pairs}
    for module in made.root.modules():
        for name, child in module._modules.items():
            if id(child) in folded:  # under whatever names it is registered
                module._modules[name] = nn.Identity().eval()
    return len(pairs)


def _fold_pair(layer: nn.Module, norm: nn.Module) -> None:
    """Give a layer the weights with which it computes what the norm made of its output; in double precision.

    y = (w x + b - mean) * gamma / sqrt(var + eps) + beta, channel by channel.
    """
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    mean, variance = norm._buffers["running_mean"], norm._buffers["running_var"]
    gamma, beta = norm._parameters["weight"], norm._parameters["bias"]
    assert weight is not None
    assert mean is not None
    assert variance is not None
    scale = (variance.double() + norm.eps).rsqrt()  # type: ignore[operator]
    scale = scale if gamma is None else scale * gamma.detach().double()
    shift = -mean.double() if bias is None else bias.detach().double() - mean.double()
    offset = shift * scale if beta is None else shift * scale + beta.detach().double()
    scaled = weight.detach().double() * scale.view(-1, *[1] * (weight.dim() - 1))
    for name, values in (("weight", scaled), ("bias", offset)):
        layer._parameters[name] = nn.Parameter(values.to(weight.dtype), requires_grad=False)


class _Record(TorchFunctionMode):
    """Which module made what of what in one forward, and how many functions read each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[nn.Module, list[tuple[Any, Any]]] = defaultdict(list)
        self._reads: Counter[int] = Counter()
        self._alive: list[Tensor] = []  # an id is no one's while its tensor lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in METADATA and (name != "__get__" or isinstance(result, Tensor)):
            read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._reads.update(map(id, read))
            self._alive += read
        return result

    def note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A module was called."""
        self._calls[module].append((args[0] if len(args) == 1 else None, output))

    def foldable(self, results: tuple[Tensor, ...]) -> list[tuple[nn.Module, nn.Module]]:
        """Layers, each with the batch norm that alone reads its output."""
        crossing = {id(tensor) for tensor in results}
        makers = {
            id(calls[0][1]): module
            for module, calls in self._calls.items()
            if type(module) in _LAYERS and len(calls) == 1 and self._reads[id(module.weight)] == 1
        }
        pairs = []
        for norm, calls in self._calls.items():
            given = calls[0][0]
            layer = makers.get(id(given))
            if layer is None or len(calls) > 1 or type(norm) not in _NORMS or self._reads[id(given)] != 1:
                continue
            if id(given) in crossing or norm._buffers.get("running_var") is None:
                continue
            if isinstance(layer, nn.Linear) and given.dim() != 2:  # of sequences it normalises the steps
                continue
            pairs.append((layer, norm))
        return pairs


@contextmanager
def _recorded(modules: list[nn.Module]) -> Iterator[_Record]:
    """A record of the calls of those modules that nobody else listens to: a hook would see another output."""
    record = _Record()
    silent = [m for m in dict.fromkeys(modules) if not (m._forward_hooks or m._forward_pre_hooks)]
    handles = [m.register_forward_hook(record.note) for m in silent if type(m) in (*_LAYERS, *_NORMS)]
    try:
        with torch.no_grad(), record:
            yield record
    finally:
        for handle in handles:
            handle.remove()


# --- comparing ---

# Of the largest magnitude in a batch: a sample that is all but zero has no digits to lose.
_NEGLIGIBLE = 1e-3


def relative_error(specs: tuple[BoundaryTensor, ...], exact: list[Tensor], rows: list[Tensor]) -> float:
    """Largest difference of a sample's activations relative to their largest magnitude; infinite where none is finite.

    Args:
        specs: Of the boundary.
        exact: What the exact prefix makes, a tensor per boundary tensor.
        rows: What to compare with it.
    """
    worst = 0.0
    for spec, wanted, got in zip(specs, exact, rows, strict=True):
        if torch.equal(wanted, got):
            continue
        if wanted.shape != got.shape or not wanted.is_floating_point():
            return float("inf")
        a, b = (t.movedim(spec.batch_dim, 0).reshape(t.shape[spec.batch_dim], -1).double() for t in (wanted, got))
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return float("inf")
        a, b = a.where(finite, 0.0), b.where(finite, 0.0)
        largest = a.abs().amax(1)
        scale = largest.clamp(min=_NEGLIGIBLE * float(largest.max()))
        error = float(((a - b).abs().amax(1) / scale).max())
        worst = max(worst, error) if error == error else float("inf")
    return worst
