"""What a timing was made on: the machine, the versions, and how busy it was."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cachefreeze._version import __version__

_PACKAGES = ("torch", "torchvision", "numpy", "h5py")


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores that this process may use, threads, memory in bytes and GPU, as far as the machine says."""
    found: dict[str, Any] = {
        "cpu": _line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": None,
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": None,
    }
    memory = _line("/proc/meminfo", "MemTotal")
    if memory is not None:
        found["memory_bytes"] = int(memory.split()[0]) * 1024
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {"name": properties.name, "memory_bytes": properties.total_memory}
    return found


def versions(others: Iterable[str] = ()) -> dict[str, str | None]:
    """Versions that change timings; None for a package that is not installed.

    Args:
        others: Names of distributions to list beside torch and what the package itself stands on.
    """
    found: dict[str, str | None] = {"python": platform.python_version(), "cachefreeze": __version__}
    for name in (*_PACKAGES, *others):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "cuda": torch.version.cuda if torch.cuda.is_available() else None}


def load_average() -> list[float] | None:
    """Processes that wanted to run, over the last 1, 5 and 15 minutes: a timing on a busy machine says little."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def made_on(
    load_before: list[float] | None, device: torch.device | str = "cpu", packages: Iterable[str] = ()
) -> dict[str, Any]:
    """What every results file says: ``hardware``, ``versions``, and the ``load_average`` before and after.

    Args:
        load_before: :func:`load_average` when timing began; the one after it is taken now.
        device: What was timed.
        packages: Names of distributions that were timed beside this one.
    """
    return {
        "hardware": hardware(torch.device(device)),
        "versions": versions(packages),
        "load_average": {"before": load_before, "after": load_average()},
    }


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(path: str, key: str) -> str | None:
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return None
