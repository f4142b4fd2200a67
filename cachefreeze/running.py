"""How a model is run: on which device, with which arguments, in which autocast state."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class NumericMode:
    """The autocast state that rows were made for.

    Attributes:
        autocast: The autocast dtype, or None when autocast is off.
    """

    autocast: torch.dtype | None

    @classmethod
    def now(cls, device: torch.device) -> NumericMode:
        """The ambient state for a device type."""
        on = torch.is_autocast_enabled(device.type)
        return cls(torch.get_autocast_dtype(device.type) if on else None)


def model_device(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")


def forward_arguments(model: nn.Module) -> list[str]:
    """Names of the arguments of a model's forward; ``*args`` and ``**kwargs`` name none."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to ``dtype``, or none at all, whatever the ambient state is."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
