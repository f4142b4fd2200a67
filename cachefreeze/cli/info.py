"""List caches: what they hold, how full they are, how large."""

from __future__ import annotations

import argparse
from datetime import datetime, timezone

from cachefreeze.cli.files import add_place, cache_files, printable
from cachefreeze.errors import CacheFreezeError
from cachefreeze.reporting import short_bytes
from cachefreeze.stores import read_header


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``info``."""
    add_place(parser)


def run(args: argparse.Namespace) -> int:
    """Print one paragraph per cache; a file named explicitly must be one."""
    found = cache_files(args.place)
    named = not args.place.is_dir()
    for path in found:
        try:
            header = read_header(path)
        except CacheFreezeError as error:
            if named:
                raise
            print(f"{path.name}: {printable(str(error))}")
            continue
        facts = header.attributes
        age = datetime.now(timezone.utc) - header.created
        tensors = ", ".join(str(field) for field in header.fields)
        print(
            f"{path.name}: {printable(facts.get('model', '?'))} at {printable(facts.get('boundary', '?'))}, "
            f"{header.count}/{header.rows} rows, {short_bytes(header.nbytes)}, "
            f"made {header.created:%Y-%m-%d %H:%M} UTC ({_age(age.total_seconds())} ago)\n  {tensors}"
        )
        if named:
            for key, value in sorted(header.fingerprint.items()):
                print(f"  {printable(key)}: {printable(value)}")
    if not found:
        print(f"no caches in {args.place}")
    return 0


def _age(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"
