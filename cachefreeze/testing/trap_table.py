"""Write a trap as the one forward that springs it: the decorated function is the forward of a small module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from cachefreeze.testing.traps import Trap, vectors

Forward = Callable[..., Any]


def linear(outputs: int = 6, inputs: int = 6, **options: Any) -> Callable[[], nn.Module]:
    """A way to make a linear layer."""
    return partial(nn.Linear, inputs, outputs, **options)


class Careful(nn.Linear):
    """A linear layer that keeps a copy of its input for its gradient, so that the input may be written later."""

    def forward(self, input: Tensor) -> Tensor:
        """The layer on a copy."""
        return super().forward(input.clone())


def careful(outputs: int = 6, inputs: int = 6) -> Callable[[], nn.Module]:
    """A way to make a linear layer whose input may be written after its call."""
    return partial(Careful, inputs, outputs)


class TrapTable:
    """Traps by name, each declared by its forward.

    ::

        table = TrapTable()

        @table(head=linear(2))
        def added_in_place(self, x):
            \"\"\"The suffix writes into the rows.\"\"\"
            y = self.stem(x)
            y += 1
            return self.head(y)
    """

    def __init__(self) -> None:
        self.traps: dict[str, Trap] = {}
        self.refused: dict[str, Trap] = {}

    def __call__(
        self,
        train_from: str = "head",
        inputs: Callable[[], Any] = vectors,
        *,
        refused: str = "",
        tolerance: float = 0.0,
        setup: Callable[[Any], Any] | None = None,
        **children: Callable[[], nn.Module],
    ) -> Callable[[Forward], Forward]:
        """Declare a trap.

        Args:
            train_from: The boundary.
            inputs: Builds the example inputs.
            refused: A part of the error (a regular expression) where the split must be refused.
            tolerance: As of Trap.
            setup: Called with the new module, to add what is no child.
            children: Name -> builds the child; ``stem`` and ``head`` are linear layers unless given.
        """

        def register(forward: Forward) -> Forward:
            name = forward.__name__

            def initialise(self: nn.Module) -> None:
                nn.Module.__init__(self)
                for child, make in {"stem": linear(), "head": linear(2), **children}.items():
                    self.add_module(child, make())
                if setup is not None:
                    setup(self)

            body = {"__init__": initialise, "forward": forward, "__doc__": forward.__doc__}
            kind = type("".join(part.title() for part in name.split("_")), (nn.Module,), body)
            kind.__module__ = forward.__module__
            assert name not in {**self.traps, **self.refused}, name
            (self.refused if refused else self.traps)[name] = Trap(kind, inputs, train_from, refused, tolerance)
            return forward

        return register

    def add(
        self, name: str, make: Callable[[], nn.Module], inputs: Callable[[], Any], train_from: str, **options: Any
    ) -> None:
        """Declare a trap by its model; ``refused`` and ``tolerance`` as above."""
        trap = Trap(make, inputs, train_from, options.get("refused", ""), options.get("tolerance", 0.0))
        (self.refused if trap.message else self.traps)[name] = trap
