"""One model of the coverage run: how to build it, and inputs of any batch size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Generator, nn

# (batch, generator) -> a tensor, a tuple (positional) or a dict (keyword)
Inputs = Callable[[int, Generator], Any]


@dataclass(frozen=True)
class Case:
    """A model to be split.

    Attributes:
        library: ``torchvision``, ``timm``, ``transformers`` or ``masks``.
        name: Unique within the library.
        build: The model with random weights.
        inputs: Random inputs for it.
        note: What was set so that the model is small or has no randomness of its own.
        example: What the split is given, where that is not like ``inputs``.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    note: str = ""
    example: Inputs | None = None
