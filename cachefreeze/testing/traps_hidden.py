"""Traps of what two samples do not show: side effects of the frozen part, and paths that few batches take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cachefreeze.testing.trap_table import TrapTable, linear
from cachefreeze.testing.traps import sequences, vectors

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


class WhenLarge(nn.Module):
    """Scales a batch by its largest value, when that is beyond a bound."""

    def forward(self, x: Tensor) -> Tensor:
        """The batch, scaled when it is large."""
        largest = x.abs().max()
        return x / largest if largest > 1.27 else x


@table("mid", inputs=lambda: vectors().flip(0), stem=lambda: nn.Sequential(WhenLarge(), nn.Linear(6, 6)), mid=linear(),
       refused="batch")  # fmt: skip
def scaled_when_large(self: Any, x: Tensor) -> Any:
    """A frozen module scales by the batch's largest value, when that is large; the first two samples are small."""
    return self.head(self.mid(self.stem(x)))


class WhenMany(nn.Module):
    """Centres batches of more than three samples."""

    def forward(self, x: Tensor) -> Tensor:
        """The batch, centred when it is large enough."""
        return x - x.mean(0) if x.shape[0] > 3 else x


@table("mid", stem=lambda: nn.Sequential(nn.Linear(6, 6), WhenMany()), mid=linear(), refused="batch")
def centred_when_many(self: Any, x: Tensor) -> Any:
    """A frozen module centres batches of four and more."""
    return self.head(self.mid(self.stem(x)))


class Experts(nn.Module):
    """Two experts of limited capacity: what exceeds it is passed by."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.a, self.b = nn.Linear(6, 2), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Samples through their expert while there is room."""
        choice = self.gate(x).argmax(1)
        out = x
        for number, expert in enumerate((self.a, self.b)):
            mine = choice == number
            room = mine & (mine.cumsum(0) <= (x.shape[0] + 1) // 2)
            out = torch.where(room[:, None], expert(x), out)
        return out


@table("mid", stem=Experts, mid=linear(), refused="batch")
def expert_capacity(self: Any, x: Tensor) -> Any:
    """Experts of limited capacity in the frozen part: a sample's row depends on who came before it."""
    return self.head(self.mid(self.stem(x)))


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


class Seen(nn.Module):
    """Normalises by the largest value seen so far, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))
        self.largest: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """The batch by the largest value so far."""
        self.largest = torch.maximum(self.largest, x.detach().abs().max())
        return x / self.largest


@table("mid", stem=lambda: nn.Sequential(Seen(), nn.Linear(6, 6)), mid=linear(), refused="buffer|batch|state")
def largest_so_far(self: Any, x: Tensor) -> Any:
    """A frozen module updates a buffer in eval mode and normalises by it."""
    return self.head(self.mid(self.stem(x)))


class Counted(nn.Linear):
    """Counts its calls in a buffer, in eval mode too; the count changes nothing."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.calls: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """The layer."""
        self.calls += 1
        return super().forward(input)


@table("mid", stem=Counted, mid=linear(), refused="buffer|state")
def frozen_call_counter(self: Any, x: Tensor) -> Any:
    """A frozen module counts its calls in a buffer even in eval mode: a cached epoch would not."""
    return self.head(self.mid(self.stem(x)))


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
