"""Traps of what two samples do not show: side effects of the frozen part, and paths that few batches take."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cachefreeze.testing.trap_table import TrapTable, linear
from cachefreeze.testing.traps import sequences

table = TrapTable()


class Leaves(nn.Linear):
    """Leaves its features in an attribute."""

    features: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """The layer; its features stay behind."""
        self.features = super().forward(input)
        return self.features.relu()


@table("mid", stem=lambda: Leaves(6, 6), mid=linear(), refused="used outside it")
def features_left_behind(self: Any, x: Tensor) -> Any:
    """The suffix reads what a frozen module left in an attribute."""
    z = self.mid(self.stem(x))
    return self.head(z + self.stem.features)


class Balanced(nn.Linear):
    """Leaves an auxiliary loss per sample in an attribute."""

    aux: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """The layer; its loss stays behind."""
        y = super().forward(input)
        self.aux = y.square().mean(-1)
        return y


@table("mid", stem=lambda: Balanced(6, 6), mid=linear(), refused="used outside it")
def auxiliary_loss_left_behind(self: Any, x: Tensor) -> Any:
    """The output holds an auxiliary loss that a frozen module left in an attribute, as experts do."""
    return self.head(self.mid(self.stem(x))), self.stem.aux


def _feature_hook(model: Any) -> None:
    model.kept = {}
    model.stem.register_forward_hook(lambda _m, _a, out: model.kept.update(stem=out))


@table("mid", mid=linear(), setup=_feature_hook)
def features_by_hook(self: Any, x: Tensor) -> Any:
    """A hook on a frozen module keeps its output for later."""
    z = self.mid(self.stem(x))
    return self.head(z), self.kept["stem"].sum(-1)


class WithLength(nn.Linear):
    """Returns the length beside its output, as hierarchical transformers return height and width."""

    def forward(self, input: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        """The layer and the length."""
        return super().forward(input), input.shape[1]


@table("mid", inputs=sequences, stem=lambda: WithLength(6, 6), mid=linear())
def length_crosses(self: Any, x: Tensor) -> Any:
    """A frozen module returns the sequence's length as a number that is used behind the boundary."""
    y, length = self.stem(x)
    return self.head(self.mid(y).sum(1) / length)


class Alternating(nn.Module):
    """Does something else at every second call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """The layer, mirrored at every second call."""
        self.calls += 1
        out: Tensor = self.layer(x if self.calls % 2 else x.flip(1))
        return out


@table("mid", stem=Alternating, mid=linear(), refused="batch|fixed|state|eval output")
def every_second_call(self: Any, x: Tensor) -> Any:
    """A frozen module does something else at every second call."""
    return self.head(self.mid(self.stem(x)))


TRAPS, REFUSED = table.traps, table.refused
