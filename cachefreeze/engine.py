"""Engine: what a training loop talks to. It splits the model, keeps the cache, and is the only clock."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from cachefreeze.batches import Inputs
from cachefreeze.errors import StaleCacheError, UsageError
from cachefreeze.freezing import boundary_of, hold_eval
from cachefreeze.loader import CachedLoader, NumericMode, PassingLoader, Rows, check_loader
from cachefreeze.manager import CacheManager
from cachefreeze.rows import autocast, forward_arguments, model_device
from cachefreeze.samples import View
from cachefreeze.splitting import Parts, split, split_padded
from cachefreeze.stores import Store
from cachefreeze.stores.codec import stored_dtype
from cachefreeze.tracing import record_usage, trace_usage


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
        model: The user's model, on its device. Freeze it first; ``engine.model`` stays this very object.
        store: ``auto``, ``auto:DIR`` (on disk in DIR where memory is too small), ``device``, ``host``, ``hdf5:DIR``,
            ``hdf5:FILE.h5``, a Store, or ``off`` to run the frozen model without a cache (the baseline).
        schedule: None: what is frozen now stays frozen.
        autocast: Autocast dtype of the prefix. Call the suffix under the same autocast state.
        dtype: In which rows are kept: ``auto`` (lossless), float32, float16 or bfloat16.
        prefix: ``exact``: rows are bit for bit what the model computes.

    Attributes:
        model: The user's own model.
        parts: The verified split; None before the first loader, and while nothing is cached.
        cache: The CacheManager; None likewise.
        boundary: Name of the first trainable block; None before the first loader, and while nothing is frozen.
        epoch: The epoch that runs, or comes next.
    """

    def __init__(
        self,
        model: nn.Module,
        store: str | Store = "auto",
        *,
        schedule: None = None,
        autocast: torch.dtype | None = None,
        dtype: str | torch.dtype | None = None,
        prefix: Literal["exact"] = "exact",
    ) -> None:
        if schedule is not None:
            raise UsageError(f"schedule={schedule!r}: expected None, one constant stage; use cf.freeze(model, …)")
        if prefix != "exact":
            raise UsageError(f"prefix={prefix!r}: expected 'exact'")
        if isinstance(store, str) and store.partition(":")[0] not in ("auto", "device", "host", "hdf5", "off"):
            raise UsageError(f"store={store!r}: expected 'auto', 'device', 'host', 'hdf5:DIR', 'off', or a Store")
        stored_dtype(torch.float32, dtype)
        self.model = model
        self.parts: Parts | None = None
        self.cache: CacheManager | None = None
        self.epoch = 0
        self.boundary: str | None = None
        self._store = store
        self._autocast = autocast
        self._dtype = dtype

    def loader(
        self,
        dataloader: DataLoader[Any],
        inputs: Inputs = None,
        name: str | None = None,
        *,
        view: Any = None,
        version: str | None = None,
        assume_deterministic: bool = False,
    ) -> CachedLoader | PassingLoader:
        """Wrap a DataLoader: the same batches in the same order, with rows in place of the model's inputs.

        With nothing frozen, or ``store="off"``, the batches are the loader's own, on the model's device.

        Args:
            dataloader: Map-style dataset, automatic batching.
            inputs: Index, key or keys of what the model consumes; default the first element of a tuple, or the
                dict keys that are arguments of ``forward``.
            name: Of the store; loaders over the same samples may share one. Default ``train``, then ``val``.
            view: A deterministic transform or dataset to cache, when the loader's own samples are augmented.
            version: Any text; rows made under another version are not reused.
            assume_deterministic: Skip the probe for randomness.

        Raises:
            LoaderError, FieldError, RandomSampleError, BatchDependentError: The loader cannot be cached.
            FreezeError, SplitError: The model cannot be cut here.
            StoreError: The rows cannot be kept where they should be.
        """
        check_loader(dataloader)
        if self._store == "off":
            return self._uncached(dataloader, view)
        seen = View.of(
            dataloader,
            forward_arguments(self.model),
            inputs=inputs,
            view=view,
            assume_deterministic=assume_deterministic,
            padded=frozenset() if self.parts is None else self.parts.padded,
        )
        if self.cache is None:
            example = seen.example().to(model_device(self.model))
            self.boundary = boundary_of(self.model, record_usage(self.model, example))
            if self.boundary is None:
                return PassingLoader(dataloader, model_device(self.model), "live")
            with autocast(model_device(self.model), self._autocast):
                if seen.ragged is None:
                    self.parts = split(self.model, example)
                else:
                    batches = seen.padded_batches(model_device(self.model))
                    self.parts = split_padded(self.model, batches, seen.layout.input_names)
            self.cache = CacheManager(self.parts, self._store, autocast=self._autocast, dtype=self._dtype)
        return self.cache.loader_for(dataloader, seen, name, version)

    def epochs(self, total: int) -> Iterator[int]:
        """Yield the epochs that are left of ``total``, counted from 0: the only clock.

        Before each epoch, frozen modules are put back to eval mode; after it, rows written so far are made durable.
        """
        if total < 0:
            raise UsageError(f"epochs({total}): expected 0 or more")
        while self.epoch < total:
            hold_eval(self.model)
            yield self.epoch
            self.epoch += 1
            if self.cache is not None:
                self.cache.commit()

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a dict batch that are arguments of the model's forward; the others it would refuse."""
        arguments = forward_arguments(self.model)
        return {key: value for key, value in batch.items() if key in arguments}

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on at the same epoch."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.epoch = int(state["epoch"])

    def close(self) -> None:
        """Commit and close all stores."""
        if self.cache is not None:
            self.cache.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The suffix on rows, or the whole model on raw inputs; of a dict batch, ``engine(**batch)``.

        Raises:
            StaleCacheError: The rows were made by another split, or for another autocast state.
            UsageError: There are arguments of the model's forward beside the rows, which would not reach it.
            TypeError: As the model itself, for keywords that its forward does not know.
        """
        rows = next((value for value in (*args, *kwargs.values()) if isinstance(value, Rows)), None)
        if rows is None:
            return self.model(*args, **kwargs)
        if self.parts is None or rows.owner is not self.parts:
            raise StaleCacheError("these rows were made by another engine's split; use the loaders of this engine")
        ambient = NumericMode.now(rows.tensors[0].device)
        if rows.mode != ambient:
            raise StaleCacheError(
                f"the suffix runs with autocast={ambient.autocast}, its rows were made with autocast="
                f"{rows.mode.autocast}; make the engine with autocast={ambient.autocast}, or train without"
            )
        self._refuse_beside_rows(args, kwargs)
        return self.parts.suffix(*rows.tensors)

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

    def _uncached(self, dataloader: DataLoader[Any], view: Any) -> PassingLoader:
        if view is not None:
            raise UsageError(
                "view= says what to cache, and store='off' caches nothing; give the DataLoader that dataset"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the order of use only names the boundary in reports here
            self.boundary = boundary_of(self.model, trace_usage(self.model))
        return PassingLoader(dataloader, model_device(self.model), "live" if self.boundary is None else "frozen")
