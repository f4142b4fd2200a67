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


def float32_precision(device: torch.device) -> str:
    """How exactly a device multiplies float32, whichever of torch's two ways of setting that the user has taken.

    Asked in the older way torch raises where it was set in the newer one (``fp32_precision``, since 2.9).
    """
    try:
        products = torch.get_float32_matmul_precision()
    except RuntimeError:
        backends = torch.backends.cuda, torch.backends.mkldnn
        products = "/".join(str(backend.matmul.fp32_precision) for backend in backends)
    return f"{products}, tf32 {convolves_in_tf32()}" if device.type == "cuda" else products


def convolves_in_tf32() -> bool:
    """Whether convolutions on CUDA may use TF32."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        cudnn: Any = torch.backends.cudnn
        return bool(cudnn.conv.fp32_precision == "tf32")
