"""One short measurement of what a run's epochs are made of; moves, plans and ``auto`` all read the same figures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cachefreeze.blocks import Block
from cachefreeze.fingerprint import state_tensors
from cachefreeze.generators import preserved_generators
from cachefreeze.isolation import eval_mode, preserved_random_state, preserved_state
from cachefreeze.measuring.forwards import block_forwards
from cachefreeze.measuring.looks import FEW, FirstLook, Run, first_look, look_at, short_for_any, spread, timed_forward
from cachefreeze.measuring.speeds import Speed, measured_tier, speed_of
from cachefreeze.measuring.steps import Optimizers, training_steps
from cachefreeze.moves import Costs
from cachefreeze.running import autocast, model_device
from cachefreeze.samples import View, fetch_samples
from cachefreeze.splitting import blocks, blocks_padded
from cachefreeze.tracing import Usage
from cachefreeze.weights import WeightWatch

__all__ = [
    "FirstLook",
    "Measurement",
    "Run",
    "Speed",
    "Training",
    "first_look",
    "listed_blocks",
    "look_at",
    "measure",
    "measured_tier",
    "short_for_any",
]

# Seconds that forwards take at most, together; training steps take about thrice that, fetching a quarter.
_SECONDS = 1.0
# Of the samples that a run computes, those whose forwards may be spent on measuring it, so that measuring is never what
# is slow.
_SHARE = 0.04
_TIMED = 3


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Measured figures. Boundary c is that before block c; 0 is no cache.

    Attributes:
        names: Of the blocks, in order of use.
        samples: Of one epoch, all loaders together.
        batches: Likewise.
        forward: Seconds a sample in each block, in eval mode without gradients.
        fetch: Seconds a sample for the raw batch: decoding, collating; what workers hide left out.
        collate: Seconds a sample to collate stored items anew, as every pass does with some samples; else 0.
        row_bytes: Of a row at each boundary, with the fields beside it; of the mean length, where that differs.
        beside: Those of the fields, which are part of it.
        steps: Seconds a batch of one training step from each block on; empty where it was not asked for.
        speeds: Of each tier.
        making: Seconds a batch that making rows takes beside fetch and forward: states are kept and put back.
        passing: Seconds at the beginning of every pass over rows at each boundary: weights are digested.
        setup: Seconds to split and to verify.
        fills: Epochs until all rows of a boundary are there: one, or as many as a sample has variants.
        seconds: That measuring took.
    """

    names: tuple[str, ...]
    samples: int
    batches: int
    forward: tuple[float, ...]
    fetch: float
    collate: float
    row_bytes: tuple[int, ...]
    beside: int
    steps: tuple[float, ...]
    speeds: Mapping[str, Speed]
    making: float
    passing: tuple[float, ...]
    setup: float
    fills: int
    seconds: float

    def with_speeds(self, tiers: Sequence[str], device: torch.device, batch: int) -> Measurement:
        """The same figures with the speeds of further tiers, for batches of ``batch`` rows."""
        return replace(self, speeds={**self.speeds, **{tier: speed_of(tier, device, batch) for tier in tiers}})

    def with_rows(self, row_bytes: Mapping[str, int | None]) -> Measurement:
        """The same figures with the bytes of a row at each block, where they are known."""
        sizes = [
            row_bytes.get(name) or size - self.beside for name, size in zip(self.names, self.row_bytes, strict=True)
        ]
        return replace(self, row_bytes=tuple(size + self.beside for size in sizes))

    def costs_in(self, store: str, device: torch.device, batch: int) -> Costs:
        """What a decision needs, with rows in the tier of a store, in batches of ``batch``."""
        tier = measured_tier(store, self.samples * max(self.row_bytes[1:]), device)
        return self.with_speeds((tier,), device, batch).costs(tier)

    def costs(self, tier: str) -> Costs:
        """What a decision needs: seconds for all samples once, with rows in one of the measured tiers."""
        speed = self.speeds[tier]
        written = self.batches * (speed.write_batch + self.making)
        return Costs(
            forward=tuple(self.samples * seconds for seconds in self.forward),
            fetch=self.samples * self.fetch,
            read=tuple(
                beginning + self.batches * speed.read_batch + self.samples * (size * speed.read_byte + self.collate)
                for size, beginning in zip(self.row_bytes, self.passing, strict=True)
            ),
            write=tuple(written + self.samples * n * speed.write_byte for n in self.row_bytes),
            setup=self.setup,
            fills=self.fills,
        )


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training step is measured with.

    Attributes:
        loss_fn: ``loss_fn(output, target)``; None takes cross entropy where output and target are those of a
            classifier, else the mean of squares.
        optimizer: Makes an optimizer of parameters.
    """

    loss_fn: Callable[[Any, Any], Tensor] | None = None
    optimizer: Optimizers = torch.optim.AdamW


def listed_blocks(model: nn.Module, view: View) -> list[Block]:
    """The blocks, with the bytes of a row at each; of the mean length, where samples have different ones."""
    device = model_device(model)
    if view.ragged is None:
        return blocks(model, view.example().to(device))
    (longer, _), (shorter, _), *_ = view.padded_batches(device)
    return blocks_padded(model, longer, shorter, view.ragged.lengths)


def measure(
    model: nn.Module,
    usage: Usage,
    names: Sequence[str],
    loaders: Sequence[tuple[DataLoader[Any], View]],
    *,
    tiers: Sequence[str],
    autocast_dtype: torch.dtype | None = None,
    training: Training | None = None,
    epochs: int | None = None,
    look: FirstLook | None = None,
) -> Measurement:
    """Measure once, on one batch, without a trace: modes, flags, gradients, buffers, random states are as before.

    The bytes of a row are taken to be those that enter the block's first call.

    Args:
        model: On its device.
        usage: What its forward uses, in order.
        names: Of the blocks, in that order.
        loaders: Each is gone through once an epoch; the batch is the first one's.
        tiers: ``device``, ``host``, ``hdf5:DIR``: whose reading and writing is measured; a folder is written to.
        autocast_dtype: Of the model.
        training: Measures training steps as well.
        epochs: Of the run, where known: a short run is measured with few samples.
        look: Taken already.
    """
    began = time.perf_counter()
    dataloader, view = loaders[0]
    device = model_device(model)
    samples = sum(seen.samples for _, seen in loaders)
    whole = min(dataloader.batch_size or 64, len(view))
    spent = math.inf if epochs is None else _SHARE * samples * epochs
    look = look_at(model, view, autocast_dtype) if look is None else look
    with preserved_random_state(), preserved_state(model), autocast(device, autocast_dtype):
        few, fetch = _fetched(view, int(min(whole, spent)), look.fetch)
        small = view.layout.example(few).to(device)
        count = small.batch
        with eval_mode(model), torch.no_grad():
            spent = min(spent, (1 + _TIMED) * whole)
            few_seconds = look.forward
            if spent * few_seconds > _SECONDS * FEW:  # the first forward of all takes longer than others
                few_seconds, _ = timed_forward(model, small.take([i % count for i in range(FEW)]), device)
            wanted, repeats = _affordable(few_seconds, whole, spent)
            example = small.take([i % count for i in range(wanted)])
            forward, entering = block_forwards(model, usage, names, example, repeats)
        steps: list[float] = []
        if training is not None:
            target = _target(view, few, wanted, count, device)
            more = (dataloader.batch_size or wanted) / wanted
            steps = training_steps(
                model, usage, names, example, target, training.loss_fn, training.optimizer, repeats, more
            )
    collate, beside = _kept_raw(view, spread(len(view), count))
    beside += sum(value[0].nbytes if value.dim() else value.nbytes for _, value in view.layout.fields)
    per_sample = [seconds / wanted for seconds in forward]
    return Measurement(
        names=tuple(names),
        samples=samples,
        batches=sum(len(loader) for loader, _ in loaders),
        forward=tuple(per_sample),
        fetch=_exposed(fetch, dataloader.num_workers, sum(per_sample)),
        collate=collate,
        row_bytes=tuple(entered + beside for entered in entering),
        beside=beside,
        steps=tuple(steps),
        speeds={tier: speed_of(tier, device, whole) for tier in tiers},
        making=_making(model, view, few),
        passing=tuple(_passing(model, usage, names, view)),
        setup=look.setup,
        fills=max(len(seen) // seen.samples for _, seen in loaders),
        seconds=time.perf_counter() - began,
    )


def _affordable(few_seconds: float, whole: int, spent: float) -> tuple[int, int]:
    """Samples of the batch that is measured, and how many times it is, after once that is not counted.

    All of a batch, if only once, rather than a part of it more often: kernels are chosen by a batch's size (from 16
    samples on others make 1x1 convolutions on one thread, in half of the time).
    """
    spent = min(spent, _SECONDS * FEW / max(few_seconds, 1e-9))
    wanted = max(min(whole, int(spent / 2)), FEW)
    return wanted, min(_TIMED, max(1, int(spent / wanted) - 1))


def _fetched(view: View, limit: int, each: float) -> tuple[Any, float]:
    """A raw batch of at most ``limit`` samples that take ``each`` seconds, and what a sample of it took."""
    rows = spread(len(view), max(FEW, min(limit, int(_SECONDS / 4 / max(each, 1e-9)))))
    began = time.perf_counter()
    raw = view.fetch(rows)
    return raw, (time.perf_counter() - began) / len(rows)


def _kept_raw(view: View, rows: list[int]) -> tuple[float, int]:
    """Of samples whose items are kept raw: seconds a sample to make a batch of them, and bytes of one."""
    if view.ragged is None and view.listed is None:
        return 0.0, 0
    items = fetch_samples(view.dataset, rows)
    if view.ragged is not None:
        data = [view.ragged.codec.encode(item) for item in items]
        collate, sizes = view.ragged.batch, view.ragged.item_bytes
    else:
        assert view.listed is not None
        data = [view.listed.encode(item) for item in items]
        collate, sizes = view.listed.batch_of_sizes, view.listed.item_bytes
    began = time.perf_counter()
    collate(data)
    return (time.perf_counter() - began) / len(rows), round(float(sizes.double().mean()))


def _exposed(fetch: float, workers: int, forward: float) -> float:
    """What is seen of fetching: workers fetch while the model computes, each a batch of its own."""
    return fetch if not workers else max(0.0, fetch / workers - forward)


def _target(view: View, raw: Any, wanted: int, count: int, device: torch.device) -> Tensor | None:
    """The first field beside the model's inputs, for as many samples as are computed."""
    values = [leaf for leaf in view.layout.field_tensors(raw) if isinstance(leaf, Tensor)]
    if not values or not values[0].dim() or len(values[0]) != count:
        return None
    return values[0][torch.arange(wanted) % count].to(device)


def _making(model: nn.Module, view: View, raw: Any) -> float:
    """What is around the forward of a prefix where rows are made, of a model of its size."""
    device = model_device(model)
    began = time.perf_counter()
    with preserved_random_state():
        example = view.layout.example(raw)
    with eval_mode(model), autocast(device, None):
        example.to(device)
    return time.perf_counter() - began


def _passing(model: nn.Module, usage: Usage, names: Sequence[str], view: View) -> list[float]:
    """What every pass over rows begins with: a digest of the weights before a boundary, and a look at two samples."""
    began = time.perf_counter()
    with preserved_generators(view.dataset, view.collate_fn):
        view.fetch([0])
    looked = time.perf_counter()
    WeightWatch(model)
    digesting = time.perf_counter() - looked
    sizes = {name: tensor.nbytes for name, tensor in state_tensors(model)}
    a_byte = digesting / max(1, sum(sizes.values()))
    starts = [usage.start(model, name) or 0 for name in names]
    before = [sum(sizes.get(name, 0) for name, used in usage.parameters.items() if used < start) for start in starts]
    return [a_byte * nbytes + 2 * (looked - began) for nbytes in before]
