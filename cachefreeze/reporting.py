"""Results as data and as text: the JSON report, the table of epochs, the progress line."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """One epoch. Seconds are of the training pass alone; losses are means over samples; accuracy is a fraction."""

    epoch: int
    source: str
    boundary: str | None
    cache_boundary: str | None = None
    seconds: float
    val_seconds: float | None
    val_source: str | None
    train_loss: float
    val_loss: float | None
    val_accuracy: float | None
    rows_cached: int
    rows_computed: int
    rows_repaired: int
    rows_rewritten: int = 0
    rows_promoted: int = 0
    lr: float


@dataclass
class Report:
    """A whole run. ``total_seconds`` is of the whole process where the command line fills it in.

    ``rounding`` has what rows in a narrower dtype have lost, per loader and field: norm of the rounding over the norm
    of the rows.
    """

    model: str
    data: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    store: str = "off"
    store_bytes: int = 0
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)
    split: dict[str, Any] | None = None
    total_seconds: float = 0.0
    epochs: list[EpochReport] = field(default_factory=list)
    moves: list[dict[str, Any]] = field(default_factory=list)

    @property
    def fill_seconds(self) -> float:
        """Seconds of all fill epochs together."""
        return sum(epoch.seconds for epoch in self.epochs if epoch.source == "fill")

    def as_dict(self) -> dict[str, Any]:
        """The report under the keys of its schema."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "data": self.data,
            "versions": self.versions,
            "device": self.device,
            "store": self.store,
            "store_bytes": self.store_bytes,
            "rounding": self.rounding,
            "split": self.split,
            "fill_seconds": self.fill_seconds,
            "total_seconds": self.total_seconds,
            "moves": self.moves,
            "epochs": [asdict(epoch) for epoch in self.epochs],
        }

    def write(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n")


def versions() -> dict[str, str]:
    """Versions that a reader of a report asks for."""
    return {"python": platform.python_version(), "torch": torch.__version__}


_COLUMNS = ("epoch", "source", "seconds", "train loss", "val loss", "val acc", "cached", "computed", "val")
_WIDTHS = (5, 6, 9, 10, 9, 8, 9, 9, 14)


def table_header() -> str:
    """The first line of the table of epochs."""
    return "  ".join(name.rjust(width) for name, width in zip(_COLUMNS, _WIDTHS, strict=True))


def table_row(epoch: EpochReport) -> str:
    """One epoch's line."""
    cells = (
        str(epoch.epoch),
        epoch.source,
        f"{epoch.seconds:.3f} s",
        f"{epoch.train_loss:.4f}",
        "-" if epoch.val_loss is None else f"{epoch.val_loss:.4f}",
        "-" if epoch.val_accuracy is None else f"{epoch.val_accuracy:.1%}",
        str(epoch.rows_cached),
        str(epoch.rows_computed),
        "-" if epoch.val_seconds is None else f"{epoch.val_source} {epoch.val_seconds:.3f} s",
    )
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))


def short_count(count: int) -> str:
    """12345 -> ``12.3k``, 50000 -> ``50k``."""
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f}".removesuffix(".0") + unit
    return str(count)


def short_bytes(nbytes: int, unit_of: int | None = None) -> str:
    """Bytes in the decimal unit that suits ``unit_of`` (default: themselves)."""
    reference = nbytes if unit_of is None else unit_of
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if reference >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"


def prefix_line(facts: Mapping[str, Any]) -> str:
    """``prefix: 52 batch norms folded, channels_last, …``: how an optimized prefix makes rows, and what it gains."""
    if "gain" not in facts:
        return "; ".join([f"prefix: {facts['choice']}", *facts.get("declined", ["no row was computed so far"])])
    at_once = "" if facts["size"] is None else f", {facts['size']} samples at a time"
    return (
        f"prefix: {facts['choice']}{at_once}: {facts['gain']:.2f} times as fast as exact, error {facts['error']:.1e} "
        f"(allowed {facts['tolerance']:.0e})" + "".join(f"; {reason}" for reason in facts["declined"])
    )


def caching_line(boundary: str, rows: int, of_rows: int, total_bytes: int) -> str:
    """``caching layer4: 12.3k/50k rows, 2.1/8.4 GB``; bytes as if all rows were as long as their mean."""
    done = short_bytes(rows * total_bytes // of_rows, total_bytes).split(" ")[0]
    return f"caching {boundary}: {short_count(rows)}/{short_count(of_rows)} rows, {done}/{short_bytes(total_bytes)}"
