"""Remove caches."""

from __future__ import annotations

import argparse

from cachefreeze.cli.files import add_place, cache_files, printable
from cachefreeze.errors import StoreError
from cachefreeze.reporting import short_bytes
from cachefreeze.stores import remove_cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``clean``."""
    add_place(parser)


def run(args: argparse.Namespace) -> int:
    """Remove every cache in a folder, or one file; what is in use or is no cache stays."""
    named = not args.place.is_dir()
    removed = freed = 0
    for path in cache_files(args.place):
        try:
            nbytes = remove_cache(path)
        except StoreError as error:
            if named:
                raise
            print(f"kept {path.name}: {printable(str(error))}")
            continue
        removed += 1
        freed += nbytes
        print(f"removed {path.name}, {short_bytes(nbytes)}")
    print(f"{removed} caches removed, {short_bytes(freed)} freed")
    return 0
