"""Checkpoints: the whole model as safetensors, and everything a run needs to go on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cachefreeze.errors import CheckpointError
from cachefreeze.isolation import RandomState

SCHEMA = 1


def save_model(model: nn.Module, path: Path) -> None:
    """Write the whole model under its own keys; tensors that share memory (tied weights) once."""
    seen: set[tuple[int, int, tuple[int, ...]]] = set()
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        key = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape))
        if value.numel() == 0 or key not in seen:
            tensors[name] = value.detach().to("cpu").contiguous().clone()
        seen.add(key)
    replace_file(path, lambda temporary: save_file(tensors, temporary))


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a state that :func:`load_state` reads without running code."""
    replace_file(path, lambda temporary: torch.save({"schema": SCHEMA, **state}, temporary))


def load_state(path: Path, config: Mapping[str, str]) -> dict[str, Any]:
    """Read a state and check that it belongs to this run.

    Raises:
        CheckpointError: The file is damaged, of another version, or of a run with another configuration.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler met
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); remove it to start again") from error
    if state.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} has schema {state.get('schema')}, this version reads {SCHEMA}")
    differing = [
        f"{key}: {state['config'].get(key)} -> {config.get(key)}"
        for key in sorted({*state["config"], *config})
        if state["config"].get(key) != config.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{path} is of another run ({'; '.join(differing)}); resume with the same options, or use another --out"
        )
    return state


def random_state() -> dict[str, Any]:
    """The global random states as tensors and plain values."""
    state = RandomState.capture()
    inner = state.numpy["state"]
    return {
        "torch": state.torch_cpu,
        "cuda": list(state.torch_cuda),
        "numpy": {
            "bit_generator": state.numpy["bit_generator"],
            "key": torch.from_numpy(inner["key"].astype("int64")),
            "pos": int(inner["pos"]),
            "has_gauss": int(state.numpy["has_gauss"]),
            "gauss": float(state.numpy["gauss"]),
        },
        "python": state.python,
    }


def restore_random_state(saved: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` returned."""
    numpy = saved["numpy"]
    RandomState(
        saved["torch"],
        tuple(saved["cuda"]),
        {
            "bit_generator": numpy["bit_generator"],
            "state": {"key": numpy["key"].numpy().astype("uint32"), "pos": numpy["pos"]},
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        },
        saved["python"],
    ).restore()


def generators(dataloader: DataLoader[Any]) -> list[torch.Generator]:
    """The generators from which a loader's order is drawn, other than the global one, each once."""
    found: list[torch.Generator] = []
    inner = getattr(dataloader.batch_sampler, "sampler", None)
    for holder in (dataloader, dataloader.sampler, dataloader.batch_sampler, inner):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator) and not any(generator is other for other in found):
            found.append(generator)
    return found


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside ``path`` and rename: a reader, or a resumed run, never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
