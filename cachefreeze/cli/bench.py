"""Time a job's epochs on this machine: live, frozen without a cache, each tier, and the ceiling."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
from tqdm import tqdm

from cachefreeze.cli import job, plot
from cachefreeze.cli.data import load_data
from cachefreeze.timings import Job, evenly, measure, steps, table

_SAMPLES = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench``: those of a job, how much of it is run, and what is made of the results."""
    job.add_frozen(parser)
    parser.add_argument(
        "--samples", type=job.positive, default=_SAMPLES, metavar="N",
        help=f"at most so many training samples, evenly spread (default {_SAMPLES})",
    )  # fmt: skip
    parser.add_argument("--workers", type=_workers, default=0, metavar="N", help="of the DataLoader (default 0)")
    parser.add_argument("--rounds", type=job.positive, default=5, metavar="N", help="epochs of each (default 5)")
    parser.add_argument("--fills", type=job.positive, default=1, metavar="N", help="fills of each tier (default 1)")
    parser.add_argument("--epochs", type=job.positive, default=10, metavar="N", help="of the totals (default 10)")
    job.add_prefix(parser)
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="of the hdf5 tier, emptied afterwards (default: temporary)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it here")


def run(args: argparse.Namespace) -> int:
    """Measure, print, draw."""
    timed = job_of(args)
    with tqdm(total=steps(timed), leave=False, disable=None) as bar:

        def say(step: str) -> None:
            bar.set_description_str(step)
            bar.update()

        found = measure(timed, say=say)
    print(json.dumps(found) if args.json else table(found))
    if args.plot is not None:
        plot.draw_timings(found, args.plot)
    return 0


def job_of(args: argparse.Namespace) -> Job:
    """What the options describe; there is a place for the plot, and something to draw it with.

    Raises:
        UsageError: They do not fit together, or name what is not there.
    """
    job.check_file("--plot", args.plot)
    if args.plot is not None:
        plot.check()  # before the minutes that measuring takes
    device = job.device_of(args.device)
    if args.cache_dir is not None:
        job.make_folder(args.cache_dir)
    data = load_data(args.data, image_size=args.image_size)
    name = job.model_name(args, data)
    torch.manual_seed(args.seed)
    with redirect_stdout(sys.stderr):  # what it says is progress here
        live = job.make_model(name, args, data)
    frozen = copy.deepcopy(live)
    job.freeze_model(frozen, args, data)
    return Job(
        live=live.to(device),
        frozen=frozen.to(device),
        samples=evenly(data.train, args.samples),
        batch_size=args.batch_size,
        workers=args.workers,
        seed=args.seed,
        rounds=args.rounds,
        fills=args.fills,
        epochs=args.epochs,
        folder=args.cache_dir,
        prefix=args.prefix,
        facts={
            "model": name,
            "weights": Path(args.weights).name if args.weights else None,
            "data": data.name,  # and not the folder, which says something about this machine alone
            "image_size": data.image_size,
        },
    )


def _workers(text: str) -> int:
    return 0 if text == "0" else job.positive(text)
