"""One forward, recorded: which values it makes, from which others, and where each could be kept and put back.

A forward is followed by tensor identity and version; no tensor is held, so it takes the memory that it takes alone. A
*closed* call is opaque: its modules are frozen, what it returns can be kept, and it need not run again. Everything else
is *glue*, which the suffix runs again. A frozen call whose inputs are random (a functional dropout in a half-frozen
parent) is glue as well: no row could stand for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from cachefreeze import trees
from cachefreeze.errors import SplitError, first_line
from cachefreeze.isolation import RandomState, operation
from cachefreeze.listed import SampleLists, batching_module
from cachefreeze.splitting.contents import READS, SIZES, Contents, contents_read, is_mask
from cachefreeze.splitting.memory import Memory, address_of
from cachefreeze.splitting.replica import replicate
from cachefreeze.splitting.rules import OpenInstead, Rules
from cachefreeze.splitting.tensors import Known, Tensors
from cachefreeze.splitting.values import ClosedCall, Place, Recording
from cachefreeze.tracing import METADATA, Call, Example

# Draws that decide whether a random branch is really random: one that is taken in 1 of 300 is missed in 1 of 28 runs.
_REDRAWS = 1000


def record(model: nn.Module, example: Example, rules: Rules, opened: Iterable[str] = ()) -> Recording:
    """Record one forward in the modes that the modules are in now.

    Raises:
        OpenInstead: A call cannot be closed.
        SplitError: Before the boundary the forward is random, or depends on the batch.
    """
    batching = batching_module(model) if isinstance(example, SampleLists) else None
    recorder = _Recorder(model, rules, frozenset(opened), batching)
    replica, _ = replicate(model, {name: recorder.rewrite(name) for name, _ in model.named_modules()})
    own = example.fresh()
    if batching is None:
        recorder.take_inputs(own)
    try:
        with recorder.memory, recorder:
            output = own.call(replica)
    except NotImplementedError as error:  # higher-order operators (flex attention) do not show what they do
        kind = type(model).__name__
        raise SplitError(f"replay: an operator of {kind} cannot be followed: {first_line(error)}") from error
    recorder.finish(trees.tensors(output))
    return recorder.recording


def check_ids(model: nn.Module, example: Example, rules: Rules, opened: Iterable[str], checks: int) -> None:
    """Refuse a forward that does anything with the other answer to a check of ids but raise an error of its own.

    ``if labels.max() >= classes: raise ValueError`` decides nothing that a row depends on.

    Args:
        model: As recorded.
        example: Likewise.
        rules: Likewise.
        opened: Likewise.
        checks: How many there were.

    Raises:
        SplitError: It goes on.
    """
    for number in range(checks):
        try:
            record(model, example, replace(rules, doubted=number), opened)
        except (SplitError, OpenInstead):
            raise
        except Exception:
            continue


class _Recorder(TorchFunctionMode):
    """Follows tensors by identity and version through one forward."""

    def __init__(self, model: nn.Module, rules: Rules, opened: frozenset[str], batching: str | None) -> None:
        super().__init__()
        self.recording = Recording()
        self.memory = Memory()
        self._model = model
        self._rules = rules
        self._opened = opened
        self._batching = batching  # what makes the one input that is followed, out of lists that are not
        self._calls: dict[tuple[str, int], Call] = {}
        counts: dict[str, int] = {}
        for call in rules.usage.calls:
            number = counts[call.name] = counts.get(call.name, -1) + 1
            self._calls[call.name, number] = call
        self._used = frozenset(counts)
        self._buffers = {id(buffer): name for name, buffer in model.named_buffers()}
        self._pending = {key for key, call in self._calls.items() if rules.closes(call)}
        self._seen: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._last_start = -1
        self._now = 0
        self._tensors = Tensors(self.recording.values, self.memory)
        self._inside: MutableMapping[Tensor, str] = WeakIdKeyDictionary()  # closed module in which it was made
        self._contents = Contents()
        self._start = RandomState.capture()
        self._drawn: MutableMapping[Tensor, Callable[[], Any]] = WeakIdKeyDictionary()  # how to draw it again
        self._closed: str | None = None
        self._touched = False  # the closed call saw a value
        self._decided = False  # and read one into Python
        self._doubting: str | None = None
        self._stack: list[tuple[str, RandomState]] = []

    @property
    def _ended(self) -> bool:
        return len(self.recording.boundaries) == len(self._rules.boundaries)

    @property
    def _checking(self) -> bool:
        return self._rules.strict and not self._ended

    def take_inputs(self, example: Example) -> None:
        for at, leaf in enumerate(pytree.tree_leaves((example.args, example.kwargs))):
            if isinstance(leaf, Tensor) and leaf not in self._tensors:
                self._add(leaf, frozenset(), ("input", "", 0, at), opaque=True)
                self._contents.take_input(leaf, mask=at not in self._rules.ids and is_mask(leaf))

    def finish(self, outputs: list[Tensor]) -> None:
        self._refuse_doubt()
        self.recording.uses.append((self._tick(), self._value_numbers(outputs)))
        self.recording.branches |= any(source in ("numpy", "random") for source in self._start.moved())

    # --- module calls ---

    def rewrite(self, name: str) -> Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]:
        def make(_module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                with self._named(name):
                    return self._call(name, own, args, kwargs)

            return forward

        return make

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Know who runs, and who draws from a random state that no torch function shows."""
        watched = self._checking and self._closed is None
        if watched:
            self._stack.append((name, RandomState.capture()))
        try:
            yield
            if watched and self._checking:
                self._refuse_unseen_draws(self._stack[-1:])
        finally:
            if watched:
                self._stack.pop()

    def _call(self, name: str, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if name not in self._used:  # its forward is called directly: glue of whoever calls it
            return own(*args, **kwargs)
        seen = self._seen[name] = self._seen.get(name, -1) + 1
        call = self._calls.get((name, seen))
        self._pending.discard((name, seen))
        if self._closed is not None:
            return own(*args, **kwargs)
        if call is None or (self._checking and call.start < self._last_start):
            if self._checking:
                self._refuse_order(name)
            return own(*args, **kwargs)
        self._last_start = call.start
        block = self._rules.boundaries.get(call.start)
        if block is not None and block not in self.recording.boundaries:
            return self._enter(block, call, own, args, kwargs)
        return self._run(call, own, args, kwargs)

    def _run(self, call: Call, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = call.name
        number = self._numbers[name] = self._numbers.get(name, -1) + 1
        if not self._ended:
            self.recording.operations.append(f"{name}()")
        with torch._C.DisableTorchFunction():  # what is looked up here is no op of the model
            given = trees.leaves((args, kwargs))
            numbers = self._value_numbers(given)
            random = any(self.recording.values[n].random for n in numbers)
            before = {id(leaf): _version(leaf) for leaf in given if isinstance(leaf, Tensor)}
        if random and self._rules.closes(call):
            self.recording.live.add((name, number))
        if random or (name, number) in self._rules.live or not self._rules.closes(call) or name in self._opened:
            return own(*args, **kwargs)
        state = _torch_state()
        self._closed, self._touched, self._decided = name, False, False
        try:
            result = own(*args, **kwargs)
        finally:
            self._closed = None
        if self._checking and state != _torch_state():
            self._refuse_draw(name, "torch", train=False)
        with torch._C.DisableTorchFunction():
            self._close(name, number, given, numbers, before, result)
        if not self._pending and not self._ended:
            self.recording.settled = (self._tick(), len(self.recording.values), len(self.recording.operations))
        return result

    def _enter(self, block: str, call: Call, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """From here on everything is suffix; the boundary's arguments are values of their own."""
        if self._checking:
            self._refuse_unseen_draws(self._stack)
        outside: dict[int, tuple[Known, int, int]] = {}
        with torch._C.DisableTorchFunction():
            for at, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
                if isinstance(leaf, Tensor) and id(leaf) not in outside and (source := self._number(leaf)) is not None:
                    entered = self._add(leaf, frozenset({source}), ("argument", block, 0, at))
                    self._tensors.arguments.add(entered)
                    known = self._tensors.known(leaf)
                    assert known is not None
                    outside[id(leaf)] = known, source, entered
        self.recording.boundaries[block] = self._tick()
        result = self._run(call, own, args, kwargs)
        for known, source, entered in outside.values():
            if known.number == entered:
                known.number = source
        return result

    def _close(
        self, name: str, number: int, given: list[Any], numbers: frozenset[int], before: dict[int, int], result: Any
    ) -> None:
        found, structure = trees.flatten(result)
        ids = [id(leaf) for leaf in given]
        if not self._touched:  # made of weights and shapes alone, or handed through: the suffix does the same
            for at, leaf in enumerate(found):
                if isinstance(leaf, Tensor):
                    self._inside.pop(leaf, None)
                if name == self._batching and leaf is result[0].tensors:
                    self._add(leaf, frozenset(), ("output", name, number, at), opaque=True)
            self.recording.constant.add((name, number))
            return
        self.recording.uses.append((self._tick(), numbers))
        module = self._model.get_submodule(name)
        again = next(module.parameters(), None) is None
        inputs = numbers if again else frozenset[int]()
        written = []
        for at, leaf in enumerate(given):
            if isinstance(leaf, Tensor) and before[id(leaf)] != _version(leaf) and ids.index(id(leaf)) == at:
                self._tensors.write([leaf], numbers, self._tick)
                changed = self._add(leaf, inputs, ("written", name, number, at), opaque=not again)
                written.append((at, changed))
        described: list[tuple[Any, Any]] = []
        for at, leaf in enumerate(found):
            if trees.is_generation_cache(leaf):
                described.append(("constant", None))
            elif not isinstance(leaf, Tensor):
                if not isinstance(leaf, (*trees.CONSTANTS, torch.dtype, torch.device)):
                    raise OpenInstead(name, f"returns a {type(leaf).__name__}")
                described.append(("constant", leaf))
            elif id(leaf) in ids:
                described.append(("argument", ids.index(id(leaf))))
            else:
                self._inside.pop(leaf, None)
                place: Place = "output", name, number, at
                if self._is_shared(leaf):
                    described.append(("shared", self._tensors.describe(leaf, self._tick(), place)))
                    continue
                described.append(("value", self._add(leaf, inputs, place, opaque=not again)))
        self.recording.closed[name, number] = ClosedCall(name, number, structure, described, written)

    def _is_shared(self, leaf: Tensor) -> bool:
        """Whether what a closed call made follows from weights and shapes alone: no value went into its memory."""
        known = self._rules.shares and self._batching is None and not self._decided and address_of(leaf) != 0
        return known and not self.memory.of(leaf)

    # --- values ---

    def _tick(self) -> int:
        self._now += 1
        return self._now

    def _add(
        self,
        tensor: Tensor,
        inputs: frozenset[int],
        place: Place | None = None,
        *,
        opaque: bool = False,
        random: bool = False,
    ) -> int:
        if place is not None and place[0] != "input" and self._contents.is_pure(tensor):
            place, opaque = None, False  # a mask may be left out where it masks nothing: what it is made of is kept
        return self._tensors.add(tensor, inputs, self._tick(), place, opaque=opaque, random=random)

    def _number(self, leaf: Tensor) -> int | None:
        if leaf in self._inside:
            raise OpenInstead(self._inside[leaf], "makes a tensor that is used outside it")
        if (known := self._tensors.known(leaf)) is not None:
            return known.number
        held = frozenset[int]() if isinstance(leaf, nn.Parameter) else self.memory.of(leaf)
        return self._add(leaf, held) if held else None

    def _value_numbers(self, leaves: list[Any]) -> frozenset[int]:
        found = (self._number(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        return frozenset(number for number in found if number is not None)

    # --- operations ---

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._refuse_doubt()
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = operation(func)
        for leaf in given:
            if id(leaf) in self._buffers:
                self.recording.buffers.setdefault(self._buffers[id(leaf)], self._ended)
        versions = [_version(leaf) for leaf in given]
        watched = self._checking and self._closed is None
        if watched and name not in METADATA and any(id(leaf) in self._rules.trainable for leaf in given):
            self._reach_by_use()
        state = _torch_state() if watched else None
        result = func(*args, **kwargs)
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if not made and name in METADATA:
            if self._checking and name in SIZES and self._contents.has_sized(given):
                self._refuse_read(name)
            return result
        depend = [leaf for leaf in given if leaf in self._tensors or self.memory.of(leaf)]
        self._contents.follow_sizes(name, given, depend, made)
        written = [leaf for leaf, version in zip(given, versions, strict=True) if _version(leaf) != version]
        of_masks = self._contents.follow(name, given, depend, [*made, *written])
        asks_truth = self._follow_read(name, depend, of_masks=of_masks)
        if self._doubting is not None:
            return not result
        if self._closed is not None:
            self._touched = self._touched or bool(depend)
            for leaf in made:
                if leaf not in self._tensors and not any(leaf is other for other in given):
                    self._inside[leaf] = self._closed
            return result
        drew = state is not None and (state != _torch_state() or kwargs.get("generator") is not None)
        if drew:
            self._refuse_eval_draw()
        if asks_truth:
            self.recording.glanced.append((self._tick(), self._value_numbers(given)))
            if self._rules.contrary and isinstance(result, bool) and not self._ended:
                return not result
        else:
            self._glue(name, given, made, written, drew=drew)
        if drew or any(leaf in self._drawn for leaf in given):
            self._follow_draw(name, func, args, kwargs, made, depend)
        return result

    def _glue(self, name: str, given: list[Tensor], made: list[Tensor], written: list[Tensor], *, drew: bool) -> None:
        inputs = self._value_numbers(contents_read(name, given))
        if not self._ended and (inputs or self._batching is None):  # glue goes through lists entry by entry
            self.recording.operations.append(name)
        if inputs:
            self.recording.uses.append((self._tick(), inputs))
            if not made and not written:  # read into Python: the suffix reads it too
                self.recording.reads.append((self._now, inputs))
        self._tensors.write(written, inputs, self._tick, random=drew)
        if inputs:
            for leaf in made:
                if leaf not in self._tensors:
                    self._add(leaf, inputs, random=drew)

    def _reach_by_use(self) -> None:
        """A trainable weight is used by glue before its block is called: the suffix begins here."""
        block = next(iter(self._rules.boundaries.values()))
        self._refuse_unseen_draws(self._stack)
        self.recording.boundaries[block] = self._tick()

    def _follow_read(self, name: str, depend: list[Tensor], *, of_masks: bool) -> bool:
        """Whether an op asks masks alone for a truth value; anything else is not to be read into Python."""
        # ``if mask.all()`` only skips work that would change nothing; everything else may couple samples
        asks_truth = of_masks and (name == "__bool__" or (name == "item" and depend[0].dtype == torch.bool))
        if name in READS and depend:
            self._decided = True
            self.recording.branches |= self._ended
            if self._checking and not asks_truth:
                self._take_check(name, depend)
        return asks_truth

    def _take_check(self, name: str, depend: list[Tensor]) -> None:
        """Ids that are asked for a truth value may only be checked: see :func:`check_ids`."""
        if name != "__bool__" or not all(self._contents.is_pure(leaf) for leaf in depend):
            self._refuse_read(name)
        if self._rules.doubted == self.recording.checks:
            self._doubting = name
        self.recording.checks += 1

    def _follow_draw(self, name: str, func: Any, args: Any, kwargs: Any, made: list[Tensor], depend: list[Any]) -> None:
        """Random numbers that no input went into decide which layers run, where they are read into Python."""
        if depend or not self._checking:
            return
        sources = [self._drawn.get(leaf) if isinstance(leaf, Tensor) else None for leaf in args]

        def again() -> Any:
            fresh = [leaf if source is None else source() for leaf, source in zip(args, sources, strict=True)]
            return func(*fresh, **kwargs)

        if name in READS:
            with torch._C.DisableTorchFunction():
                outcomes = {repr(again()) for _ in range(_REDRAWS)}
            if len(outcomes) > 1:
                self._refuse_random_control_flow()
        for leaf in made:
            self._drawn[leaf] = again

    # --- refusals ---

    @property
    def _before(self) -> str:
        return repr(next(name for name in self._rules.boundaries.values() if name not in self.recording.boundaries))

    @property
    def _where(self) -> str:
        name = self._closed or (self._stack[-1][0] if self._stack else "")
        return f"{name!r} ({type(self._model.get_submodule(name)).__name__})" if name else type(self._model).__name__

    def _refuse_order(self, name: str) -> None:
        raise SplitError(
            f"replay: {name!r} is not called as often, or in another order, than in the forward recorded before: the "
            f"calls before {self._before} depend on the number of samples, on the mode (train or eval), or on chance "
            "(LayerDrop?), so no fixed part of the model runs before the boundary; train from an earlier block"
        )

    def _refuse_read(self, name: str) -> None:
        raise SplitError(
            f"replay: {self._where} reads a value of the batch into Python ({name}) before {self._before}, so a row "
            "may depend on the other samples of its batch; train from an earlier block"
        )

    def _refuse_doubt(self) -> None:
        """With the other answer the forward goes on: it was no check."""
        if self._doubting is not None:
            self._refuse_read(self._doubting)

    def _refuse_draw(self, name: str, source: str, *, train: bool) -> None:
        kind = type(self._model.get_submodule(name)).__name__
        mode = "in train mode, from a generator that decides in Python (random masks, LayerDrop?)" if train else ""
        raise SplitError(
            f"replay: {name or kind!r} ({kind}) draws random numbers ({source}) before {self._before} "
            f"{mode or 'even in eval mode'}, so no row is fixed; turn it off, or train from an earlier block"
        )

    def _refuse_eval_draw(self) -> None:
        name = self._stack[-1][0] if self._stack else ""
        if not self._model.get_submodule(name).training:
            self._refuse_draw(name, "torch", train=False)

    def _refuse_unseen_draws(self, stack: list[tuple[str, RandomState]]) -> None:
        """Draws from numpy and ``random`` are Python numbers, whose use cannot be followed."""
        for name, state in reversed(stack):
            moved = [source for source in state.moved() if source in ("numpy", "random")]
            if moved:
                self._refuse_draw(name, ", ".join(moved), train=self._model.get_submodule(name).training)

    def _refuse_random_control_flow(self) -> None:
        if not self._pending:  # all that is frozen has run: chance decides in the suffix
            self._reach_by_use()
            return
        raise SplitError(
            f"replay: {self._where} draws a random number to decide which layers run before {self._before} "
            "(LayerDrop?), so no fixed part runs before it; set its rate to 0, or train from an earlier block"
        )


def _version(leaf: Any) -> int:
    try:
        return int(leaf._version)
    except (RuntimeError, NotImplementedError):  # inference tensors and functorch's wrappers have none
        return 0


def _torch_state() -> list[bytes]:
    states = [torch.default_generator.get_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.append(torch.cuda.get_rng_state())
    return [state.numpy().tobytes() for state in states]
