"""What caching would bring at every boundary of a model, from one short measurement; nothing is cached for it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cachefreeze.batches import Inputs
from cachefreeze.blocks import Block
from cachefreeze.errors import CacheFreezeError, UsageError
from cachefreeze.freezing import boundary_event, boundary_of
from cachefreeze.inference import Optimized
from cachefreeze.isolation import eval_mode, preserved_state
from cachefreeze.loader import check_loader
from cachefreeze.manager import split_on
from cachefreeze.measuring import Measurement, Training, listed_blocks, measure, measured_tier
from cachefreeze.measuring.steps import Optimizers
from cachefreeze.optimized import OptimizedPrefix
from cachefreeze.reporting import short_bytes
from cachefreeze.running import NumericMode, forward_arguments, model_device
from cachefreeze.samples import View
from cachefreeze.splitting import Parts
from cachefreeze.stores.memory import free_device_bytes, free_host_bytes
from cachefreeze.stores.opening import fitting_shares, free_bytes_at
from cachefreeze.tracing import Usage, record_usage


@dataclass(frozen=True, kw_only=True)
class BoundaryPlan:
    """What is predicted for one boundary. Seconds are of one training epoch, its training steps included.

    Attributes:
        boundary: The first block to train.
        forward_removed: Share of the forward's FLOPs that caching removes, 0 to 1.
        bytes_per_sample: Of a row, with the fields beside it; None where the model cannot be cut here.
        nbytes: Of all rows.
        tier: Where they fit: ``device``, ``host`` or ``hdf5:DIR``; ``mixed`` where ``auto`` would spread them over
            several; None where nowhere.
        shares: Of the rows in each of these tiers, 0 to 1, fastest first.
        frozen_seconds: An epoch with everything before the boundary frozen, without a cache.
        fill_seconds: The first epoch: rows are written while it trains.
        cached_seconds: Every further epoch.
        setup_seconds: Before the first epoch: splitting and verifying.
        break_even_epochs: After how many epochs caching is ahead; None: never.
        reason: Why rows cannot be kept here; None where they can.
    """

    boundary: str
    forward_removed: float
    bytes_per_sample: int | None
    nbytes: int | None
    tier: str | None
    shares: dict[str, float]
    frozen_seconds: float
    fill_seconds: float | None
    cached_seconds: float | None
    setup_seconds: float
    break_even_epochs: int | None
    reason: str | None

    @property
    def speedup(self) -> float | None:
        """A frozen epoch without a cache over a cached one."""
        return None if self.cached_seconds is None else self.frozen_seconds / self.cached_seconds

    def total_seconds(self, epochs: int) -> float | None:
        """A run with the cache: setup, the fill and the epochs after it; None where it cannot be kept."""
        if self.fill_seconds is None or self.cached_seconds is None or epochs < 1:
            return None
        return self.setup_seconds + self.fill_seconds + (epochs - 1) * self.cached_seconds


@dataclass(frozen=True, kw_only=True)
class OptimizedFill:
    """What ``prefix="optimized"`` would gain at the advised boundary, measured on real samples.

    Attributes:
        choice: How the copy of the prefix is rewritten.
        gain: How many times as fast as the exact prefix it makes rows.
        error: Against the exact prefix, relative to a sample's largest magnitude.
        fill_seconds: The first epoch with it.
    """

    choice: str
    gain: float
    error: float
    fill_seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A table over all boundaries; ``print(plan)`` shows it.

    Attributes:
        model: Its class.
        device: Where it trains.
        samples: Of the training loader.
        batch_size: Likewise.
        epochs: That the advice is for.
        boundary: Where the model is frozen now; None where nothing is.
        live_seconds: An epoch in which everything trains.
        free_bytes: ``device`` (not on a CPU), ``host`` and ``disk`` where a folder was given; None where unknown.
        rows: One for each boundary, the shallowest first. The advised one was split and verified, the others listed.
        optimized: What a rewritten prefix would gain at the advised one; None where it would be the exact one.
        seconds: That the plan took.
    """

    model: str
    device: str
    samples: int
    batch_size: int
    epochs: int
    boundary: str | None
    live_seconds: float
    free_bytes: dict[str, int | None]
    rows: tuple[BoundaryPlan, ...]
    optimized: OptimizedFill | None
    seconds: float

    def at(self, boundary: str) -> BoundaryPlan:
        """The row of one boundary.

        Raises:
            UsageError: There is none of this name.
        """
        for row in self.rows:
            if row.boundary == boundary:
                return row
        names = ", ".join(row.boundary for row in self.rows)
        raise UsageError(f"the plan has no boundary {boundary!r}, it has: {names}")

    @property
    def best(self) -> BoundaryPlan | None:
        """Where the model is frozen now, else the boundary of the shortest run; None where caching pays nowhere."""
        found = [row for row in self.rows if self._pays(row) and self.boundary in (None, row.boundary)]
        return min(found, key=lambda row: row.total_seconds(self.epochs) or math.inf, default=None)

    @property
    def advice(self) -> str:
        """One line: where to cache what, and when it pays."""
        best = self.best
        if best is not None:
            many = "epoch" if best.break_even_epochs == 1 else "epochs"
            return (
                f"train_from={best.boundary} on {_place(best)}: {best.speedup:.3g}x per epoch, "
                f"pays after {best.break_even_epochs} {many}{self._with_optimized}"
            )
        where = "at any boundary" if self.boundary is None else f"at {self.boundary!r}"
        reasons = {row.reason for row in self.rows if row.boundary == self.boundary and row.reason}
        why = f" ({reasons.pop()})" if reasons else ""
        return f"caching does not pay {where} within {self.epochs} epochs{why}: store='off'"

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {**asdict(self), "advice": self.advice}

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        free = ", ".join(f"{name} {short_bytes(n)}" for name, n in self.free_bytes.items() if n is not None)
        head = (
            f"{self.model} on {self.device}: {self.samples} samples, batches of {self.batch_size}; "
            f"an epoch in which all trains {_seconds(self.live_seconds)}; free: {free or 'unknown'}"
        )
        columns = (
            "train from",
            "removed",
            "a sample",
            "in all",
            "on",
            "frozen",
            "fill",
            "cached",
            "ratio",
            "pays after",
        )
        cells = [columns, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in cells
        ]
        notes = [f"{row.boundary}: {row.reason}" for row in self.rows if row.reason]
        return "\n".join([head, *(line.rstrip() for line in lines), *notes, self.advice])

    @property
    def _with_optimized(self) -> str:
        made = self.optimized
        if made is None:
            return ""
        return f"; with prefix='optimized' the fill takes {_seconds(made.fill_seconds)} (error {made.error:.1e})"

    def _pays(self, row: BoundaryPlan) -> bool:
        return row.break_even_epochs is not None and row.break_even_epochs <= self.epochs


