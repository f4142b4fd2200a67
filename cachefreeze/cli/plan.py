"""Show what caching would bring at every boundary, or a freeze schedule before it runs.

The schedule's table says which block freezes at which step, and how learning rates go over time.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from cachefreeze import planning
from cachefreeze.cli import job, plot, schedules
from cachefreeze.cli.data import load_data
from cachefreeze.cli.models import build_model
from cachefreeze.errors import UsageError
from cachefreeze.schedules import Ladder, Schedule, Stages, timeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``plan``."""
    job.add_model(parser)
    job.add_batches(parser)
    parser.add_argument("--epochs", type=job.positive, default=10, metavar="N", help="default 10")
    parser.add_argument("--lr", type=job.positive_float, default=1e-3, metavar="X", help="default 1e-3")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--schedule", metavar="freezeout|FILE.yaml", help="the schedule to show")
    what.add_argument("--write", type=Path, metavar="FILE.yaml", help="write a first schedule for this model here")
    schedules.add_options(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the schedule here")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="where rows may go that memory has no room for")
    what.add_argument("--json", action="store_true", help="print the plan of all boundaries as JSON")


def run(args: argparse.Namespace) -> int:
    """Print a table and the advice; draw and write what was asked for."""
    if args.schedule is None and args.write is None:
        return _boundaries(args)
    for option, path in (("--plot", args.plot), ("--write", args.write)):
        if path is not None and path.is_dir():
            raise UsageError(f"{option} {path} is a folder; name a file")
    data = load_data(args.data, image_size=args.image_size)
    model = build_model(job.model_name(args, data), weights=None, classes=len(data.classes))
    with job.running_on(model, data) as example:
        ladder = Ladder.of(model, example)
    schedule = schedules.make_schedule(args) or _first(args, ladder)
    samples = len(data.train)  # type: ignore[arg-type]
    steps = -(-samples // args.batch_size)
    shown = timeline(schedule, ladder, steps=steps * args.epochs, epochs=args.epochs)
    print(f"{type(model).__name__} on {data.name}: {samples} samples, {args.epochs} epochs of {steps} steps")
    print(shown.table(args.lr))
    schedules.warn(schedule, ladder, steps=steps * args.epochs, epochs=args.epochs)
    if args.plot is not None:
        job.make_folder(args.plot.parent)
        plot.draw_timeline(shown, args.lr, args.plot)
    return 0


def _boundaries(args: argparse.Namespace) -> int:
    if args.plot is not None:
        raise UsageError("--plot draws a schedule; give --schedule, or leave --plot out")
    schedules.make_schedule(args)  # options of a schedule without one are refused
    device = job.device_of(args.device)
    data = load_data(args.data, image_size=args.image_size)
    model = build_model(job.model_name(args, data), weights=None, classes=len(data.classes)).to(device)
    with job.running_on(model, data) as example:
        Ladder.of(model, example.to(device))
    loader = DataLoader(data.train, args.batch_size, shuffle=True)
    store = "auto" if args.cache_dir is None else f"auto:{args.cache_dir}"
    optimizer = partial(torch.optim.AdamW, lr=args.lr)
    planned = planning.plan(model, loader, store=store, epochs=args.epochs, optimizer=optimizer)
    print(planned.to_json() if args.json else planned)
    return 0


def _first(args: argparse.Namespace, ladder: Ladder) -> Schedule:
    """A first schedule, kept in the file that was named unless there is one already."""
    schedule = Stages.first(ladder, epochs=args.epochs)
    job.make_folder(args.write.parent)
    try:
        with args.write.open("x", encoding="utf-8") as file:
            file.write(schedule.to_yaml())
    except FileExistsError:
        raise UsageError(f"--write {args.write}: there is such a file already; show it with --schedule") from None
    return schedule
