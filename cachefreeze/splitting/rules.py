"""What a recording is asked for: which calls are closed, where boundaries are, and what to open where that fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from cachefreeze.tracing import Call, Usage


class OpenInstead(Exception):  # noqa: N818 - not an error: the recording starts again
    """A call cannot be closed; its children have to be."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name)
        self.name = name
        self.reason = reason


_Found = TypeVar("_Found")


def open_as_needed(attempt: Callable[[frozenset[str]], _Found], may_open: Callable[[str], bool]) -> _Found:
    """What an attempt gives with as many modules opened as it asks for.

    Args:
        attempt: Names of the opened modules -> what is wanted.
        may_open: Whether the module of a name may be opened.

    Raises:
        OpenInstead: Of a module that is open already, or may not be.
    """
    opened = frozenset[str]()
    while True:
        try:
            return attempt(opened)
        except OpenInstead as found:
            if found.name in opened or not may_open(found.name):
                raise
            opened |= {found.name}


@dataclass(frozen=True)
class Rules:
    """What a recording takes for closed, and where its boundaries are.

    Attributes:
        usage: What a forward uses, in order.
        closes: Whether a call is closed.
        boundaries: Event -> name of the block that is first called then.
        trainable: Ids of parameters whose use in glue is a boundary too: of the only block in ``boundaries``.
        live: Calls by module name and number that are glue: chance decides in train mode what they are given.
        strict: Refuse what makes rows depend on a batch or on chance; without, only look.
        shares: Whether what closed calls make of weights and shapes alone is kept outside the rows.
        contrary: Give the opposite answer where glue asks ids and masks for a truth value: what the way that the
            example does not take would use.
        doubted: Which check of ids to answer the other way, by its number; None: none.
        ids: Positions of the inputs that are no masks, though those of a few samples may look like one.
    """

    usage: Usage
    closes: Callable[[Call], bool]
    boundaries: Mapping[int, str]
    trainable: frozenset[int] = frozenset()
    live: frozenset[tuple[str, int]] = frozenset()
    strict: bool = True
    shares: bool = False
    contrary: bool = False
    doubted: int | None = None
    ids: frozenset[int] = frozenset()
