"""Measured costs of a run's epochs: the forward of each block, getting raw batches, reading and writing rows."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from cachefreeze.isolation import eval_mode, preserved_random_state, preserved_state
from cachefreeze.moves import Costs
from cachefreeze.rows import autocast, model_device
from cachefreeze.samples import View
from cachefreeze.schedules import Ladder
from cachefreeze.splitting import blocks

# Enough for a median; the first forward of a shape is slower and is not counted.
_REPEATS = 3
_COPIED_BYTES = 1 << 24
# A split records, cuts and verifies with forwards and backwards of a few samples: about this many of their forwards.
# Only for the first decision; after a move its own time is known.
_SPLIT_FORWARDS = 60


def measure(
    model: nn.Module,
    ladder: Ladder,
    loaders: Sequence[tuple[DataLoader[Any], View]],
    store: str,
    autocast_dtype: torch.dtype | None,
) -> Costs:
    """Measure once, on one batch, without a trace: modes, buffers and random states are as before afterwards.

    Args:
        model: On its device.
        ladder: Its blocks.
        loaders: Each is gone through once an epoch; the batch is the first one's.
        store: As for the engine; a folder on disk is written to.
        autocast_dtype: Of the prefix.
    """
    dataloader, view = loaders[0]
    count = min(dataloader.batch_size or 64, len(view))
    samples = sum(seen.samples for _, seen in loaders)
    began = time.perf_counter()
    raw = view.fetch(range(count))
    fetch = (time.perf_counter() - began) / count
    example = view.layout.example(raw).to(model_device(model))
    with (
        preserved_random_state(),
        preserved_state(model),
        eval_mode(model),
        torch.no_grad(),
        autocast(model_device(model), autocast_dtype),
    ):
        forward = [seconds / count for seconds in _forwards(model, ladder, partial(_call, example, model))]
        small = view.example().to(model_device(model))
        began = time.perf_counter()
        _call(small, model)
        _wait(model)
        setup = _SPLIT_FORWARDS * (time.perf_counter() - began)
    sizes = _row_bytes(model, ladder, view)
    reading = _memory_seconds_per_byte(model_device(model))
    writing = _disk_seconds_per_byte(store) if store.partition(":")[0] == "hdf5" else reading
    workers = max(1, dataloader.num_workers)
    return Costs(
        forward=tuple(samples * seconds for seconds in forward),
        fetch=samples * fetch / workers,
        read=tuple(samples * size * reading for size in sizes),
        write=tuple(samples * size * writing for size in sizes),
        setup=setup,
        fills=max(len(seen) // seen.samples for _, seen in loaders),
    )


def _call(example: Any, model: nn.Module) -> None:
    example.fresh().call(model)


def _forwards(model: nn.Module, ladder: Ladder, run: Callable[[], None]) -> list[float]:
    """Seconds of one forward that are spent in each block: from its first call to the next one's."""
    marks: dict[str, float] = {}

    def note(name: str, *_: Any) -> None:
        _wait(model)
        marks.setdefault(name, time.perf_counter())

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in ladder.names]
    spent: list[list[float]] = []
    try:
        for _ in range(1 + _REPEATS):
            marks.clear()
            began = time.perf_counter()
            run()
            _wait(model)
            ended = time.perf_counter()
            # what comes before the first block is its own; a block that is never called itself takes no time of its own
            starts = [began, *(marks.get(name, 0.0) for name in ladder.names[1:]), ended]
            for index in range(len(starts) - 2, 0, -1):
                starts[index] = starts[index] if began <= starts[index] <= starts[index + 1] else starts[index + 1]
            spent.append([after - before for before, after in pairwise(starts)])
    finally:
        for handle in handles:
            handle.remove()
    return [statistics.median(times) for times in zip(*spent[1:], strict=True)]


def _row_bytes(model: nn.Module, ladder: Ladder, view: View) -> list[int]:
    """Bytes of a row at each block of the ladder; where they are not known, those of the next block that is."""
    known = {block.name: block.bytes_per_sample for block in blocks(model, view.example().to(model_device(model)))}
    sizes: list[int] = []
    following = 0
    for name in reversed(ladder.names):
        following = known.get(name) or following
        sizes.append(following)
    return sizes[::-1]


def _memory_seconds_per_byte(device: torch.device) -> float:
    block = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        block.clone()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times) / _COPIED_BYTES


def _disk_seconds_per_byte(store: str) -> float:
    folder = Path(store.partition(":")[2]).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        file.write(bytes(_COPIED_BYTES))
        file.flush()
        os.fsync(file.fileno())
        return (time.perf_counter() - began) / _COPIED_BYTES


def _wait(model: nn.Module) -> None:
    device = model_device(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
