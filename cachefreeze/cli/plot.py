"""Figures as PNG files. Needs matplotlib, the ``plot`` extra, and no display."""

from __future__ import annotations

from pathlib import Path

from cachefreeze.cli.optional import demo_package
from cachefreeze.errors import UsageError
from cachefreeze.schedules import Timeline


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
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}); choose another place") from error
