"""Figures as PNG files. Needs matplotlib, the ``plot`` extra, and no display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cachefreeze.cli.optional import demo_package
from cachefreeze.errors import UsageError
from cachefreeze.reporting import EpochReport, Report
from cachefreeze.schedules import Timeline

# Warm without a cache, cold with one, grey for what none can beat.
_COLOURS = {
    "live": "#d62728",
    "frozen": "#ff7f0e",
    "device": "#2ca02c",
    "host": "#1f77b4",
    "hdf5": "#17becf",
    "ceiling": "0.5",
    "fill": "#9467bd",
    "cached": "#1f77b4",
}


def check() -> None:
    """Raise UsageError where there is nothing to draw with."""
    demo_package("matplotlib.figure", "plot")


def draw_timeline(shown: Timeline, lr: float, path: Path) -> None:
    """Draw learning rates over steps, a line a block, above the blocks' frozen spans.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    figure_module = demo_package("matplotlib.figure", "plot")
    colours = demo_package("matplotlib", "plot").colormaps["viridis"]
    names = shown.ladder.names
    figure = figure_module.Figure(figsize=(9, 4 + 0.16 * len(names)), layout="constrained")
    rates, spans = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1 + 0.16 * len(names)]})
    for index, name in enumerate(names):
        colour = colours(index / max(len(names) - 1, 1))
        rates.plot(shown.steps, [lr * factors[index] for factors in shown.factors], color=colour, label=name)
        frozen = [(start, end - start) for start, end in shown.spans(index)]
        spans.broken_barh(frozen, (index - 0.4, 0.8), color=colour)
    rates.set(ylabel="learning rate", title="learning rate of each block, and when it is frozen")
    spans.set(xlabel="optimizer step", xlim=(0, shown.run.steps), ylim=(len(names) - 0.5, -0.5))
    spans.set_yticks(range(len(names)), names, fontsize=6)
    spans.set_ylabel("frozen")
    _save(figure, path)


def draw_timings(found: Mapping[str, Any], path: Path) -> None:
    """Draw the results of :func:`cachefreeze.timings.measure`: an epoch's seconds, and the seconds of a whole run.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    figure_module = demo_package("matplotlib.figure", "plot")
    config, rows = found["config"], found["variants"]
    figure = figure_module.Figure(figsize=(10, 4.2), layout="constrained")
    epoch, run = figure.subplots(1, 2)
    figure.suptitle(
        f"{config['model']} on {config['data']}, trained from {config['train_from']}: {config['samples']} samples, "
        f"batch {config['batch_size']}",
        fontsize=10,
    )
    _draw_epochs(epoch, rows)
    _draw_run(run, rows, config["epochs"])
    _save(figure, path)


def draw_report(report: Report, path: Path) -> None:
    """Draw a run: losses and accuracy over the epochs, and the seconds of each with where its rows came from.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    figure_module = demo_package("matplotlib.figure", "plot")
    figure = figure_module.Figure(figsize=(10, 4.2), layout="constrained")
    quality, seconds = figure.subplots(1, 2)
    figure.suptitle(f"{report.model} on {report.data}: {report.total_seconds:.1f} s in all", fontsize=10)
    _draw_quality(quality, report.epochs)
    _draw_seconds(seconds, report.epochs)
    _save(figure, path)


def _draw_quality(axes: Any, epochs: Sequence[EpochReport]) -> None:
    """Losses, and on an axis of its own the accuracy where there is one."""
    numbers = [epoch.epoch for epoch in epochs]
    axes.plot(numbers, [epoch.train_loss for epoch in epochs], ".-", color="0.4", label="training loss")
    validated = [(epoch.epoch, epoch.val_loss) for epoch in epochs if epoch.val_loss is not None]
    if validated:
        axes.plot(*zip(*validated, strict=True), ".-", color="black", label="validation loss")
    axes.set(xlabel="epoch", ylabel="loss", title="loss and accuracy")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    right = [(epoch.epoch, 100 * epoch.val_accuracy) for epoch in epochs if epoch.val_accuracy is not None]
    if right:
        beside = axes.twinx()
        beside.plot(*zip(*right, strict=True), ".-", color=_COLOURS["device"], label="validation accuracy")
        beside.set_ylabel("accuracy, %", color=_COLOURS["device"])
        beside.set_ylim(0, 100)
    axes.legend(fontsize=8, loc="center right")


def _draw_seconds(axes: Any, epochs: Sequence[EpochReport]) -> None:
    """A bar an epoch, of its training pass."""
    for source in dict.fromkeys(epoch.source for epoch in epochs):
        some = [epoch for epoch in epochs if epoch.source == source]
        axes.bar(
            [epoch.epoch for epoch in some],
            [epoch.seconds for epoch in some],
            color=_COLOURS[source],
            label=f"{source} ({len(some)})",
        )
    axes.set(xlabel="epoch", ylabel="seconds of the training pass", title="where the rows of an epoch came from")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)


def _draw_epochs(axes: Any, rows: Mapping[str, Any]) -> None:
    """Bars on a logarithmic axis: the median of each variant, and its fastest and slowest round."""
    places = range(len(rows))
    medians = [row["median_seconds"] for row in rows.values()]
    spread = [
        [row["median_seconds"] - row["min_seconds"] for row in rows.values()],
        [row["max_seconds"] - row["median_seconds"] for row in rows.values()],
    ]
    colours = [_COLOURS[name] for name in rows]
    axes.barh(places, medians, color=colours, xerr=spread, error_kw={"ecolor": "0.3", "capsize": 3})
    for place, row in zip(places, rows.values(), strict=True):
        text = f"{row['median_seconds']:.3g} s, ceiling x {row['to_ceiling']:.3g}"
        axes.annotate(text, (row["max_seconds"], place), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, list(rows))
    axes.invert_yaxis()
    axes.set_xscale("log")
    # room to the right of the longest bar for what is written there
    axes.set_xlim(
        min(row["min_seconds"] for row in rows.values()) / 2, 30 * max(row["max_seconds"] for row in rows.values())
    )
    axes.set(xlabel="seconds (median; fastest and slowest round)", title="one epoch")


def _draw_run(axes: Any, rows: Mapping[str, Any], epochs: int) -> None:
    """Seconds since the start over the epochs that are done: setup, then the fill, then cached epochs."""
    for name, row in rows.items():
        first = row["median_seconds"] if row["fill_seconds"] is None else row["fill_seconds"]
        done = [row["setup_seconds"] + first + further * row["median_seconds"] for further in range(epochs)]
        style = "--" if name == "ceiling" else "-"
        axes.plot(range(epochs + 1), [row["setup_seconds"], *done], style, color=_COLOURS[name], label=name)
    axes.set(xlabel="epochs done", ylabel="seconds since the start", title="a run, with setup and fill")
    axes.set_xlim(0, epochs)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}); choose another place") from error
