"""The cache files that a DIR or FILE argument names."""

from __future__ import annotations

import argparse
from pathlib import Path

from cachefreeze.errors import UsageError


def add_place(parser: argparse.ArgumentParser) -> None:
    """The one argument of ``info``, ``verify`` and ``clean``."""
    parser.add_argument("place", type=Path, metavar="DIR|FILE", help="a folder of caches, or one cache file")


def cache_files(place: Path) -> list[Path]:
    """Every ``.h5`` file in a folder, by name, or the one file that was named."""
    if place.is_dir():
        return sorted(path for path in place.iterdir() if path.suffix == ".h5")
    if not place.exists():
        raise UsageError(f"{place} does not exist; give a folder of caches or one cache file")
    return [place]


def printable(text: str) -> str:
    """Text from a file that somebody else may have made, without control characters."""
    return "".join(char if char.isprintable() else "?" for char in text)