def plan(
    model: nn.Module,
    train_loader: DataLoader[Any],
    *,
    store: str = "auto",
    epochs: int = 10,
    inputs: Inputs = None,
    view: Any = None,
    assume_deterministic: bool = False,
    autocast: torch.dtype | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    optimizer: Optimizers = torch.optim.AdamW,
) -> Plan:
    """Predict what caching brings at every boundary, from a measurement of a few batches.

    The model, its modes, flags, gradients and buffers, and all random states are as before afterwards.

    Args:
        model: On its device; frozen already or not.
        train_loader: The DataLoader that it trains with.
        store: As for :class:`cachefreeze.Engine`, but no Store: where rows would be kept.
        epochs: Of the run that the advice is for.
        inputs: What the model consumes of a batch.
        view: As for ``engine.loader``.
        assume_deterministic: Skip the probe for randomness.
        autocast: Autocast dtype of prefix and training.
        loss_fn: ``loss_fn(output, target)``; default cross entropy for a classifier, else the mean of squares.
        optimizer: Makes an optimizer of parameters.

    Raises:
        LoaderError, FieldError, RandomSampleError, BatchDependentError: The loader cannot be cached at any boundary.
        UsageError: ``store`` names no tier, or samples are lists.
    """
    began = time.perf_counter()
    check_loader(train_loader)
    if not isinstance(store, str) or store.partition(":")[0] not in ("auto", "device", "host", "hdf5"):
        raise UsageError(f"store={store!r}: expected 'auto', 'auto:DIR', 'device', 'host' or 'hdf5:DIR'")
    if epochs < 1:
        raise UsageError(f"epochs={epochs}: expected 1 or more")
    arguments = forward_arguments(model)
    seen = View.of(train_loader, arguments, inputs=inputs, view=view, assume_deterministic=assume_deterministic)
    if seen.listed is not None:
        raise UsageError("the samples of a detector are lists, whose batches are not measured; time an epoch instead")
    device = model_device(model)
    example = seen.example().to(device)
    usage = record_usage(model, example)
    boundary = boundary_of(model, usage)
    listed = _with_boundary(listed_blocks(model, seen), boundary, model, usage)
    found = {block.name: _crossing(model, seen, autocast, block) for block in listed[1:]}
    sizes = {name: size for name, (size, _) in found.items()}
    measured = measure(
        model,
        usage,
        [block.name for block in listed],
        [(train_loader, seen)],
        tiers=(),
        autocast_dtype=autocast,
        training=Training(loss_fn=loss_fn, optimizer=optimizer),
    ).with_rows(sizes)
    shares = {
        name: _shares(store, size, len(seen), device)
        for name, size in zip(measured.names, measured.row_bytes, strict=True)
        if sizes.get(name) is not None
    }
    tiers = sorted({tier for spread in shares.values() for tier in spread})
    measured = measured.with_speeds(tiers, device, min(train_loader.batch_size or 64, len(seen)))
    rows = [
        _predicted(at, block, measured, shares.get(block.name, {}), found[block.name][1])
        for at, block in enumerate(listed)
        if at
    ]
    made = Plan(
        model=type(model).__name__,
        device=str(device),
        samples=len(seen),
        batch_size=train_loader.batch_size or 0,
        epochs=epochs,
        boundary=boundary,
        live_seconds=measured.samples * measured.fetch + measured.batches * measured.steps[0],
        free_bytes=_free(store, device),
        rows=tuple(rows),
        optimized=None,
        seconds=0.0,
    )
    made, parts = _verified(made, model, seen, autocast)
    if parts is not None and seen.ragged is None:
        made = replace(made, optimized=_optimized(made, parts, seen, measured, NumericMode(autocast)))
    return replace(made, seconds=time.perf_counter() - began)


