"""Trap models of memory: writes in place, views and aliases of one tensor, and skips over the boundary."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class FirstInPlace(nn.Sequential):
    """The first op writes into the model's own input."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))


class PreActivation(nn.Module):
    """The block begins with an in-place ReLU, and its skip reads the tensor which that ReLU has overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = _PreActivationBlock()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        out: Tensor = self.head(self.block(self.stem(x)).mean((2, 3)))
        return out


class _PreActivationBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.relu(x)) + x
        return out


class ActivatedTwice(nn.Module):
    """An in-place ReLU returns its own input: two names of one tensor cross, and the suffix writes into one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to vectors."""
        y = self.stem(x)
        z = self.relu(y)
        out: Tensor = self.head(x)
        z.mul_(2.0)
        return torch.add(out, y)


class AliasedView(nn.Module):
    """A tensor and its flattened view both cross; the suffix writes into one and reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = self.stem(x)
        flat = y.flatten(1)
        out: Tensor = self.head(y.mean((2, 3)))
        y.mul_(2.0)
        return torch.add(out, flat[:, :4])


class AliasedSlices(nn.Module):
    """Two chunks of one tensor cross beside the tensor itself; the suffix overwrites a chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to vectors."""
        y = self.stem(x)
        a, b = y.chunk(2, 1)
        out: Tensor = self.head(x)
        b.add_(1.0)
        return torch.add(out + a, y.sum(1, keepdim=True))


class Skip(nn.Module):
    """Two stages' outputs and the raw input cross the boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to logits."""
        a = self.first(x)
        b = self.second(functional.relu(a))
        out: Tensor = self.head(self.third(b) + a + x)
        return out


class Dense(nn.Module):
    """Every layer reads all earlier ones: several tensors cross, and the suffix writes into their concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList([nn.Conv2d(4 * (i + 1), 4, 3, padding=1) for i in range(3)])
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        made = [self.stem(x)]
        for layer in self.layers:
            made.append(self.relu(layer(torch.cat(made, 1))))
        out: Tensor = self.head(torch.cat(made, 1).mean((2, 3)))
        return out
