"""The schedule that the options describe."""

from __future__ import annotations

import argparse

from cachefreeze.errors import UsageError
from cachefreeze.schedules import FreezeOut, Schedule, Stages


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``--schedule freezeout``."""
    parser.add_argument("--t0", type=float, metavar="X", help="of freezeout, above 0 to 1 (default 0.8)")
    parser.add_argument("--how", choices=("linear", "squared", "cubic"), help="curve of freezeout (default cubic)")
    parser.add_argument("--unscaled", action="store_true", help="freezeout without rates divided by a block's time")


def make_schedule(args: argparse.Namespace) -> Schedule:
    """``freezeout``, or the stages in a YAML file.

    Raises:
        UsageError: Options of freezeout beside a file.
        ScheduleError: The file is wrong; names it.
    """
    given = {"t0": args.t0, "how": args.how, "scale_lr": False if args.unscaled else None}
    options = {name: value for name, value in given.items() if value is not None}
    if args.schedule == "freezeout":
        return FreezeOut(**options)
    if options:
        raise UsageError(f"--t0, --how and --unscaled are for --schedule freezeout, and it is {args.schedule}")
    return Stages.from_yaml(args.schedule)
