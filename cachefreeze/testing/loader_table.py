"""Write a trap of data as the function that builds its DataLoader, and train on it with and without a cache.

Traps must train exactly as without a cache, or be refused, when the loader is made or while it runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
)

from cachefreeze.engine import Engine
from cachefreeze.freezing import freeze
from cachefreeze.row_source import Rows

COUNT, WIDTH = 14, 6


@dataclass(frozen=True)
class LoaderTrap:
    """A loader that springs a trap.

    Attributes:
        make: Builds the DataLoader.
        between: Called with the loader and the number of the epoch before each epoch.
        message: For refused traps, a part of the error (a regular expression).
        inputs: As for ``engine.loader``.
    """

    make: Callable[[], DataLoader[Any]]
    between: Callable[[DataLoader[Any], int], Any] | None = None
    message: str = ""
    inputs: int | str | None = None


class Scale(nn.Module):
    """One factor per feature: rounds alike in every batch, which a matrix product does not."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Scaled features."""
        return x * self.factor


class Net(nn.Module):
    """What is trained: a frozen scale with dropout, two layers and dropout behind the boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Scale(), nn.Dropout(0.5))
        self.mid = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to logits."""
        out: Tensor = self.head(self.mid(self.stem(x.float())))
        return out


class LoaderTable:
    """Traps by name, each declared by the function that builds its loader."""

    def __init__(self) -> None:
        self.traps: dict[str, LoaderTrap] = {}
        self.refused: dict[str, LoaderTrap] = {}

    def __call__(
        self,
        *,
        refused: str = "",
        between: Callable[[DataLoader[Any], int], Any] | None = None,
        inputs: int | str | None = None,
    ) -> Callable[[Callable[[], DataLoader[Any]]], Callable[[], DataLoader[Any]]]:
        """Declare a trap; the arguments are those of LoaderTrap."""

        def register(make: Callable[[], DataLoader[Any]]) -> Callable[[], DataLoader[Any]]:
            name = make.__name__
            assert name not in {**self.traps, **self.refused}, name
            (self.refused if refused else self.traps)[name] = LoaderTrap(make, between, refused, inputs)
            return make

        return register


def values(count: int = COUNT) -> Tensor:
    """Vectors that differ."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(5))


def labels(count: int = COUNT) -> Tensor:
    """Class numbers."""
    return torch.arange(count) % 3


class Items(Dataset[Any]):
    """A dataset by a function of the index."""

    def __init__(self, item: Callable[[int], Any], count: int = COUNT) -> None:
        self.item, self.count = item, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        return self.item(index)


def pair(index: int) -> tuple[Tensor, Tensor]:
    """Sample ``index``: a vector and its class."""
    return values()[index], labels()[index]


def loader(dataset: Any, **options: Any) -> DataLoader[Any]:
    """A shuffling loader, batches of four."""
    return DataLoader(dataset, **{"batch_size": 4, "shuffle": True, **options})


def train(trap: LoaderTrap, store: str, epochs: int = 3) -> dict[str, Any]:
    """Train from one seed: batches, outputs, the final state, the draws that are next, and the epochs' sources."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - samplers draw from the global state
    model = Net()
    freeze(model, "mid")
    raw, engine = trap.make(), Engine(model, store)
    try:
        loader = engine.loader(raw, inputs=trap.inputs)
        step = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        steps, sources = [], []
        for epoch in engine.epochs(epochs):
            if trap.between is not None:
                trap.between(raw, epoch)
            model.train()
            for batch in loader:
                consumed, rest = _taken(batch, trap.inputs)
                output = engine(consumed)
                step.zero_grad()
                output.square().mean().backward()
                step.step()
                steps.append((rest, output.detach().clone()))
            sources.append(loader.source)
    finally:
        engine.close()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    draws = (torch.rand(1), random.random(), np.random.rand())  # noqa: NPY002
    return {"steps": steps, "state": state, "draws": draws, "sources": sources}


def _taken(batch: Any, inputs: int | str | None) -> tuple[Any, Any]:
    """What the model consumes, and the rest of the batch with its container's class."""
    if isinstance(batch, Tensor | Rows):
        return batch, None
    if isinstance(batch, dict):
        return batch["x"], {key: value for key, value in batch.items() if key != "x"}
    at = inputs if isinstance(inputs, int) else 0
    return batch[at], (type(batch).__name__, [value for i, value in enumerate(batch) if i != at])
