"""Trainer: a training loop with metrics, progress, checkpoints and a report, over an engine."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from cachefreeze import checkpoints
from cachefreeze.engine import Engine
from cachefreeze.errors import CheckpointError, UsageError
from cachefreeze.loader import CachedLoader, LoaderProxy, PassingLoader, StagedLoader
from cachefreeze.reporting import EpochReport, Report, versions
from cachefreeze.row_source import Rows
from cachefreeze.running import model_device

Loader = CachedLoader | PassingLoader | StagedLoader
LossFunction = Callable[..., Tensor]


@dataclass
class _Sums:
    """Running sums on the device, read once per pass so that no step waits for the GPU."""

    loss: Tensor
    correct: Tensor
    samples: int = 0
    classified: int = 0

    @classmethod
    def on(cls, device: torch.device) -> _Sums:
        return cls(torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), device=device))

    def add(self, loss: Tensor, count: int) -> None:
        self.loss += loss.detach().double() * count
        self.samples += count

    def classify(self, output: Any, target: Any) -> None:
        """Count hits where output and target are those of a classifier."""
        if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
            return
        if output.dim() == 2 and target.dim() == 1 and not target.is_floating_point() and len(output) == len(target):
            self.correct += (output.argmax(dim=1) == target).sum()
            self.classified += len(target)

    def mean_loss(self) -> float:
        return float(self.loss) / max(self.samples, 1)

    def accuracy(self) -> float | None:
        return float(self.correct) / self.classified if self.classified else None


class Trainer:
    """Train an engine.

    Batches are ``(inputs, target)`` and the loss is ``loss_fn(engine(inputs), target)``; for dict batches it is
    ``loss_fn(engine(**inputs), batch)``.

    Args:
        engine: With its loaders made.
        loss_fn: Returns the mean loss of a batch.
        optimizer: Over the trainable parameters; under a schedule over all, and attached to the engine.
        out: Folder for ``model.safetensors``, ``state.pt`` and ``report.json``; None keeps nothing.
        config: What must be equal for a run to be resumed.
        progress: Show a progress bar on stderr when it is a terminal.
        on_epoch: Called with every finished epoch's report.
    """

    def __init__(
        self,
        engine: Engine,
        loss_fn: LossFunction,
        optimizer: Optimizer,
        *,
        out: str | Path | None = None,
        config: Mapping[str, str] | None = None,
        progress: bool = False,
        on_epoch: Callable[[EpochReport], None] | None = None,
    ) -> None:
        self.engine = engine
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.out = Path(out) if out is not None else None
        self._config = dict(config or {})
        self._progress = progress
        self._on_epoch = on_epoch
        self._device = model_device(engine.model)

    def fit(self, train: Loader, val: Loader | None = None, *, epochs: int, resume: bool = False) -> Report:
        """Train until ``epochs`` epochs are done.

        Args:
            train: From ``engine.loader``.
            val: Likewise; evaluated after every epoch.
            epochs: In all, those of a resumed run included.
            resume: Go on from ``out`` where it holds a state; start at epoch 0 where it does not.

        Returns:
            The report, also written to ``out``.

        Raises:
            CheckpointError: The state in ``out`` is of another run, or nothing says where to look for it.
            UsageError: A loader comes from no engine.
        """
        if epochs < 0:
            raise UsageError(f"epochs={epochs}: expected 0 or more")
        for name, loader in (("train", train), ("val", val)):
            if loader is not None and not isinstance(loader, LoaderProxy):
                raise UsageError(
                    f"{name}= is a {type(loader).__name__}, expected a loader of the engine, which knows where its "
                    f"batches come from: fit(…, {name}=engine.loader(…))"
                )
        started = time.perf_counter()
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
        done = self._resume(train) if resume else []
        report = Report(
            model=type(self.engine.model).__name__, versions=versions(), device=str(self._device), epochs=done
        )
        self._describe(report)
        for epoch in self.engine.epochs(epochs):
            finished = self._epoch(epoch, train, val)
            self._describe(report)
            report.epochs.append(finished)
            self._save(train, report)
            if self._on_epoch is not None:
                self._on_epoch(finished)
        report.total_seconds = time.perf_counter() - started
        if self.out is not None:
            checkpoints.save_model(self.engine.model, self.out / "model.safetensors")
            report.write(self.out / "report.json")
        return report

    def _epoch(self, epoch: int, train: Loader, val: Loader | None) -> EpochReport:
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.engine.model.train()
        began = time.perf_counter()
        train_sums = self._pass(train, f"epoch {epoch}", self._step)
        train_loss = train_sums.mean_loss()  # waits for the device: the pass is over when its work is
        seconds = time.perf_counter() - began
        counts = train.counts  # of this pass: the next one, also over the same loader, has its own
        val_loss = val_accuracy = val_seconds = val_source = None
        if val is not None:
            self.engine.model.eval()
            began = time.perf_counter()
            with torch.no_grad():
                val_sums = self._pass(val, f"epoch {epoch} val", self._evaluate)
            val_loss, val_accuracy = val_sums.mean_loss(), val_sums.accuracy()
            val_seconds, val_source = time.perf_counter() - began, val.source
        return EpochReport(
            epoch=epoch,
            source=train.source,
            boundary=self.engine.boundary,
            cache_boundary=None if self.engine.parts is None else self.engine.parts.boundary.name,
            seconds=seconds,
            val_seconds=val_seconds,
            val_source=val_source,
            train_loss=train_loss,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            rows_cached=counts.cached,
            rows_computed=counts.computed,
            rows_repaired=counts.repaired,
            rows_promoted=counts.promoted,
            rows_rewritten=counts.rewritten,
            lr=lr,
        )

    def _pass(self, loader: Loader, what: str, step: Callable[[Any, _Sums], None]) -> _Sums:
        sums = _Sums.on(self._device)
        for batch in with_progress(loader, what, show=self._progress):
            step(batch, sums)
        if not sums.samples:
            raise UsageError("the loader yielded no batch (drop_last with fewer samples than a batch?)")
        return sums

    def _step(self, batch: Any, sums: _Sums) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        output, target = self._forward(batch)
        loss = self.loss_fn(output, target)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        sums.add(loss, _length(batch))

    def _evaluate(self, batch: Any, sums: _Sums) -> None:
        output, target = self._forward(batch)
        sums.add(self.loss_fn(output, target), _length(batch))
        sums.classify(output, target)

    def _forward(self, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            return self.engine(**self.engine.model_inputs(batch)), batch
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return self.engine(batch[0]), batch[1]
        raise UsageError(
            f"Trainer takes batches (inputs, target) or dicts, got {type(batch).__name__}; write the loop yourself: "
            "it is three lines, see the quick start"
        )

    def _describe(self, report: Report) -> None:
        """Note where rows are kept and where the model is split now; a schedule moves both."""
        parts, cache = self.engine.parts, self.engine.cache
        stores = cache.info() if cache is not None else {}
        tiers = {facts["tier"] for facts in stores.values()} if cache is not None else {"off"}
        report.store = "+".join(sorted(tiers))
        report.store_bytes = cache.nbytes if cache is not None else 0
        report.rounding = {name: facts["rounding"] for name, facts in stores.items() if facts["rounding"]}
        report.moves = [asdict(move) for move in self.engine.decisions]
        report.split = None
        if parts is not None:
            report.split = {
                "prefix": {"choice": "exact"} if cache is None else cache.made_by,
                "boundary": parts.boundary.name,
                "executor": parts.executor,
                "cached_fraction": parts.cached_fraction,
            }

    def _save(self, train: Loader, report: Report) -> None:
        if self.out is None:
            return
        state = {
            "config": self._config,
            "engine": self.engine.state_dict(),
            "model": self.engine.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": checkpoints.random_state(),
            "generators": [generator.get_state() for generator in checkpoints.generators(train.dataloader)],
            "epochs": report.as_dict()["epochs"],
        }
        checkpoints.save_state(state, self.out / "state.pt")

    def _resume(self, train: Loader) -> list[EpochReport]:
        if self.out is None:
            raise CheckpointError("resume=True needs out=, the folder that holds the run's state")
        path = self.out / "state.pt"
        if not path.exists():
            return []
        state = checkpoints.load_state(path, self._config)
        self.engine.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        checkpoints.restore_random_state(state["random"])
        found = checkpoints.generators(train.dataloader)
        for generator, saved in zip(found, state["generators"], strict=True):
            generator.set_state(saved)
        self.engine.load_state_dict(state["engine"])
        return [EpochReport(**epoch) for epoch in state["epochs"]]


def _length(batch: Any) -> int:
    """Samples in a batch."""
    elements = batch.values() if isinstance(batch, Mapping) else batch
    first = next(value for value in elements if isinstance(value, Rows | Tensor))
    return len(first)


def with_progress(loader: Loader, what: str, *, show: bool) -> Iterator[Any]:
    """Iterate a loader behind a progress bar on stderr; no bar when not asked for, or not on a terminal."""
    if not (show and sys.stderr.isatty()):  # a hidden bar takes tqdm's lock too, which forked children share
        yield from loader
        return
    bar = tqdm(loader, total=len(loader), desc=what, leave=False)
    for batch in bar:
        following = loader.inner if isinstance(loader, StagedLoader) else loader
        if isinstance(following, CachedLoader):
            bar.set_description_str(f"{what} {following.rows.progress()}".rstrip(), refresh=False)
        yield batch
