"""Packages that only the command line needs, and what to say when one is missing."""

from __future__ import annotations

import importlib
from typing import Any

from cachefreeze.errors import UsageError


def demo_package(name: str, extra: str = "demo") -> Any:
    """Import a package of an extra.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).partition(".")[0]
        raise UsageError(
            f"the command line needs the package {missing!r}, which is not installed: pip install "
            f'"cachefreeze[{extra}]"'
        ) from None
