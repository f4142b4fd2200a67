"""Trap models of rows: where the batch is in what crosses, what it is made of, and what couples samples."""

from __future__ import annotations

from torch import Tensor, nn


class FoldedBatch(nn.Module):
    """Batch and time are folded into one dimension right before the boundary, so a sample owns several rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences to logits per step."""
        rows, length, width = x.shape
        out: Tensor = self.head(self.stem(x).reshape(-1, width)).view(rows, length, 2)
        return out


class CentredBatch(nn.Module):
    """The forward subtracts the batch's mean right before the boundary. Refused."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to logits."""
        y = self.stem(x)
        out: Tensor = self.head(y - y.mean(0))
        return out


class Recurrent(nn.Module):
    """A recurrent suffix, time first in between: the batch is dimension 1 of what crosses."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU] = nn.LSTM) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.rnn = kind(6, 5, num_layers=2, dropout=0.5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences to logits."""
        y, _ = self.rnn(self.stem(x).transpose(0, 1))
        out: Tensor = self.head(y[-1])
        return out


class Attention(nn.Module):
    """Attention with dropout in prefix and suffix, packed as (values, None)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)
        self.second = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences to logits."""
        y, _ = self.first(x, x, x, need_weights=False)
        z, weights = self.second(y, y, y)
        out: Tensor = self.head(z + y).mean(1) + weights.mean()
        return out


class BatchCentre(nn.Module):
    """Subtracts the batch's mean."""

    def forward(self, x: Tensor) -> Tensor:
        """Centre over the batch."""
        return x - x.mean(0, keepdim=True)


class BatchMean(nn.Sequential):
    """A row of the prefix depends on the other samples. Refused."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), BatchCentre(), nn.Linear(6, 6), nn.Linear(6, 2))


class BatchShare(nn.Module):
    """Divides by the number of samples."""

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the batch size."""
        return x / x.shape[0]


class BatchSize(nn.Sequential):
    """A row of the prefix depends on how many samples the batch has. Refused."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), BatchShare(), nn.Linear(6, 6), nn.Linear(6, 2))


class BatchStatistics(nn.Sequential):
    """Batch norm without running statistics: batch statistics even in eval mode. Refused."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 2))