def _with_boundary(listed: list[Block], boundary: str | None, model: nn.Module, usage: Usage) -> list[Block]:
    """The blocks, with the place where the model is frozen now among them: it may lie within one."""
    if boundary is None or any(block.name == boundary for block in listed):
        return listed
    start = boundary_event(model, boundary, usage)
    before = [block for block in listed if boundary_event(model, block.name, usage) <= start]
    return [*before, Block(boundary, 0, None, None, (boundary,)), *listed[len(before) :]]


def _verified(made: Plan, model: nn.Module, view: View, autocast: torch.dtype | None) -> tuple[Plan, Parts | None]:
    """The plan with its advice verified: a listing shows what crosses, only a split that it suffices."""
    while (best := made.best) is not None:
        try:
            return made, split_on(model, view, autocast, best.boundary)
        except CacheFreezeError as error:
            refused = replace(
                best,
                bytes_per_sample=None,
                nbytes=None,
                tier=None,
                shares={},
                fill_seconds=None,
                cached_seconds=None,
                break_even_epochs=None,
                reason=str(error),
            )
            made = replace(made, rows=tuple(refused if row is best else row for row in made.rows))
    return made, None


def _optimized(made: Plan, parts: Parts, seen: View, measured: Measurement, mode: NumericMode) -> OptimizedFill | None:
    """Choose a rewritten prefix as a fill would, on its first samples."""
    best = made.best
    assert best is not None
    assert best.fill_seconds is not None
    prefix = OptimizedPrefix(parts, mode, None, Optimized())
    prefix.rows_ahead = len(seen)
    count = min(made.batch_size or len(seen), len(seen))
    with preserved_state(parts.model), eval_mode(parts.model):
        choice = prefix.choose(seen.layout.example(seen.fetch(list(range(count)))).to(prefix.device), count)
    if choice.form is None and choice.size is None:
        return None
    exact = measured.samples * sum(measured.forward[: measured.names.index(best.boundary)])
    return OptimizedFill(
        choice=str(choice.facts()["choice"]),
        gain=choice.gain,
        error=choice.error,
        fill_seconds=best.fill_seconds - exact * (1 - 1 / choice.gain),
    )


