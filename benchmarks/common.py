"""What scripts share: options, clocks, interleaved rounds, intervals over seeds, and how they end."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from scipy.stats import t as student_t  # comes with scikit-learn

from cachefreeze.machine import synchronize
from cachefreeze.timings.rounds import in_turn

Config = TypeVar("Config")


def config_parser(description: str | None, kind: type[Any]) -> argparse.ArgumentParser:
    """An option for every field of a configuration, a dataclass of plain values and tuples; ``--smoke``, ``--out``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(kind()).items():
        option, told = f"--{name.replace('_', '-')}", f"default {value}"
        if isinstance(value, bool):
            parser.add_argument(option, action="store_true")
        elif isinstance(value, tuple):
            parser.add_argument(option, type=type(value[0]), nargs="+", default=value, help=told)
        else:
            parser.add_argument(option, type=type(value), default=value, help=told)
    parser.add_argument("--smoke", action="store_true", help="seconds; its numbers say nothing")
    parser.add_argument("--out", type=Path, help="results file")
    return parser


def configured(kind: type[Config], args: argparse.Namespace, smoke: Mapping[str, Any]) -> Config:
    """The configuration that options of :func:`config_parser` describe; with ``--smoke`` of the sizes in ``smoke``."""
    given = {name: getattr(args, name) for name in asdict(kind())} | (smoke if args.smoke else {})
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def clocks(device: torch.device | None = None) -> tuple[float, float]:
    """Wall time, and this process's, which others on the machine do not lengthen; a GPU is waited for."""
    if device is not None:
        synchronize(device)
    return time.perf_counter(), time.process_time()


def interleaved(ways: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every round of every way, each round beginning with the next; one round before is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in in_turn(list(ways), number):
            synchronize(device)
            began = time.perf_counter()
            ways[name]()
            synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Mapping[str, list[float]], way: str, to: str) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[way], seconds[to], strict=True))


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and half the width of its 95 % interval over seeds (Student's t); None for a single one."""
    half = None
    if len(values) > 1:
        half = float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.mean(values), "half_width": half}


def shown(found: dict[str, float | None], spec: str) -> str:
    """``mean ± half width``."""
    half = "-" if found["half_width"] is None else format(found["half_width"], spec.replace("+", ""))
    return f"{found['mean']:{spec}} ± {half}"


def finish(found: dict[str, Any], out: Path | None) -> None:
    """Keep the results in the file of ``--out``, where one was asked for, and print them: one line, the last one."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
