"""CacheManager: the stores of one split, one per loader; filling them, reading them, checking them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from cachefreeze.batches import Inputs
from cachefreeze.errors import StoreError, UsageError
from cachefreeze.inference import Optimized
from cachefreeze.isolation import outside_inference_mode
from cachefreeze.listed import example_of
from cachefreeze.loader import CachedLoader, check_loader
from cachefreeze.optimized import prefix_of
from cachefreeze.promotion import PromotedRows
from cachefreeze.rows import FillReport, StoredRows
from cachefreeze.running import NumericMode, forward_arguments, model_device
from cachefreeze.running import autocast as under_autocast
from cachefreeze.samples import View
from cachefreeze.splitting import Parts, split_padded, split_recorded, usage_for
from cachefreeze.stores import BadRow, Store
from cachefreeze.stores.opening import for_another
from cachefreeze.stores.removal import remove_cache
from cachefreeze.tracing import Example, Usage

_LOG = logging.getLogger("cachefreeze")


class CacheManager:
    """The stores of one split.

    Args:
        parts: A verified split.
        store: ``auto``, ``device``, ``host``, ``hdf5:DIR``, ``hdf5:FILE.h5`` or a Store. A file or a Store serves the
            first loader; further ones get a store of the same kind. Or another manager over an equal prefix: loaders of
            the same name share its stores, which stay its own to close.
        autocast: Autocast dtype under which the prefix runs; None runs it without.
        dtype: In which rows are kept: ``auto`` (lossless), float32, float16 or bfloat16.
        prefix: ``exact``, ``optimized``, ``optimized:bfloat16``, ``optimized:float16`` or an
            :class:`~cachefreeze.Optimized`: how rows are made.
        below: The stores of a shallower split of the same model; rows are made from theirs where these are there. It
            stays the caller's to close, after :meth:`let_go`.

    Raises:
        SplitError: Rows cannot be made from those below.
    """

    def __init__(
        self,
        parts: Parts,
        store: str | Store | CacheManager = "auto",
        *,
        autocast: torch.dtype | None = None,
        dtype: str | torch.dtype | None = None,
        prefix: str | Optimized = "exact",
        below: CacheManager | None = None,
    ) -> None:
        self.parts = parts
        self._below = below
        self._segment = None if below is None else below.parts.segment_to(parts)
        self._lender = store if isinstance(store, CacheManager) else None
        self._where: str | Store = for_another(store._where) if isinstance(store, CacheManager) else store
        self._prefix = prefix_of(parts, NumericMode(autocast), dtype, prefix)
        self._rows: dict[str, StoredRows] = {}

    @classmethod
    @outside_inference_mode()
    def of(
        cls,
        model: nn.Module,
        dataloader: DataLoader[Any],
        store: str | Store = "auto",
        *,
        inputs: Inputs = None,
        view: Any = None,
        assume_deterministic: bool = False,
        autocast: torch.dtype | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> CacheManager:
        """Split a frozen model on the samples of a DataLoader, also where these have different lengths.

        Args:
            model: Frozen; the boundary is read from ``requires_grad``.
            dataloader: Give it, and others with the same collate function, to :meth:`loader` afterwards.
            store: As of the class.
            inputs: As of :meth:`loader`.
            view: As of :meth:`loader`.
            assume_deterministic: As of :meth:`loader`.
            autocast: As of the class.
            dtype: As of the class.

        Raises:
            FreezeError, SplitError, BatchDependentError: As of :func:`cachefreeze.split`.
            LoaderError, FieldError, RandomSampleError: The loader cannot be cached.
        """
        check_loader(dataloader)
        seen = View.of(
            dataloader, forward_arguments(model), inputs=inputs, view=view, assume_deterministic=assume_deterministic
        )
        return cls(split_on(model, seen, autocast), store, autocast=autocast, dtype=dtype)

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
    ) -> CachedLoader:
        """Wrap a DataLoader: the same batches in the same order, with rows in place of the model's inputs.

        Args:
            dataloader: Map-style dataset, automatic batching.
            inputs: Index, key or keys of what the model consumes; default the first element of a tuple, or the
                dict keys that are arguments of ``forward``.
            name: Of the store; loaders over the same samples may share one. Default ``train``, then ``val``.
            view: Deterministic transform or dataset to cache in place of the loader's own.
            version: Any text; rows made under another version are not reused.
            assume_deterministic: Skip the probe for randomness.
            variants: Cache so many seeded draws of every sample of a random dataset or collate function. Every sample
                goes through all of them before one comes again, in an order of its own.
            seed: Of the draws of ``variants`` and of their order.
        """
        check_loader(dataloader)
        seen = View.of(
            dataloader,
            forward_arguments(self.parts.model),
            inputs=inputs,
            view=view,
            assume_deterministic=assume_deterministic,
            variants=variants,
            seed=seed,
            padded=self.parts.padded,
        )
        return self.loader_for(dataloader, seen, name, version)

    def loader_for(
        self,
        dataloader: DataLoader[Any],
        view: View,
        name: str | None = None,
        version: str | None = None,
        clock: Callable[[], int | None] | None = None,
    ) -> CachedLoader:
        """:meth:`loader` for a view that was taken already, by the epochs of ``clock``."""
        name = name if name is not None else next_name(self._rows)
        if name in self._rows:
            held = self._rows[name]
            if held.view.identity() != view.identity():
                raise UsageError(f"name={name!r} holds the rows of other samples already; give this loader its own")
        else:
            lent = None if self._lender is None else self._lender._rows.get(name)
            where = lent or (self._where if not self._rows else for_another(self._where))
            held = self._new(name, view, where, version or "")
            self._rows[name] = held
        return CachedLoader(dataloader, held, clock)

    def _new(self, name: str, view: View, where: str | Store | StoredRows, version: str) -> StoredRows:
        below = None if self._below is None else self._below._rows.get(name)
        if below is None or self._segment is None:
            return StoredRows(self._prefix, name, view, where, version)
        return PromotedRows(self._prefix, name, view, where, version, below=below, segment=self._segment)

    @property
    def has_below(self) -> bool:
        """Whether rows are made from those of a shallower split."""
        return self._below is not None

    @property
    def promoting(self) -> bool:
        """Whether rows are absent that may be made from those below."""
        return any(isinstance(held, PromotedRows) and not held.settled for held in self._rows.values())

    def let_go(self) -> None:
        """Check some promoted rows against ones computed from their samples; need those below no more.

        Raises:
            StaleCacheError: A promoted row is wrong.
        """
        for held in self._rows.values():
            if isinstance(held, PromotedRows):
                held.recompute_some()
                held.let_go()
        self._below = self._segment = None

    @outside_inference_mode()
    def fill(self, loader: CachedLoader, progress: Callable[[int], None] | None = None) -> FillReport:
        """Compute every absent row of a loader's store, in order, with the loader's batch size and workers.

        Args:
            loader: From :meth:`loader`.
            progress: Called with the number of rows of each batch once they are written.

        Returns:
            Rows, bytes and how many rows were computed.
        """
        held = loader.rows
        if not isinstance(held, StoredRows):
            raise UsageError("fill() takes a loader of this manager")
        done = held.fill(loader.dataloader, progress)
        self._release()
        return done

    def verify(self) -> dict[str, list[BadRow]]:
        """Check every stored row's checksum: bad rows by loader name."""
        return {name: held.store.verify() for name, held in self._rows.items()}

    def info(self) -> dict[str, dict[str, Any]]:
        """Per loader name: tier, rows, rows present, bytes, path of the file if any, how rows are made and rounded."""
        return {
            name: {
                "tier": held.store.tier,
                "rows": held.store.spec.rows,
                "rows_present": held.store.count,
                "nbytes": held.store.nbytes,
                "path": None if held.store.path is None else str(held.store.path),
                "writable": held.store.writable,
                "prefix": self.made_by,
                "rounding": held.format.rounding,
            }
            for name, held in self._rows.items()
        }

    @property
    def made_by(self) -> dict[str, Any]:
        """How the prefix makes rows: ``choice``, and for an optimized one what was measured (seconds of a sample)."""
        return self._prefix.facts()

    @property
    def nbytes(self) -> int:
        """Bytes of all stores when full."""
        return sum(held.store.nbytes for held in self._rows.values())

    def commit(self) -> None:
        """Make every row written so far durable, where the tier can."""
        for held in self._rows.values():
            held.commit()
        self._release()

    def _release(self) -> None:
        """Once every row is there, nothing is kept to make them."""
        if all(held.settled for held in self._rows.values()):
            self._prefix.release()

    def drop(self) -> None:
        """Close all stores and remove the files that this manager made: the boundary has moved on.

        A file that was there before stays; it may serve another run. So does one that another process fills.
        """
        made = [held.store.path for held in self._rows.values() if held.made and held.store.path is not None]
        self.close()
        for path in made:
            try:
                remove_cache(path)
            except StoreError as error:
                _LOG.warning("%s is left where it is: %s", path, error)

    def close(self) -> None:
        """Commit and close all stores."""
        self.commit()
        for held in self._rows.values():
            if not held.borrowed:
                held.store.close()
        self._prefix.release()
        self._rows.clear()


