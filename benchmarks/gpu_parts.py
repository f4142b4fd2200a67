"""The parts of the GPU table that are timed here: short steps, a linear head over a million rows, a cut in the middle.

Each takes a device and sizes, so that a machine without a GPU runs the same lines on small ones. The method is in
benchmarks/README.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import interleaved, ratio
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf


class Headed(nn.Module):
    """A frozen linear layer, which makes rows of a given width of a few numbers, and a head."""

    def __init__(self, width: int, head: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


def _eager(engine: cf.Engine, optimizer: torch.optim.Optimizer, autocast: torch.dtype | None) -> Callable[..., Tensor]:
    """The step that a user writes."""

    def step(x: Any, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(y.device.type, dtype=autocast, enabled=autocast is not None):
            loss = functional.cross_entropy(engine(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _under(autocast: torch.dtype, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def under(x: Any, y: Tensor) -> Tensor:
        with torch.autocast(y.device.type, dtype=autocast):
            return step(x, y)

    return under


def short_steps(device: torch.device, *, width: int, steps: int, rounds: int) -> dict[str, Any]:
    """A step on one batch of rows on the device, eager and compiled; and one of sixteen heads."""
    found = {}
    for name, head in {
        "linear": lambda: nn.Linear(width, 10),
        "two-layer": lambda: nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 10)),
    }.items():
        ways: dict[str, Callable[[], Any]] = {}
        made = {}
        for way in ("eager", "compiled", "16 heads, compiled"):
            model = Headed(width, head()).to(device)
            cf.freeze(model, train_from="head")
            engine = cf.Engine(model, "device")
            data = TensorDataset(torch.randn(64, 8), torch.randint(10, (64,)))
            x, y = next(iter(engine.loader(DataLoader(data, 64))))
            trained = [p for p in model.parameters() if p.requires_grad]
            if way == "16 heads, compiled":
                heads = engine.heads(16)
                groups = [{"params": heads.parameters(i), "lr": 1e-3 / (i + 1)} for i in range(16)]
                step = made[way] = heads.compile_step(functional.cross_entropy, torch.optim.AdamW(groups))
            elif way == "compiled":
                step = made[way] = engine.compile_step(functional.cross_entropy, torch.optim.AdamW(trained))
            else:
                step = _eager(engine, torch.optim.AdamW(trained), None)
            ways[way] = _repeated(step, x, y, steps)
        seconds = interleaved(ways, rounds, device)
        found[name] = {
            "seconds": seconds,
            "step_us": {way: 1e6 * statistics.median(times) / steps for way, times in seconds.items()},
            "eager_to_compiled": ratio(seconds, "eager", "compiled"),
            "heads_to_one": ratio(seconds, "16 heads, compiled", "compiled"),
            "how": {way: [step.how, step.reason] for way, step in made.items()},
        }
    return found


def _repeated(step: Callable[..., Any], x: Any, y: Tensor, steps: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(steps):
            step(x, y)

    return repeated


def million_rows(
    device: torch.device, *, rows: int, width: int, classes: int, batch: int, rounds: int
) -> dict[str, Any]:
    """Epochs of a linear head over bf16 rows on the device: eager and compiled, through the loader of an engine.

    The rows are what the prefix makes, written to the store in large blocks instead of batch by batch.
    """
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(rows, 8), torch.randint(classes, (rows,)))
    fields = (
        cf.FieldSpec(name="activation.0", shape=(width,), dtype=torch.bfloat16),
        cf.FieldSpec(name="field.0", shape=(), dtype=torch.int64),
    )
    store = cf.DeviceStore(cf.StoreSpec(rows=rows, fields=fields), device)
    ways = {}
    initial = Headed(width, nn.Linear(width, classes)).to(device)
    for index in torch.arange(rows).split(65536):
        inputs, labels = (tensor[index].to(device) for tensor in data.tensors)
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            made = initial.stem(inputs)
        store.write(index, {"activation.0": made, "field.0": labels})
    for way in ("eager", "compiled"):
        model = Headed(width, nn.Linear(width, classes)).to(device)
        model.load_state_dict(initial.state_dict())
        cf.freeze(model, train_from="head")
        engine = cf.Engine(model, store, autocast=torch.bfloat16)
        batches = engine.loader(DataLoader(data, batch, shuffle=True, drop_last=True))
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
        step = _eager(engine, optimizer, torch.bfloat16)
        if way == "compiled":
            compiled = engine.compile_step(functional.cross_entropy, optimizer)
            step = _under(torch.bfloat16, compiled)
        ways[way] = _epoch(batches, step)
    ways["loader alone"] = _epoch(batches, lambda x, y: None)
    seconds = interleaved(ways, rounds, device)
    return {
        "rows": rows,
        "row_bytes": 2 * width,
        "seconds": seconds,
        "median_seconds": {way: statistics.median(times) for way, times in seconds.items()},
        "source": batches.source,
        "how": [compiled.how, compiled.reason],
    }


def _epoch(batches: Iterable[Any], step: Callable[..., Any]) -> Callable[[], None]:
    def epoch() -> None:
        for x, y in batches:
            step(x, y)

    return epoch


def middle_cut(
    device: torch.device,
    *,
    model: Callable[[], nn.Module],
    train_from: str,
    image: int,
    samples: int,
    batch: int,
    rounds: int,
    autocast: torch.dtype | None,
) -> dict[str, Any]:
    """Epochs of a suffix of many layers: rows on the device, in host memory and on disk, beside the ceiling.

    ``hidden`` is the share of the transfer that an epoch does not wait for: 1 - (tier - device) / transfer, where
    ``transfer`` moves the same batches from pinned memory to the device and does nothing else.
    """
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(samples, 3, image, image), torch.randint(10, (samples,)))
    initial = model()
    ways: dict[str, Callable[[], Any]] = {}
    engines = []
    with TemporaryDirectory() as folder:
        for tier, store in (("device", "device"), ("host", "host"), ("hdf5", f"hdf5:{Path(folder) / 'rows'}")):
            net = model()
            net.load_state_dict(initial.state_dict())
            net.to(device)
            cf.freeze(net, train_from=train_from)
            engine = cf.Engine(net, store, autocast=autocast)
            batches = engine.loader(DataLoader(data, batch, shuffle=True, drop_last=True))
            engine.cache.fill(batches)
            engines.append(engine)
            net.train()
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
            step = _eager(engine, optimizer, autocast)
            ways[tier] = _epoch(batches, step)
            if tier == "device":
                resident = list(batches)
                ways["ceiling"] = _epoch(resident, step)
        if device.type == "cuda":  # needs CUDA
            pinned = [tensor.cpu().pin_memory() for x, _ in resident for tensor in x.tensors]
        else:
            pinned = [tensor for x, _ in resident for tensor in x.tensors]
        ways["transfer"] = lambda: [tensor.to(device, non_blocking=True, copy=True) for tensor in pinned]
        seconds = interleaved(ways, rounds, device)
        row_bytes = engines[0].parts.boundary.bytes_per_sample
        for engine in engines:
            engine.close()
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "autocast": str(autocast),
        "row_bytes": row_bytes,
        "seconds": seconds,
        "median_seconds": medians,
        "to_ceiling": {tier: ratio(seconds, tier, "ceiling") for tier in ("device", "host", "hdf5")},
        "hidden": {tier: 1 - (medians[tier] - medians["device"]) / medians["transfer"] for tier in ("host", "hdf5")},
    }
