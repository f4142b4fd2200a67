"""The schedule that the options describe."""

from __future__ import annotations

import argparse
import sys

from cachefreeze.errors import UsageError
from cachefreeze.schedules import FreezeOut, Ladder, Schedule, Stages, advice, timeline


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``--schedule freezeout``."""
    parser.add_argument("--t0", type=float, metavar="X", help="of freezeout, above 0 to 1 (default 0.8)")
    parser.add_argument("--how", choices=("linear", "squared", "cubic"), help="curve of freezeout (default cubic)")
    parser.add_argument("--unscaled", action="store_true", help="freezeout without rates divided by a block's time")


def make_schedule(args: argparse.Namespace) -> Schedule | None:
    """``freezeout``, or the stages in a YAML file; None where no schedule was asked for.

    Raises:
        UsageError: Options of freezeout without it.
        ScheduleError: The file is wrong; names it.
    """
    given = {"t0": args.t0, "how": args.how, "scale_lr": False if args.unscaled else None}
    options = {name: value for name, value in given.items() if value is not None}
    if args.schedule == "freezeout":
        return FreezeOut(**options)
    if options:
        raise UsageError(
            f"--t0, --how and --unscaled are for --schedule freezeout, and it is {args.schedule or 'not given'}"
        )
    return None if args.schedule is None else Stages.from_yaml(args.schedule)


def warn(schedule: Schedule, ladder: Ladder, *, steps: int, epochs: int) -> None:
    """Print what the field's experience says against a schedule, where it can be known beforehand."""
    if schedule.planned:
        for sentence in advice(timeline(schedule, ladder, steps=steps, epochs=epochs)):
            print(f"warning: {sentence}", file=sys.stderr)