def _crossing(
    model: nn.Module, view: View, autocast: torch.dtype | None, block: Block
) -> tuple[int | None, str | None]:
    """Bytes of a row at a block, or why there can be none: what the listing could not cut is cut for good."""
    if block.bytes_per_sample is not None:
        return block.bytes_per_sample, None
    try:
        return split_on(model, view, autocast, block.name).boundary.bytes_per_sample, None
    except CacheFreezeError as error:
        return None, str(error)


def _shares(store: str, row_bytes: int, rows: int, device: torch.device) -> dict[str, float]:
    """The share of the rows in each tier; {} where there is no room."""
    kind, _, place = store.partition(":")
    if kind == "auto":
        return fitting_shares(row_bytes, rows, device, place)
    nbytes = row_bytes * rows
    free = {"device": free_device_bytes(device), "host": free_host_bytes()}.get(kind, free_bytes_at(place))
    return {measured_tier(store, nbytes, device): 1.0} if free is None or nbytes <= free else {}


def _predicted(
    at: int, block: Block, measured: Measurement, shares: dict[str, float], reason: str | None
) -> BoundaryPlan:
    """One row of the table: the costs of frozen blocks and inputs, and the steps from the boundary on."""
    size = None if reason is not None else measured.row_bytes[at]
    removed = block.forward_before
    if removed is None:  # not in the listing, or without operations that are counted: by time
        removed = sum(measured.forward[:at]) / max(sum(measured.forward), 1e-12)
    training = measured.batches * measured.steps[at]
    frozen = measured.samples * (measured.fetch + sum(measured.forward[:at])) + training
    fill = cached = even = None
    if reason is None and not shares:
        reason = "no tier has room for its rows; give a folder: store='auto:DIR'"
    elif shares:
        # rows that are spread are read and written where each lies
        costs = [(measured.costs(tier), share) for tier, share in shares.items()]
        cached = sum(share * cost.epoch(at, at) for cost, share in costs) + training
        fill = sum(share * (cost.move(0, at, 1) - cost.setup) for cost, share in costs) + cached
        even = _break_even(measured.setup + fill, cached, frozen)
    return BoundaryPlan(
        boundary=block.name,
        forward_removed=removed,
        bytes_per_sample=size,
        nbytes=None if size is None else size * measured.samples,
        tier="mixed" if len(shares) > 1 else next(iter(shares), None),
        shares=shares,
        frozen_seconds=frozen,
        fill_seconds=fill,
        cached_seconds=cached,
        setup_seconds=measured.setup,
        break_even_epochs=even,
        reason=reason,
    )


def _break_even(first: float, cached: float, frozen: float) -> int | None:
    """The least number of epochs whose sum with the cache is no more than without it."""
    if first <= frozen:
        return 1
    return 1 + math.ceil((first - frozen) / (frozen - cached)) if cached < frozen else None


def _free(store: str, device: torch.device) -> dict[str, int | None]:
    found = {} if device.type == "cpu" else {"device": free_device_bytes(device)}
    place = store.partition(":")[2]
    return {**found, "host": free_host_bytes(), **({"disk": free_bytes_at(place)} if place else {})}


def _cells(row: BoundaryPlan) -> tuple[str, ...]:
    return (
        row.boundary,
        f"{row.forward_removed:.1%}",
        "-" if row.bytes_per_sample is None else short_bytes(row.bytes_per_sample),
        "-" if row.nbytes is None else short_bytes(row.nbytes),
        "+".join(tier.partition(":")[0] for tier in row.shares) or "-",
        _seconds(row.frozen_seconds),
        "-" if row.fill_seconds is None else _seconds(row.fill_seconds),
        "-" if row.cached_seconds is None else _seconds(row.cached_seconds),
        "-" if row.speedup is None else f"{row.speedup:.3g}x",
        "never" if row.break_even_epochs is None else f"{row.break_even_epochs}",
    )


def _place(row: BoundaryPlan) -> str:
    if len(row.shares) == 1:
        return str(row.tier)
    return " and ".join(f"{tier} ({share:.0%} of the rows)" for tier, share in row.shares.items())


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
