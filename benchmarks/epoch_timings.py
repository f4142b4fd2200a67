"""Epoch timings of one job on one machine: ``cachefreeze bench`` with a results file.

The method, and how to read the table, is in benchmarks/README.md. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import finish

from cachefreeze.cli import bench, plot
from cachefreeze.errors import UsageError
from cachefreeze.timings import measure, table


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    bench.add_arguments(parser)
    parser.add_argument("--smoke", action="store_true", help="seconds: 96 samples, 2 rounds; its numbers say nothing")
    parser.add_argument("--out", type=Path, help="results file")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.samples, args.rounds, args.fills = min(args.samples, 96), 2, 1
    return args


def timed(args: argparse.Namespace) -> dict[str, Any]:
    return measure(bench.job_of(args), say=lambda line: print(line, file=sys.stderr, flush=True))


def main() -> int:
    args = parse()
    try:
        found = timed(args)
    except UsageError as error:
        print(f"epoch_timings.py: error: {error}", file=sys.stderr)
        return 2
    if not args.json:
        print(table(found))
    finish(found, args.out)
    if args.plot is not None:
        plot.draw_timings(found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
