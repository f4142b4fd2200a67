"""Engine: what a training loop talks to. It splits the model, keeps the cache, and is the only clock."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from cachefreeze.batches import Inputs
from cachefreeze.compiled import CompiledStep
from cachefreeze.errors import CheckpointError, StaleCacheError, UsageError
from cachefreeze.following import Following
from cachefreeze.freezing import boundary_of, hold_eval
from cachefreeze.heads import Heads
from cachefreeze.inference import Optimized
from cachefreeze.isolation import outside_inference_mode
from cachefreeze.judging import Judgement, is_short, judge, measure_boundary, tell
from cachefreeze.loader import CachedLoader, PassingLoader, StagedLoader, check_loader
from cachefreeze.manager import CacheManager, recorded, split_at
from cachefreeze.measuring import FirstLook
from cachefreeze.moves import Move
from cachefreeze.row_source import Rows
from cachefreeze.running import NumericMode, forward_arguments, model_device
from cachefreeze.samples import View, example_of
from cachefreeze.schedules import Clock, Ladder, Schedule
from cachefreeze.splitting import Parts
from cachefreeze.staging import Staging
from cachefreeze.stores import Store
from cachefreeze.stores.codec import stored_dtype
from cachefreeze.tracing import Usage, record_usage, trace_usage

_LOG = logging.getLogger("cachefreeze")


class Engine:
    """Trains the unfrozen part of a model from cached activations.

    ::

        cf.freeze(model, train_from="layer4")
        engine = cf.Engine(model)
        train = engine.loader(train_loader)
        for epoch in engine.epochs(10):
            for x, y in train:
                loss = loss_fn(engine(x), y)

    Args:
        model: The user's model, on its device. Freeze it first, or give a schedule; ``engine.model`` stays this very
            object.
        store: ``auto``, ``auto:DIR`` (on disk in DIR where memory is too small), ``device``, ``host``, ``hdf5:DIR``,
            ``hdf5:FILE.h5``, a Store, or ``off`` to run the frozen model without a cache (the baseline). Or
            ``other.cache`` of another engine over an equal prefix: loaders of the same name share its stores, and
            whichever needs a row first computes it; close that engine last.
        schedule: What freezes when; None: what is frozen now stays frozen.
        moves: When the boundary of the cache follows a schedule, at the beginning of an epoch: ``measured``, where what
            the move saves until the next one is predicted to exceed what it costs, or ``always``.
        autocast: Autocast dtype of the prefix. Call the suffix under the same autocast state.
        dtype: In which rows are kept: ``auto`` (lossless), float32, float16 or bfloat16.
        prefix: ``exact``: rows are bit for bit what the model computes. ``optimized``, ``optimized:bfloat16``,
            ``optimized:float16`` or an :class:`~cachefreeze.Optimized`: a rewritten copy of the prefix makes them where
            that is faster and within a tolerance, on real samples; ``cache.info()`` says what was chosen.
        epochs: Of the whole run, where they are known by now. ``auto`` does not cache what would not pay in them; else
            that is decided when :meth:`epochs` begins, after the model has been split.

    Attributes:
        model: The user's own model.
        parts: The verified split, at the boundary of the cache; None before the first loader, and while nothing is
            cached.
        cache: The CacheManager; None likewise.
        boundary: Name of the first trainable block, at the beginning of this epoch; None before the first loader, and
            while nothing is frozen.
        decisions: Under a schedule, and where ``auto`` decides, where the boundary of the cache went and what was
            predicted.
        epoch: The epoch that runs, or comes next.
    """

    def __init__(
        self,
        model: nn.Module,
        store: str | Store | CacheManager = "auto",
        *,
        schedule: Schedule | None = None,
        moves: Literal["measured", "always"] = "measured",
        autocast: torch.dtype | None = None,
        dtype: str | torch.dtype | None = None,
        prefix: str | Optimized = "exact",
        epochs: int | None = None,
    ) -> None:
        if schedule is not None and not isinstance(schedule, Schedule):
            raise UsageError(f"schedule={schedule!r}: expected a schedule such as cf.FreezeOut(), or None")
        if schedule is not None and (not isinstance(store, str) or store.endswith(".h5")):
            raise UsageError(
                "a schedule needs a store for every boundary; give store= as 'host', 'device' or 'hdf5:DIR'"
            )
        if Optimized.of(prefix) is not None and store == "off":
            raise UsageError(f"prefix={prefix!r} says how rows are made, and store='off' keeps none: leave one out")
        if isinstance(store, str) and store.partition(":")[0] not in ("auto", "device", "host", "hdf5", "off"):
            raise UsageError(f"store={store!r}: expected 'auto', 'device', 'host', 'hdf5:DIR', 'off', or a Store")
        if moves not in ("measured", "always"):
            raise UsageError(f"moves={moves!r}: expected 'measured' or 'always'")
        stored_dtype(torch.float32, dtype)
        self.model = model
        self.parts: Parts | None = None
        self.cache: CacheManager | None = None
        self.epoch = 0
        self._running = False
        self._trained = False  # in the epoch that runs: the engine was called with gradients
        self.boundary: str | None = None
        self._store = store
        self._autocast = autocast
        self._staging = None if schedule is None else Staging(model, schedule)
        self._make = partial(CacheManager, store=store, autocast=autocast, dtype=dtype, prefix=prefix)
        self._following: Following | None = None
        if self._staging is not None:
            self._following = Following(model, self._staging, self._make, str(store), moves, autocast, self._now)
        self.decisions: list[Move] = [] if self._following is None else self._following.decisions
        self._planned = epochs
        self._judged: Judgement | None = None
        self._cached: list[CachedLoader] = []

    @outside_inference_mode()
    def loader(
        self,
        dataloader: DataLoader[Any],
        inputs: Inputs = None,
        name: str | None = None,
        *,
        view: Any = None,
        version: str | None = None,
        assume_deterministic: bool = False,
        variants: int | None = None,
        seed: int = 0,
    ) -> CachedLoader | PassingLoader | StagedLoader:
        """Wrap a DataLoader: the same batches in the same order, with rows in place of the model's inputs.

        With nothing frozen, or ``store="off"``, the batches are the loader's own, on the model's device. Under a
        schedule the first loader made is the training loader, whose length is that of an epoch.

        Args:
            dataloader: Map-style dataset, automatic batching.
            inputs: Index, key or keys of what the model consumes; default the first element of a tuple, or the
                dict keys that are arguments of ``forward``.
            name: Of the store; loaders over the same samples may share one. Default ``train``, then ``val``.
            view: A deterministic transform or dataset to cache, when the loader's own samples are augmented.
            version: Any text; rows made under another version are not reused.
            assume_deterministic: Skip the probe for randomness.
            variants: Cache so many seeded draws of every sample of a random dataset or collate function. Every sample
                goes through all of them before one comes again, in an order of its own.
            seed: Of the draws of ``variants`` and of their order.

        Raises:
            LoaderError, FieldError, RandomSampleError, BatchDependentError: The loader cannot be cached.
            FreezeError, SplitError: The model cannot be cut here.
            StoreError: The rows cannot be kept where they should be.
        """
        check_loader(dataloader)
        if self._store == "off" and (view is not None or variants is not None):
            given = "variants=" if view is None else "view="
            raise UsageError(
                f"{given} says what to cache, and store='off' caches nothing; give the DataLoader the samples that it "
                "is to yield"
            )
        if self._store == "off" and self._staging is None:
            return self._uncached(dataloader, inputs)
        # views and variants are there to be cached
        judging = self._is_auto and self._staging is None and view is None and variants is None
        if judging and self._judged is not None and not self._judged.pays:
            return self._passing(dataloader)
        look: FirstLook | None = None
        if judging and self.cache is None and self._planned is not None:
            left = self._planned - self.epoch
            short, look = is_short(self.model, dataloader, inputs, self._autocast, left)
            if short:
                return self._declined(dataloader, inputs, left, None if look is None else look.usage)
        known = self._following or self.parts
        seen = View.of(
            dataloader,
            forward_arguments(self.model),
            inputs=inputs,
            view=view,
            assume_deterministic=assume_deterministic or self._store == "off",
            variants=variants,
            seed=seed,
            padded=frozenset() if known is None else known.padded,
        )
        if self._following is not None:
            return self._following.add(dataloader, seen, name, version)
        if self.cache is None:
            example, usage = recorded(self.model, seen, self._autocast)
            self.boundary = boundary_of(self.model, usage)
            if self.boundary is None:
                return self._passing(dataloader)
            # with samples of different lengths no batch stands for all
            if judging and seen.ragged is None and seen.listed is None:
                self._judged = self._judge(usage, self.boundary, dataloader, seen, look)
                if not self._judged.pays:
                    return self._passing(dataloader)
            self.parts = split_at(self.model, seen, example, usage, self._autocast)
            self.cache = self._make(self.parts)
        self._cached.append(self.cache.loader_for(dataloader, seen, name, version, self._now))
        return self._cached[-1]

    def attach(self, optimizer: Optimizer) -> None:
        """Let the schedule drive an optimizer, which is never rebuilt: its groups are split by block, in place.

        While it steps, each block's learning rate is the user's times the schedule's factor; in between it is the
        user's own, which any scheduler may move. What freezes leaves the step; its momentum stays. Call it after the
        loaders are made, and before a learning-rate scheduler is and before a state is loaded.

        Args:
            optimizer: Any of torch.optim but LBFGS, over all parameters that train under the schedule.

        Raises:
            UsageError: There is no schedule, no loader, a scheduler already, or parameters are missing.
        """
        self._scheduled().attach(optimizer)

    @property
    def schedule(self) -> Schedule | None:
        """What freezes when; None where what was frozen stays so."""
        return None if self._staging is None else self._staging.schedule

    @property
    def clock(self) -> Clock:
        """How much of the run is done, under a schedule."""
        clock = self._scheduled().clock
        if clock is None:
            raise UsageError("the clock begins with the first epoch of engine.epochs()")
        return clock

    @property
    def ladder(self) -> Ladder:
        """The blocks that the schedule counts."""
        return self._scheduled().ladder

    def epochs(self, total: int, steps_per_epoch: int | None = None) -> Iterator[int]:
        """Yield the epochs that are left of ``total``, counted from 0: the only clock.

        Before each epoch the boundary follows the schedule and frozen modules are put back to eval mode; after it,
        rows written so far are made durable.

        Args:
            total: Epochs of the whole run.
            steps_per_epoch: Optimizer steps that a schedule counts in an epoch, where they are not the batches of the
                training loader (accumulated gradients).
        """
        if total < 0:
            raise UsageError(f"epochs({total}): expected 0 or more")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise UsageError(f"steps_per_epoch={steps_per_epoch}: expected 1 or more")
        if self._staging is None and self.epoch < total:
            self._judge_again(total - self.epoch)
        while self.epoch < total:
            if self._following is not None:
                self._follow(self._following, total, steps_per_epoch)
            hold_eval(self.model)
            self._running, self._trained = True, False
            try:
                yield self.epoch
            finally:
                self._running = False
            self.epoch += 1
            if self.cache is not None:
                self.cache.commit()
            if self._following is not None:
                self._following.end_epoch()

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a dict batch that are arguments of the model's forward; the others it would refuse."""
        arguments = forward_arguments(self.model)
        return {key: value for key, value in batch.items() if key in arguments}

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on.

        Taken inside the loop over :meth:`epochs` it stands for the beginning of the epoch that runs before that trains,
        and for its end from the first training step on: take it when the epoch has been trained. Outside, for the
        beginning of the next one; an epoch that was left by ``break`` comes again.
        """
        staging = {} if self._staging is None else {"staging": self._staging.state_dict()}
        return {
            "epoch": self.epoch + (self._running and self._trained),
            "place": self._following and self._following.place,
            **staging,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        if (self._staging is not None) != ("staging" in state):
            raise CheckpointError(
                "this state is of a run with a schedule and this one has none, or the other way round"
            )
        if self._staging is not None and self._following is not None:
            self._staging.load_state_dict(state["staging"])
            self._following.resume(state["place"])
        self.epoch = int(state["epoch"])

    def close(self) -> None:
        """Commit and close all stores."""
        if self._following is not None:
            self._following.close()
        if self.cache is not None:
            self.cache.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The suffix on rows, or the whole model on raw inputs; of a dict batch, ``engine(**batch)``.

        Raises:
            StaleCacheError: The rows were made by another split, or for another autocast state.
            UsageError: There are arguments of the model's forward beside the rows, which would not reach it.
            TypeError: As the model itself, for keywords that its forward does not know.
        """
        module, given, named = self.route(*args, **kwargs)
        return module(*given, **named)

    def route(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """What a call of the engine calls: the suffix or the whole model, and with which arguments.

        Raises:
            StaleCacheError, UsageError, TypeError: As a call does.
        """
        self._trained = self._trained or torch.is_grad_enabled()
        # as in most steps: there is nothing else to look at, and reading a signature takes longer than many a head
        alone = len(args) == 1 and not kwargs
        rows = next((value for value in (*args, *kwargs.values()) if isinstance(value, Rows)), None)
        if rows is None:
            return self.model, args, kwargs
        if self.parts is None or rows.owner is not self.parts:
            raise StaleCacheError("these rows were made by another engine's split; use the loaders of this engine")
        ambient = NumericMode.now(rows.tensors[0].device)
        if rows.mode != ambient:
            raise StaleCacheError(
                f"the suffix runs with autocast={ambient.autocast}, its rows were made with autocast="
                f"{rows.mode.autocast}; make the engine with autocast={ambient.autocast}, or train without"
            )
        if not alone:
            self._refuse_beside_rows(args, kwargs)
        return self.parts.suffix, (*rows.tensors, *rows.lists), {}

    def compile_step(self, loss_fn: Callable[..., Tensor], optimizer: Optimizer) -> CompiledStep:
        """A whole training step behind one call, replayed as a CUDA graph where that does what the eager step does.

        ::

            step = engine.compile_step(loss_fn, optimizer)
            for x, y in train:
                loss = step(x, y)

        Args:
            loss_fn: Takes the output and the targets of a batch; of a dict batch, ``step(batch)``, the output and the
                batch.
            optimizer: Over what trains. Where steps are recorded, it is made ``capturable``.

        Returns:
            A callable: inputs and targets -> the detached loss. ``step.how`` and ``step.reason`` say how it ran.
        """

        def compute(inputs: Any, *targets: Any) -> Tensor:
            args, kwargs, targets = self.arguments(inputs, *targets)
            return loss_fn(self(*args, **kwargs), *targets)

        return CompiledStep(compute, optimizer, self.model, lambda: self.parts)

    def heads(self, count: int) -> Heads:
        """Copies of what trains, which learn from the same batches, each with parameters for your optimizer.

        Raises:
            UsageError: Under a schedule, whose boundary moves; or nothing trains.
        """
        if self._staging is not None:
            raise UsageError("heads() needs what trains to stay the same; freeze with cf.freeze, without a schedule")
        return Heads(self, count)

    def arguments(self, inputs: Any, *targets: Any) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
        """What the engine and then the loss take of a batch: a dict batch is its own target."""
        if isinstance(inputs, Mapping):
            return (), self.model_inputs(inputs), targets or (inputs,)
        return (inputs,), {}, targets

    def _refuse_beside_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Rows stand for all that the model was given when it was split: nothing else would reach the suffix."""
        signature = inspect.signature(self.model.forward)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        unknown = [name for name in kwargs if name not in signature.parameters]
        if unknown and not open_ended:
            raise TypeError(
                f"{type(self.model).__name__}.forward() got an unexpected keyword argument {unknown[0]!r}, with rows "
                "as without; engine.model_inputs(batch) leaves out what the model does not take"
            )
        extra = [f"argument {i}" for i, value in enumerate(args) if not isinstance(value, Rows)]
        extra += [repr(name) for name, value in kwargs.items() if not isinstance(value, Rows)]
        if extra:
            raise UsageError(
                f"engine() got rows and {', '.join(extra)}: the model was split with the inputs of the loader alone, "
                "so nothing else reaches it. Name it in loader(inputs=…) if it is part of a batch, leave it out with "
                "engine.model_inputs(batch), or use store='off'"
            )

    def __repr__(self) -> str:
        return f"Engine({self.parts!r})" if self.parts is not None else f"Engine({type(self.model).__name__})"

    @property
    def _is_auto(self) -> bool:
        return isinstance(self._store, str) and self._store.partition(":")[0] == "auto"

    def _declined(self, dataloader: DataLoader[Any], inputs: Inputs, left: int, usage: Usage | None) -> PassingLoader:
        """The loader of a run that is too short for a cache."""
        made = self._uncached(dataloader, inputs, usage)
        if self.boundary is not None:
            self._judged = judge(None, self.boundary, self.epoch, left)
            self._note(self._judged)
        return made

    def _judge(
        self, usage: Usage, boundary: str, dataloader: DataLoader[Any], view: View, look: FirstLook | None
    ) -> Judgement:
        """Whether to cache, before the model is split for it."""
        left = None if self._planned is None else self._planned - self.epoch
        costs = None
        if left is None or left > 1:
            costs = measure_boundary(
                self.model, usage, boundary, [(dataloader, view)], str(self._store), self._autocast, left, look
            )
        judgement = judge(costs, boundary, self.epoch, left)
        self._note(judgement)
        return judgement

    def _judge_again(self, left: int) -> None:
        """Now that it is known how many epochs there are: let the cache go before anything is filled for it."""
        before, cache = self._judged, self.cache
        if (
            before is None
            or cache is None
            or before.epochs == left
            or any(f["rows_present"] for f in cache.info().values())
        ):
            return
        judgement = judge(before.costs, str(self.boundary), self.epoch, left)
        self._judged = judgement
        self._note(judgement)
        if not judgement.pays:
            for loader in self._cached:
                loader.decline(self._passing(loader.dataloader))
            cache.close()
            self.parts = self.cache = None

    def _note(self, judgement: Judgement) -> None:
        tell(judgement)
        self.decisions.append(judgement.move)

    def _scheduled(self) -> Staging:
        if self._staging is None:
            raise UsageError("this engine has no schedule: Engine(model, schedule=…)")
        return self._staging

    def _now(self) -> int | None:
        """The epoch that runs; None outside of :meth:`epochs`."""
        return self.epoch if self._running else None

    def _follow(self, following: Following, total: int, steps: int | None) -> None:
        """Begin an epoch under the schedule; the stores that it moves away from are not held longer than it needs."""
        following.start_epoch(self.epoch, total, steps)
        self.parts, self.cache, self.boundary = following.parts, following.cache, following.boundary

    def _uncached(self, dataloader: DataLoader[Any], inputs: Inputs, usage: Usage | None = None) -> PassingLoader:
        """The loader's own batches; the order of use, known already or not, only names the boundary in reports here."""
        if usage is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                usage = trace_usage(self.model)
        if usage.source == "registration":  # a guess: samples show the order, where they can be given to the model
            with suppress(Exception):  # what is not cached may be any data, and any model
                example = example_of(dataloader, forward_arguments(self.model), inputs)
                usage = record_usage(self.model, example.to(model_device(self.model)))
        self.boundary = boundary_of(self.model, usage)
        return self._passing(dataloader)

    def _passing(self, dataloader: DataLoader[Any]) -> PassingLoader:
        """A loader's own batches, of which nothing is cached."""
        return PassingLoader(dataloader, model_device(self.model), "live" if self.boundary is None else "frozen")
