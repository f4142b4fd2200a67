"""The three libraries, and the text models whose example hides what their batches need."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from importlib import import_module

from covering import timm_models, torchvision_models, transformers_models
from covering.case import Case

_CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "transformers": transformers_models.cases,
    "masks": transformers_models.mask_cases,
    "timm": timm_models.cases,
    "torchvision": torchvision_models.cases,
}
LIBRARIES = tuple(_CASES)


def prepare(libraries: list[str]) -> None:
    """Import the libraries once, before there are processes."""
    for library in libraries:
        module = import_module("transformers" if library == "masks" else library)
        if library in ("transformers", "masks"):
            module.logging.set_verbosity_error()
            _ = module.BertModel  # what all its models import, it imports with the first one
    import_module("torch._dynamo")
    logging.disable(logging.WARNING)


def cases_of(library: str) -> Iterator[Case]:
    """The models of one library."""
    return _CASES[library]()
