"""The job that needs no download: scikit-learn's real handwritten digits, and a small network for them.

The network is pretrained on the digits 0 to 4 and then transferred to 5 to 9, which it has never seen.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from cachefreeze.cli.optional import demo_package

PRETRAIN_CLASSES = (0, 1, 2, 3, 4)
TRANSFER_CLASSES = (5, 6, 7, 8, 9)
IMAGE_SIZE = 8
# One sample in five is for validation, the same ones in every run.
_VAL_EVERY = 5
_PRETRAIN_EPOCHS = 8
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DigitsCNN(nn.Module):
    """Three convolutions and a linear classifier; takes (batch, 3, S, S) with S of 8 or more."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _layer(3, 32), _layer(32, 64), nn.MaxPool2d(2), _layer(64, 64), nn.AdaptiveAvgPool2d(4), nn.Flatten()
        )
        self.classifier = nn.Linear(64 * 4 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, S, S) -> (batch, classes)."""
        result: Tensor = self.classifier(self.features(x))
        return result


def digits(classes: tuple[int, ...], *, train: bool, image_size: int = IMAGE_SIZE) -> TensorDataset:
    """Digits of some classes, labelled from 0 in their order: images (n, 3, S, S) normalised, labels (n,) int64."""
    images, labels = _all_digits()
    split = torch.arange(len(labels)) % _VAL_EVERY == 0
    chosen = torch.isin(labels, torch.tensor(classes)) & (split != train)
    pixels = images[chosen].unsqueeze(1)
    if image_size != IMAGE_SIZE:
        pixels = functional.interpolate(pixels, (image_size, image_size), mode="bilinear", antialias=True)
    pixels = pixels.expand(-1, 3, -1, -1)
    mean, std = torch.tensor(_MEAN).view(1, 3, 1, 1), torch.tensor(_STD).view(1, 3, 1, 1)
    positions = {label: i for i, label in enumerate(classes)}
    targets = torch.tensor([positions[int(label)] for label in labels[chosen]])
    return TensorDataset((pixels - mean) / std, targets)


def pretrain(model: DigitsCNN, *, seed: int) -> None:
    """Train ``model`` on the pretraining classes, then give it a new classifier of the old size.

    The global random states are as before afterwards.
    """
    data = digits(PRETRAIN_CLASSES, train=True)
    images, labels = data.tensors
    classifier = model.classifier
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.classifier = nn.Linear(classifier.in_features, len(PRETRAIN_CLASSES))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        model.train()
        for _ in range(_PRETRAIN_EPOCHS):
            for batch in torch.split(torch.randperm(len(labels)), 64):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(images[batch]), labels[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    model.zero_grad()
    model.classifier = classifier


def _layer(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


@cache
def _all_digits() -> tuple[Tensor, Tensor]:
    datasets = demo_package("sklearn.datasets")
    loaded = datasets.load_digits()
    # grey levels 0 to 16
    return torch.tensor(loaded.images, dtype=torch.float32) / 16, torch.tensor(loaded.target, dtype=torch.int64)
