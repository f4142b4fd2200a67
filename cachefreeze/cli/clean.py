"""Remove caches."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cachefreeze.cli.files import add_place, cache_files, printable
from cachefreeze.cli.job import positive_float
from cachefreeze.errors import StoreError
from cachefreeze.reporting import short_bytes
from cachefreeze.stores import cache_bytes, in_use, remove_cache

_DAY_SECONDS = 86400
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``clean``."""
    add_place(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    parser.add_argument(
        "--older-than", type=positive_float, metavar="DAYS", help="only caches that were not written for so many days"
    )
    parser.add_argument(
        "--max-bytes",
        type=_size,
        metavar="SIZE",
        help="only as many, the longest unwritten first, as it takes for the rest to be no larger, such as 20GB",
    )


def run(args: argparse.Namespace) -> int:
    """Remove every cache in a folder, or those that were asked for, or one file; what is in use stays."""
    named = not args.place.is_dir()
    count = freed_bytes = 0
    for cache in _chosen(_found(args.place, named), args.older_than, args.max_bytes):
        try:
            nbytes = cache.nbytes if args.dry_run else remove_cache(cache.path)
        except StoreError as error:
            if named:
                raise
            print(f"kept {cache.path.name}: {printable(str(error))}")
            continue
        count += 1
        freed_bytes += nbytes
        print(f"{'would remove' if args.dry_run else 'removed'} {cache.path.name}, {short_bytes(nbytes)}")
    if args.dry_run:
        print(f"{count} caches would be removed, {short_bytes(freed_bytes)} freed")
    else:
        print(f"{count} caches removed, {short_bytes(freed_bytes)} freed")
    return 0


@dataclass(frozen=True)
class _Cache:
    path: Path
    nbytes: int
    written: float  # seconds since 1970
    used: bool


def _found(place: Path, named: bool) -> Iterator[_Cache]:
    """The caches that are there; says of each other file why it stays."""
    for path in cache_files(place):
        try:
            nbytes = cache_bytes(path)
            # a file that was named is tried, and the error says who uses it
            used = not named and in_use(path)
            written = path.lstat().st_mtime
        except FileNotFoundError:  # another process removed it in the meantime
            continue
        except StoreError as error:
            if named:
                raise
            print(f"kept {path.name}: {printable(str(error))}")
            continue
        yield _Cache(path, nbytes, written, used)


def _chosen(found: Iterator[_Cache], days: float | None, max_bytes: int | None) -> list[_Cache]:
    """Those to remove, the longest unwritten first."""
    caches = sorted(found, key=lambda cache: cache.written)
    left_bytes = sum(cache.nbytes for cache in caches)
    chosen = []
    for cache in caches:
        old = days is None or time.time() - cache.written > days * _DAY_SECONDS
        if not old or (max_bytes is not None and left_bytes <= max_bytes):
            continue
        if cache.used:
            print(f"kept {cache.path.name}: a process has it open to fill it")
            continue
        chosen.append(cache)
        left_bytes -= cache.nbytes
    return chosen


def _size(text: str) -> int:
    """``20GB`` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: expected a number and B, KB, MB, GB or TB, such as 20GB"
        )
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])
