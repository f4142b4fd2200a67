"""Rows that a traced suffix takes and that decide nothing are not kept; whatever decides the least thing is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cachefreeze as cf
from cachefreeze import splitting
from cachefreeze.splitting.fx_executor import FxExecutor
from cachefreeze.testing.traps import vectors


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    monkeypatch.setattr(splitting, "_EXECUTORS", (FxExecutor(),))


class Handed(nn.Module):
    """A block that is given a second value, and does with it what a test asks for."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(9), nn.Dropout(0.5)
        self.does = does

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        x = self.linear(x)
        if self.does == "adds":
            x = x + other.mean(dim=1, keepdim=True)
        if self.does == "compares":
            x = torch.where(other.detach().amax(dim=1, keepdim=True) > 100, x, x + 1)
        if self.does == "counts":
            self.norm(other)
        if self.does == "draws":
            self.drop(other)
        if self.does == "writes":
            x = x + other.mul_(2).shape[1]
        return self.drop(x), other


class HandsOn(nn.Module):
    """As CoaT does: blocks hand on a value that no head uses."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.stem, self.wide, self.block, self.head = nn.Linear(6, 6), nn.Linear(6, 9), Handed(does), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x, _ = self.block(x, self.wide(x))
        return self.head(x)


def train(model: nn.Module, forward) -> list[Tensor | None]:
    torch.manual_seed(3)
    forward().square().sum().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [*found, *(buffer.clone() for buffer in model.buffers()), torch.rand(1)]


@pytest.mark.parametrize("does", ["nothing", "draws", "writes", "adds", "compares", "counts"])
def test_only_a_row_that_decides_nothing_is_not_kept(does):
    torch.manual_seed(0)
    model = HandsOn(does).train()
    cf.freeze(model, train_from="block", example_inputs=vectors())
    parts = cf.split(model, vectors())
    unread = does in ("nothing", "draws", "writes")
    assert parts.boundary.bytes_per_sample == (6 if unread else 6 + 9) * 4
    found = parts.prefix(vectors())
    rows = found if isinstance(found, tuple) else (found,)
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    wanted = train(model, lambda: model(vectors()))
    model.load_state_dict(state, strict=False)
    got = train(model, lambda: parts.suffix(*[row.clone() for row in rows]))
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_a_segment_leads_to_and_from_rows_that_lack_what_is_not_read():
    model = HandsOn("nothing").eval()
    parts, deeper = (cf.split(model, vectors(), name) for name in ("block", "head"))
    assert torch.equal(parts.segment_to(deeper)(parts.prefix(vectors())), deeper.prefix(vectors()))
