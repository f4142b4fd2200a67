"""Several trainable parts from one pass over the rows: each has weights of its own, and a place in your optimizer.

The weights of all heads lie in one tensor per parameter, of which every head's own Parameter is a slice. A forward runs
all heads at once, linear layers as larger ones and everything else by ``torch.func.vmap``; what cannot run so runs one
head after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from cachefreeze.batches import map_tensors
from cachefreeze.compiled import CompiledStep
from cachefreeze.errors import UsageError
from cachefreeze.isolation import RandomState, preserved_random_state
from cachefreeze.joint import JointUpdate, attach
from cachefreeze.side_by_side import SharedInput, SideBySide, UnknownOperationError

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
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
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
        self._found: dict[nn.Module, _Found] = {}
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
        return self._run(None, args, kwargs)

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

    def _run(self, then: Callable[[Any], Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, args, kwargs = self._engine.route(*args, **kwargs)
        found = self._places(module)

        def call(tensors: list[Tensor], given: Any) -> Any:
            args, kwargs = given
            with _in_place(found.places, tensors):
                return module(*args, **kwargs)

        run = _Heads(call, then, self._tensors(found.places), (args, kwargs), self.count)
        training = self._engine.model.training
        try:
            made = self._way(found, training, run).run(run)
        except UnknownOperationError:  # a batch that takes another way through the forward than the first one
            del found.ways[training]
            made = self._way(found, training, run).run(run)
        self.reason = found.ways[training].reason
        self.how = "stacked" if self.reason is None else "loop"
        return made

    def _way(self, found: _Found, training: bool, run: _Heads) -> _Way:
        """How heads run in one mode of the model; decided by its first batch."""
        if training not in found.ways:
            found.ways[training] = run.fitting()
            if found.ways[training].reason is not None:
                _LOG.info("heads run one after the other: %s", found.ways[training].reason)
        return found.ways[training]

    def _places(self, module: nn.Module) -> _Found:
        """Where in ``module`` heads have tensors of their own; looked for once for every module."""
        if module not in self._found:
            self._found[module] = _Found(*self._search(module))
        found = self._found[module]
        thawed = next((name for name, parameter in found.frozen if parameter.requires_grad), None)
        if thawed is not None:
            raise UsageError(f"a {thawed} trains now and did not when the heads were made: make them anew")
        return found

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


@dataclass(frozen=True)
class _Way:
    """How all heads run.

    Attributes:
        run: One batch.
        reason: Why one after the other, where they do.
    """

    run: Callable[[_Heads], Any]
    reason: str | None = None


@dataclass(frozen=True)
class _Found:
    """What there is to know of a module that heads run.

    Attributes:
        places: Where heads have tensors of their own.
        frozen: Its other parameters, with their names.
        ways: By the model's mode, how heads run.
    """

    places: list[_Place]
    frozen: list[tuple[str, nn.Parameter]]
    ways: dict[bool, _Way] = field(default_factory=dict)


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
        call: Tensors of one head, and what the module is given -> its output.
        then: Output -> what is asked for in its place.
        tensors: Of all heads: (count, *shape) each.
        given: Arguments of the module; a head may write into them.
        count: Of heads.
    """

    call: Callable[[list[Tensor], Any], Any]
    then: Callable[[Any], Any] | None
    tensors: list[Tensor]
    given: Any
    count: int

    def one(self, tensors: list[Tensor], given: Any) -> Any:
        """What is asked for, of one head."""
        output = self.call(tensors, given)
        return output if self.then is None else self.then(output)

    def side_by_side(self) -> Any:
        """Every tensor with a first dimension of ``count``; operations of all heads are larger ones."""
        with SideBySide(self.tensors) as heads:
            output = self.call(self.tensors, self.given)
        output = heads.with_heads(output, self.count)
        if self.then is None:
            return output
        try:
            with SideBySide([output] if isinstance(output, Tensor) else pytree.tree_leaves(output)) as heads:
                found = self.then(output)
            return heads.with_heads(found, self.count)
        except UnknownOperationError:
            return vmap(self.then, randomness="same")(output)

    def at_once(self) -> Any:
        """The same, by vmap."""
        with SharedInput():
            return vmap(self.one, in_dims=(0, None), randomness="same")(self.tensors, self.given)

    def one_by_one(self) -> Any:
        """The same, one head after the other: with the same random draws, each on a batch of its own."""
        if self.count == 1:
            outputs = [self.one([tensor[0] for tensor in self.tensors], self.given)]
        else:
            state = RandomState.capture()
            of_heads = [tensor.unbind(0) for tensor in self.tensors]
            outputs = []
            for head in range(self.count):
                state.restore()
                tensors = [parts[head] for parts in of_heads]
                outputs.append(self.one(tensors, map_tensors(Tensor.clone, self.given)))
        return pytree.tree_map(_together, *outputs)

    @torch.no_grad()
    def fitting(self) -> _Way:
        """The first way that gives what one head after the other gives; of this batch, which it leaves as it is."""
        wanted = self._tried(_Heads.one_by_one)
        reason = None
        for way in (_Heads.side_by_side, _Heads.at_once):
            reason = self._unfit(way, *wanted)
            if reason is None:
                return _Way(way)
        return _Way(_Heads.one_by_one, reason)

    def _unfit(self, way: Callable[[_Heads], Any], drawn: RandomState, wanted: list[Tensor]) -> str | None:
        """Why the heads cannot run so. Buffers and random states stay."""
        try:
            also_drawn, found = self._tried(way)
        except Exception as error:  # whatever cannot be done at once, a loop can
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
