"""Trap models of chance and state: random numbers on both sides of the boundary, and buffers that a forward changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class DropoutPrefix(nn.Sequential):
    """Dropout before the boundary: random unless the freeze holds it in eval mode."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 2))


class RandomSuffix(nn.Module):
    """The suffix draws random numbers even in eval mode: allowed, it is not cached."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to a sample."""
        y: Tensor = self.head(self.stem(x))
        return y + torch.randn_like(y)


class RunningMean(nn.Module):
    """A buffer that is bound anew, not written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Centre by the running mean."""
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class ReboundBuffer(nn.Sequential):
    """A suffix whose buffer is another object after each forward in train mode."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.Linear(6, 6), RunningMean(), nn.Linear(6, 2))


class SpectralSuffix(nn.Sequential):
    """A parametrised suffix layer that updates its buffers in train mode."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)))


class NoisyReLU(nn.ReLU):
    """A subclass of a harmless activation that is random in train mode."""

    def forward(self, input: Tensor) -> Tensor:
        """ReLU, with noise in train mode."""
        return super().forward(input + torch.randn_like(input) if self.training else input)


class NoisyTail(nn.Sequential):
    """The boundary block starts with a subclass of ReLU that is random in train mode: no parameter-free tail."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.block = nn.Sequential(NoisyReLU(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 2)


class FunctionalDropout(nn.Module):
    """Functional dropout in a half-frozen parent: no freeze can switch it off. Refused."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors to logits."""
        out: Tensor = self.head(functional.dropout(self.stem(x), 0.5, self.training))
        return out


class Noise(nn.Module):
    """Adds noise in every mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Add noise."""
        return x + torch.randn_like(x)


class RandomPrefix(nn.Sequential):
    """The prefix is random even in eval mode. Refused."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), Noise(), nn.Linear(6, 2))