def split_on(
    model: nn.Module,
    view: View,
    autocast: torch.dtype | None,
    boundary: str | None = None,
    usage: Usage | None = None,
) -> Parts:
    """Split a model on some of the samples that are to be cached, in the autocast state that rows are made in.

    Args:
        model: Frozen up to the boundary.
        view: The samples.
        autocast: Autocast dtype of the prefix; None: without.
        boundary: To split at; None: the first trainable block.
        usage: What a forward of such samples uses; None: it is recorded.
    """
    if usage is None:
        return split_at(model, view, *recorded(model, view, autocast), autocast, boundary)
    return split_at(model, view, _some_of(model, view), usage, autocast, boundary)


def _some_of(model: nn.Module, view: View) -> Example:
    return example_of(model, view.example()).to(model_device(model))


def recorded(model: nn.Module, view: View, autocast: torch.dtype | None) -> tuple[Example, Usage]:
    """Some of the samples, and what a forward of them uses in the autocast state that rows are made in."""
    device = model_device(model)
    example = _some_of(model, view)
    with under_autocast(device, autocast):
        return example, usage_for(model, example)


def split_at(
    model: nn.Module,
    view: View,
    example: Example,
    usage: Usage,
    autocast: torch.dtype | None,
    boundary: str | None = None,
) -> Parts:
    """:func:`split_on` on what was :func:`recorded` there."""
    device = model_device(model)
    if view.ragged is None:
        with under_autocast(device, autocast):
            return split_recorded(model, example, usage, boundary)
    batches = view.padded_batches(device)
    with under_autocast(device, autocast):
        return split_padded(model, batches, usage, view.layout.input_names, boundary)


def next_name(taken: Iterable[str]) -> str:
    """``train``, ``val``, then ``data3``, …: names of loaders that were given none."""
    used = set(taken)
    names = ["train", "val", *(f"data{i}" for i in range(3, len(used) + 4))]
    return next(name for name in names if name not in used)
