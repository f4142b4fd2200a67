"""The three libraries."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import import_module

from covering import timm_models, torchvision_models, transformers_models
from covering.case import Case

LIBRARIES = ("transformers", "timm", "torchvision")
_MODULES = {"transformers": transformers_models, "timm": timm_models, "torchvision": torchvision_models}


def prepare(libraries: list[str]) -> None:
    """Import the libraries once, before there are processes."""
    for library in libraries:
        module = __import__(library)
        if library == "transformers":
            module.logging.set_verbosity_error()
            _ = module.BertModel  # what all its models import, it imports with the first one
    import_module("torch._dynamo")
    logging.disable(logging.WARNING)


def cases_of(library: str) -> Iterator[Case]:
    """The models of one library."""
    return _MODULES[library].cases()
