"""What every contender gets: the same photos, model, cut, batches, epochs and seed, and a clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from cachefreeze.cli.data import Data, load_data
from cachefreeze.cli.models import build_model
from cachefreeze.timings import evenly

_MIDDLE = 14  # the block of MobileNetV2 from which a middle cut trains


@dataclass(frozen=True, kw_only=True)
class Job:
    """MobileNetV2 on an image folder; ``cut`` is ``head`` or ``middle``; ``folder`` is for files."""

    data: str
    weights: str | None
    cut: str = "head"
    image_size: int = 224
    samples: int = 256
    batch_size: int = 32
    epochs: int = 10
    seed: int = 0
    folder: Path = Path()

    @property
    def train_from(self) -> str:
        return "classifier" if self.cut == "head" else f"features.{_MIDDLE}"

    @cached_property
    def loaded(self) -> Data:
        return load_data(self.data, image_size=self.image_size)

    @cached_property
    def train(self) -> Any:
        return evenly(self.loaded.train, self.samples)

    @cached_property
    def val(self) -> Any:
        return evenly(self.loaded.val, 100)

    @property
    def files(self) -> list[tuple[str, int]]:
        """Path and label of every photo in ``train``."""
        every = self.loaded.train.samples
        return [every[index] for index in getattr(self.train, "indices", range(len(every)))]

    def model(self) -> nn.Module:
        """Pretrained, with a classifier that is new and always the same."""
        torch.manual_seed(self.seed)
        return build_model("mobilenet_v2", weights=self.weights, classes=len(self.loaded.classes)).train()

    def frozen_halves(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The cut by hand that everybody writes for this model: a frozen half in eval mode, and one that trains."""
        pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
        features, classifier = model.features, model.classifier
        if self.cut == "head":
            frozen, trained = nn.Sequential(features, *pooled), classifier
        else:
            frozen, trained = features[:_MIDDLE], nn.Sequential(features[_MIDDLE:], *pooled, classifier)
        return frozen.requires_grad_(False).eval(), trained

    def loader(self, dataset: Any, *, workers: int = 0, collate: Callable[[Any], Any] | None = None) -> DataLoader[Any]:
        """Shuffled the same for everybody."""
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            dataset,
            self.batch_size,
            shuffle=True,
            generator=order,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
        )

    @torch.no_grad()
    def activations(self, frozen: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """The frozen half over all photos in order, a batch at a time."""
        for x, y in DataLoader(self.train, self.batch_size):
            yield frozen(x), y


class Clock:
    """Starts when it is made, at the first line of a contender; packages, model and dataset are there by then.

    Attributes:
        limit: Epochs to run: all of the job's, or a few where each costs the same because nothing is cached.
    """

    def __init__(self, job: Job, limit: int) -> None:
        self.job, self.limit = job, min(limit, job.epochs)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.setup_seconds = 0.0
        self._began = time.perf_counter()

    def epochs(self, own: Iterable[Any] | None = None) -> Iterator[int]:
        """Epochs, each seeded; what ``own`` does between two of its items is on the clock."""
        steps = iter(own if own is not None else range(self.job.epochs))
        next(steps)
        self.start()
        for epoch in range(self.limit):
            torch.manual_seed(self.job.seed + epoch)
            began = time.perf_counter()
            yield epoch
            next(steps, None)
            self.seconds.append(time.perf_counter() - began)

    def start(self) -> None:
        """What came before is setup: fills that are no epoch, splitting, compiling."""
        self.setup_seconds = time.perf_counter() - self._began

    def result(self) -> dict[str, Any]:
        """Seconds of everything from the contender's first line to the end of the last epoch, and of a later epoch."""
        later = statistics.median(self.seconds[1:] or self.seconds)
        return {
            "setup_seconds": self.setup_seconds,
            "epoch_seconds": later,
            "total_seconds": self.setup_seconds + sum(self.seconds) + (self.job.epochs - len(self.seconds)) * later,
            "seconds": self.seconds,
            "losses": self.losses,
        }


def fit(
    job: Job, clock: Clock, batches: Any, forward: Callable[[Any], Tensor], model: nn.Module, own: Any = None
) -> None:
    """The loop that everybody writes, over whatever the contender made of the photos."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in clock.epochs(own):
        total = torch.zeros(())
        for x, y in batches:
            optimizer.zero_grad()
            loss = functional.cross_entropy(forward(x), y)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        clock.losses.append(float(total) / len(batches))


@torch.no_grad()
def accuracy(job: Job, classify: Callable[[Tensor], Tensor]) -> float:
    """Share of validation photos whose class is found; outside the clock."""
    hits = [classify(x).argmax(1) == y for x, y in DataLoader(job.val, job.batch_size)]
    return float(torch.cat(hits).float().mean())


def whole(frozen: nn.Module, trained: nn.Module) -> Callable[[Tensor], Tensor]:
    """Both halves in eval mode, for :func:`accuracy`."""
    trained.eval()
    return lambda x: trained(frozen(x))
