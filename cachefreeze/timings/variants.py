"""The ways of running one epoch that are compared, each on a model, an optimizer and a data order of its own."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

from cachefreeze.engine import Engine
from cachefreeze.running import model_device
from cachefreeze.splitting import Parts, split
from cachefreeze.splitting.boundary import as_tuple

_LR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is timed: one training set, and a model with and without its freeze.

    Attributes:
        live: The model as it trains with nothing frozen; only copies of it train.
        frozen: An equal model, on the same device, of which the leading part is frozen.
        samples: Map-style dataset of pairs: a tensor for the model, and a target for ``loss``.
        loss: Of the model's output and a batch of targets; a mean over the batch.
        workers: Of the DataLoader.
        rounds: Epochs of each variant; their median is the result.
        fills: How often each tier is filled afresh.
        epochs: What the totals are of.
        folder: Where the HDF5 tier writes; the system's folder for temporary files by default.
        prefix: How the tiers make rows, as for the engine; the ceiling's are exact.
        facts: What the results say about the job beside these numbers.
    """

    live: nn.Module
    frozen: nn.Module
    samples: Any
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    batch_size: int = 64
    workers: int = 0
    seed: int = 0
    rounds: int = 5
    fills: int = 1
    epochs: int = 10
    folder: Path | None = None
    prefix: str = "exact"
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of both models."""
        return model_device(self.frozen)

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers that there are here."""
        return ("host", "device", "hdf5") if self.device.type == "cuda" else ("host", "hdf5")

    def loader(self, *, shuffle: bool = True) -> DataLoader[Any]:
        """A new DataLoader, always with the same order of samples."""
        return DataLoader(
            self.samples,
            self.batch_size,
            shuffle=shuffle,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.seed),
        )


@dataclass
class Variant:
    """One way of running an epoch.

    Attributes:
        batches: Iterated once per epoch.
        forward: What a batch's inputs go through.
        end_epoch: What a user's loop does after an epoch, on the clock.
        setup_seconds: What was spent before the first epoch: tracing, verifying, probing, allocating.
    """

    name: str
    model: nn.Module
    batches: Any
    forward: Callable[[Any], Tensor]
    end_epoch: Callable[[], Any] = lambda: None
    close: Callable[[], None] = lambda: None
    setup_seconds: float = 0.0
    fill_seconds: list[float] = field(default_factory=list)
    store_bytes: int = 0
    sources: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = self._new_optimizer()

    def restart(self, state: dict[str, Tensor]) -> None:
        """Back to the first epoch, with weights ``state``."""
        self.model.load_state_dict(state)
        self.optimizer = self._new_optimizer()
        self.losses.clear()
        self.sources.clear()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=_LR)


def through_engine(job: Job, name: str, store: str) -> Variant:
    """``live``, ``frozen`` or a tier: the loop that a user writes."""
    model, loader = copy.deepcopy(job.live if name == "live" else job.frozen), job.loader()
    began = time.perf_counter()
    engine = Engine(model, store, prefix="exact" if store == "off" else job.prefix)
    batches = engine.loader(loader)
    seconds = time.perf_counter() - began
    clock = engine.epochs(sys.maxsize)
    next(clock)
    return Variant(
        name,
        model,
        batches,
        engine,
        end_epoch=lambda: next(clock),
        close=engine.close,
        setup_seconds=seconds,
        store_bytes=engine.cache.nbytes if engine.cache is not None else 0,
    )


def ceiling(job: Job) -> tuple[Variant, Parts]:
    """The suffix's training steps alone: slices of one resident tensor, no loader, no gather, no order."""
    model = copy.deepcopy(job.frozen)
    began = time.perf_counter()
    parts = split(model, _example(job))
    seconds = time.perf_counter() - began
    slices = Slices.of(job, parts, model)
    return Variant("ceiling", model, slices, lambda rows: parts.suffix(*rows), setup_seconds=seconds), parts


def evenly(dataset: Any, samples: int | None) -> Any:
    """``samples`` of a dataset, evenly spread over it, so that every class of a sorted folder is among them."""
    if samples is None or samples >= len(dataset):
        return dataset
    return Subset(dataset, [i * len(dataset) // samples for i in range(samples)])


@dataclass(frozen=True)
class Slices:
    """Consecutive slices of resident tensors, as many per pass as the loader has batches.

    Attributes:
        tensors: The rows of all samples, for each tensor of the boundary.
        dims: Their batch dimensions.
        labels: Of all samples.
        size: Samples of a slice.
        copies: Whether the suffix writes into its rows, which would spoil the resident tensors.
    """

    tensors: list[Tensor]
    dims: list[int]
    labels: Tensor
    size: int
    copies: bool

    @classmethod
    def of(cls, job: Job, parts: Parts, model: nn.Module) -> Slices:
        """Run the prefix over all samples, in the dataset's order."""
        made, labels = [], []
        model.eval()
        with torch.no_grad():
            for x, y in job.loader(shuffle=False):
                made.append(as_tuple(parts.prefix(x.to(job.device))))
                labels.append(y.to(job.device))
        model.train()
        columns = zip(zip(*made, strict=True), parts.boundary.tensors, strict=True)
        resident = [torch.cat(column, spec.batch_dim) for column, spec in columns]
        return cls.of_rows(parts, model, resident, torch.cat(labels), job.batch_size)

    @classmethod
    def of_rows(cls, parts: Parts, model: nn.Module, resident: list[Tensor], labels: Tensor, size: int) -> Slices:
        """Of rows that are there; ``model``, whose suffix is tried on two of them, is as before."""
        dims = [tensor.batch_dim for tensor in parts.boundary.tensors]
        copies = _writes(parts, model, [t.narrow(d, 0, 2).clone() for t, d in zip(resident, dims, strict=True)])
        return cls(resident, dims, labels, size, copies)

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        for start in range(0, len(self.labels), self.size):
            labels = self.labels[start : start + self.size]
            rows = [t.narrow(d, start, len(labels)) for t, d in zip(self.tensors, self.dims, strict=True)]
            yield [row.clone() for row in rows] if self.copies else rows, labels


def _writes(parts: Parts, model: nn.Module, rows: list[Tensor]) -> bool:
    """Whether the suffix writes into what it is given; the model is as before."""
    state = copy.deepcopy(model.state_dict())
    before = [row._version for row in rows]
    parts.suffix(*rows)
    model.load_state_dict(state)
    return before != [row._version for row in rows]


def _example(job: Job) -> Tensor:
    return torch.stack([job.samples[i % len(job.samples)][0] for i in range(3)]).to(job.device)
