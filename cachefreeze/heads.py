"""Several trainable parts from one pass over the rows: each has weights of its own, and a place in your optimizer.

The weights of all heads lie in one tensor per parameter, of which every head's own Parameter is a slice. A forward runs
all heads at once (``torch.func.vmap``); what cannot run so runs one head after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cachefreeze.batches import map_tensors
from cachefreeze.compiled import CompiledStep
from cachefreeze.errors import UsageError
from cachefreeze.isolation import RandomState, preserved_random_state
from cachefreeze.joint import JointUpdate, attach

_LOG = logging.getLogger("cachefreeze")

# Of the largest magnitude: outputs of all heads at once against those of one head after the other. Matrix products of
# another shape round differently.
_TOLERANCE = 1e-4


class Router(Protocol):
    """What heads need of an engine."""

    model: nn.Module
    parts: Any

    def route(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """Which module a call runs, with which arguments."""
        ...

    def arguments(self, inputs: Any, *targets: Any) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
        """What the engine and then the loss take of a batch."""
        ...


class Heads:
    """Copies of what trains, which see the same batches. ``engine.heads(count)`` makes them.

    ::

        heads = engine.heads(3)
        optimizer = torch.optim.SGD([{"params": heads.parameters(i), "lr": lr} for i, lr in enumerate((1, 0.1, 0.01))])
        for x, y in train:
            optimizer.zero_grad()
            heads.losses(loss_fn, x, y).sum().backward()
            optimizer.step()
        heads.load(best)

    Each head trains as it would alone: from the same weights, on the same batches, with the same random draws. Where
    all run at once the matrix products have another shape, so that it is equal within rounding; one after the other it
    is equal bit for bit.

    Args:
        engine: With its loaders made; its boundary stays where it is.
        count: How many.

    Attributes:
        how: ``stacked`` where all heads run at once, ``loop`` where one runs after the other; None before the first
            batch, which decides.
        reason: Why they run one after the other; None where they do not.
    """

    def __init__(self, engine: Router, count: int) -> None:
        if not isinstance(count, int) or count < 1:
            raise UsageError(f"heads({count!r}): expected 1 or more")
        self.how: Literal["stacked", "loop"] | None = None
        self.reason: str | None = None
        self.count = count
        self._engine = engine
        trained = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
        if not trained:
            raise UsageError("nothing of the model trains, so there is nothing to make heads of")
        self._stacked = {name: _copies(p, count) for name, p in trained.items()}
        self._own = {name: [nn.Parameter(part) for part in self._stacked[name]] for name in trained}
        self._buffers: dict[str, Tensor] = {}
        self._found: tuple[nn.Module, list[_Place], list[tuple[str, nn.Parameter]]] | None = None
        self._decided: dict[bool, str | None] = {}  # by the model's mode: why heads run one after the other
        self._names: dict[int, str] = {id(p): name for name, p in trained.items()}
        self._joint: JointUpdate | None = None

    def __len__(self) -> int:
        return self.count

    def named_parameters(self, head: int) -> dict[str, nn.Parameter]:
        """One head's parameters, by their names in the model."""
        return {name: own[head] for name, own in self._own.items()}

    def parameters(self, head: int) -> list[nn.Parameter]:
        """One head's parameters: for a group of an optimizer of your own."""
        return [own[head] for own in self._own.values()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs of all heads: every tensor of the model's output with a first dimension of ``count``."""
        return self._run(lambda output: output, args, kwargs)

    def losses(self, loss_fn: Callable[..., Tensor], inputs: Any, *targets: Any) -> Tensor:
        """(count,): each head's loss of one batch. Their sum's backward gives each head its own gradient.

        Args:
            loss_fn: Output and targets of a batch -> a loss without dimensions.
            inputs: What the loader yields for the model: rows, raw inputs, or a dict batch.
            targets: What the loss takes after the output; for a dict batch the batch itself.
        """
        args, kwargs, targets = self._engine.arguments(inputs, *targets)
        losses: Tensor = self._run(lambda output: loss_fn(output, *targets), args, kwargs)
        return losses

    def attach(self, optimizer: Optimizer) -> None:
        """Let ``optimizer.step`` be one update of all heads, where their groups differ in the learning rate alone.

        Sixteen groups take as long as sixteen optimizers; this takes little longer than one. Groups, schedulers,
        gradients and checkpoints stay each head's own. Equal within rounding, which is tried before.

        Args:
            optimizer: Of all heads' parameters and no others.

        Raises:
            UsageError: Groups differ in more than the rate, or the optimizer's update is not in proportion to the
                rate, for every number on its own (LBFGS, Rprop, ASGD, Adafactor, Muon).
        """
        self._joint = attach(optimizer, self._stacked, self._own)

    def compile_step(self, loss_fn: Callable[..., Tensor], optimizer: Optimizer) -> CompiledStep:
        """As ``engine.compile_step``, for all heads: inputs and targets -> (count,) losses."""

        def compute(inputs: Any, *targets: Any) -> Tensor:
            return self.losses(loss_fn, inputs, *targets)

        return CompiledStep(
            compute,
            optimizer,
            self._engine.model,
            lambda: self._engine.parts,
            written=lambda: [*self._buffers.values()],
        )

    @torch.no_grad()
    def load(self, head: int) -> None:
        """Copy one head's weights and buffers into the model."""
        if not 0 <= head < self.count:
            raise UsageError(f"load({head}): expected a head, 0 to {self.count - 1}")
        for name, parameter in self._engine.model.named_parameters():
            if name in self._own:
                parameter.copy_(self._own[name][head])
        for name, buffer in self._engine.model.named_buffers():
            if name in self._buffers:
                buffer.copy_(self._buffers[name][head])

    def _run(self, then: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, args, kwargs = self._engine.route(*args, **kwargs)
        places = self._places(module)

        def one(tensors: list[Tensor], given: Any) -> Any:
            args, kwargs = given
            with _in_place(places, tensors):
                return then(module(*args, **kwargs))

        run = _Heads(one, self._tensors(places), (args, kwargs), self.count)
        training = self._engine.model.training
        if training not in self._decided:
            self._decided[training] = run.unfit()
            if self._decided[training] is not None:
                _LOG.info("heads run one after the other: %s", self._decided[training])
        self.reason = self._decided[training]
        self.how = "stacked" if self.reason is None else "loop"
        return run.at_once() if self.reason is None else run.one_by_one()

    def _places(self, module: nn.Module) -> list[_Place]:
        """Where in ``module`` heads have tensors of their own; looked for once for every module."""
        if self._found is None or self._found[0] is not module:
            self._found = (module, *self._search(module))
        _, places, frozen = self._found
        thawed = next((name for name, parameter in frozen if parameter.requires_grad), None)
        if thawed is not None:
            raise UsageError(f"a {thawed} trains now and did not when the heads were made: make them anew")
        return places

    def _search(self, module: nn.Module) -> tuple[list[_Place], list[tuple[str, nn.Parameter]]]:
        """Places of parameters that train and of buffers, and the other parameters with their names."""
        buffers = {id(buffer): name for name, buffer in self._engine.model.named_buffers()}
        places: dict[tuple[int, str], _Place] = {}  # modules may share their dicts
        others = []
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if id(parameter) in self._names:
                    places[id(part._parameters), name] = _Place(part._parameters, name, self._names[id(parameter)])
                elif parameter is not None:
                    others.append((name, parameter))
            for name, buffer in part._buffers.items():
                if buffer is not None and id(buffer) in buffers:
                    key = buffers[id(buffer)]
                    places[id(part._buffers), name] = _Place(part._buffers, name, key)
                    if key not in self._buffers:
                        self._buffers[key] = _copies(buffer, self.count)
        return list(places.values()), others

    def _tensors(self, places: list[_Place]) -> list[Tensor]:
        """(count, *shape) for every place; tied weights are one tensor."""
        joined = {key: self._trained(key) for key in dict.fromkeys(place.key for place in places) if key in self._own}
        return [joined[place.key] if place.key in joined else self._buffers[place.key] for place in places]

    def _trained(self, key: str) -> Tensor:
        if self._joint is not None and torch.is_grad_enabled():
            return self._joint.leaf(key)
        joined: Tensor = _Joined.apply(self._stacked[key], *self._own[key])
        return joined


@dataclass(frozen=True)
class _Place:
    """An entry of a module's parameters or buffers, and its name in the model."""

    entries: dict[str, Any]
    name: str
    key: str


@contextmanager
def _in_place(places: Sequence[_Place], tensors: Sequence[Tensor]) -> Iterator[None]:
    """``functional_call`` for modules that are used under several names, which that would not put back."""
    kept = [place.entries[place.name] for place in places]
    try:
        for place, tensor in zip(places, tensors, strict=True):
            place.entries[place.name] = tensor
        yield
    finally:
        for place, tensor in zip(places, kept, strict=True):
            place.entries[place.name] = tensor


@dataclass(frozen=True)
class _Heads:
    """One batch for all heads.

    Attributes:
        one: Tensors of one head, and what the module is given -> what is asked for.
        tensors: Of all heads: (count, *shape) each.
        given: Arguments of the module; a head may write into them.
        count: Of heads.
    """

    one: Callable[[list[Tensor], Any], Any]
    tensors: list[Tensor]
    given: Any
    count: int

    def at_once(self) -> Any:
        """Every tensor with a first dimension of ``count``."""
        with _SharedInput():
            return vmap(self.one, in_dims=(0, None), randomness="same")(self.tensors, self.given)

    def one_by_one(self) -> Any:
        """The same, one head after the other: with the same random draws, each on a batch of its own."""
        if self.count == 1:
            outputs = [self.one([tensor[0] for tensor in self.tensors], self.given)]
        else:
            state = RandomState.capture()
            outputs = []
            for head in range(self.count):
                state.restore()
                tensors = [tensor[head] for tensor in self.tensors]
                outputs.append(self.one(tensors, map_tensors(Tensor.clone, self.given)))
        return pytree.tree_map(_together, *outputs)

    @torch.no_grad()
    def unfit(self) -> str | None:
        """Why the heads cannot run at once, by running this batch both ways. Buffers and random states stay."""
        drawn, wanted = self._tried(_Heads.one_by_one)
        try:
            also_drawn, found = self._tried(_Heads.at_once)
        except Exception as error:  # whatever vmap cannot do, a loop can
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if drawn.key != also_drawn.key:
            return "all at once they draw other random numbers than each alone"
        for a, b in zip(wanted, found, strict=True):
            a, b = a.double(), b.double()
            off, largest = (float(t.abs().max()) if t.numel() else 0.0 for t in (a - b, a))
            if not off <= _TOLERANCE * max(largest, 1e-6):
                return f"all at once they are off by {off:.2g} from each alone"
        return None

    def _tried(self, way: Callable[[_Heads], Any]) -> tuple[RandomState, list[Tensor]]:
        """Random states, and the outputs and tensors that one way makes of copies of the batch and the tensors."""
        tensors = [tensor.clone() for tensor in self.tensors]
        with preserved_random_state():
            made = way(replace(self, tensors=tensors, given=map_tensors(Tensor.clone, self.given)))
            outputs = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]
            return RandomState.capture(), [*outputs, *tensors]


def _together(*parts: Any) -> Any:
    """What heads gave one after the other; what is no tensor is one thing for all of them."""
    return torch.stack(parts) if isinstance(parts[0], Tensor) else parts[0]


def _copies(tensor: Tensor, count: int) -> Tensor:
    return tensor.detach().unsqueeze(0).repeat(count, *([1] * tensor.dim()))


class _Joined(torch.autograd.Function):
    """All heads' slices of one tensor -> that tensor, without copying; its gradient goes to the slices."""

    @staticmethod
    def forward(ctx: Any, stacked: Tensor, *parts: Tensor) -> Tensor:
        return stacked.view_as(stacked)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gradients[0].unbind(0)


# What ``CrossEntropyLoss`` says beside ``ignore_index`` where it is made without arguments.
_PLAIN = {"weight": None, "size_average": None, "reduce": None, "reduction": "mean", "label_smoothing": 0.0}


class _SharedInput(TorchFunctionMode):
    """What heads share need not be as often as there are heads, as it is for vmap: inputs of layers, and targets.

    Linear layers of all heads on one input are one matrix product, and their cross entropies with one target are that
    of a picture with a head at each pixel, in a third of the time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and not kwargs and len(args) == 3:
            return _SharedLinear.apply(*args)
        if func is functional.cross_entropy and len(args) == 2 and _is_plain(kwargs):
            output, target = args
            if output.dim() == 2 and target.dim() == 1:
                return _SharedTarget.apply(output, target, kwargs.get("ignore_index", -100))
        return func(*args, **kwargs)


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # weights that train differ between heads and go through vmap below: here are frozen ones only
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.to(gradients[0].dtype), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        if in_dims[0] is not None or in_dims[1] != 0 or (bias is not None and in_dims[2] != 0):
            return vmap(functional.linear, in_dims=in_dims)(input, weight, bias), 0
        joined = functional.linear(input, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return joined.view(*joined.shape[:-1], info.batch_size, -1), joined.dim() - 1


def _is_plain(kwargs: dict[str, Any]) -> bool:
    return all(key == "ignore_index" or (key in _PLAIN and value == _PLAIN[key]) for key, value in kwargs.items())


class _SharedTarget(torch.autograd.Function):
    """The mean cross entropy of (N, classes) with (N,) classes."""

    @staticmethod
    def forward(output: Tensor, target: Tensor, ignored: int) -> Tensor:
        return functional.cross_entropy(output, target, ignore_index=ignored)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.ignored = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # what trains differs between heads and goes through vmap below
        output, target = ctx.saved_tensors
        with torch.enable_grad():
            again = output.detach().requires_grad_()
            loss = functional.cross_entropy(again, target, ignore_index=ctx.ignored)
        return torch.autograd.grad(loss, again, gradients[0])[0], None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, output: Tensor, target: Tensor, ignored: int) -> tuple[Tensor, int]:
        if in_dims[0] is None or in_dims[1] is not None:
            alone = partial(functional.cross_entropy, ignore_index=ignored)
            return vmap(alone, in_dims=in_dims[:2])(output, target), 0
        pixels = output.movedim(in_dims[0], 2).contiguous()
        targets = target.unsqueeze(1).expand(-1, info.batch_size).contiguous()
        each = functional.cross_entropy(pixels, targets, ignore_index=ignored, reduction="none")
        return each.sum(0) / (target != ignored).sum(), 0
