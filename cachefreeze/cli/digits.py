"""The job that needs no download: scikit-learn's real handwritten digits, and a small network for them.

The network is pretrained on the digits 0 to 4 and then transferred to 5 to 9, which it has never seen.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from cachefreeze.cli.optional import demo_package
from cachefreeze.errors import UsageError

PRETRAIN_CLASSES = (0, 1, 2, 3, 4)
TRANSFER_CLASSES = (5, 6, 7, 8, 9)
IMAGE_SIZE = 8
# A random state of its own, so that the split is the same in every run, whatever the job's seed.
_SPLIT_SEED = 20240
_VAL_FRACTION = 0.2
# As good for the other digits as twice as many: 97 to 99 % over seeds 0 to 9.
_PRETRAIN_EPOCHS = 6
_PRETRAIN_LR = 2e-3
_PRETRAIN_BATCH_SIZE = 64
# ImageNet's, as for every other data set
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DigitsCNN(nn.Module):
    """Three convolutions and a linear classifier; takes (batch, 3, S, S) with S of 8 or more.

    On the x86 CPUs tried, features are the same bits in any batch of two or more, so cached and uncached runs agree.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _layer(3, 32), _layer(32, 64), nn.MaxPool2d(2), _layer(64, 128), nn.AdaptiveAvgPool2d(4), nn.Flatten()
        )
        self.classifier = nn.Linear(128 * 4 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, S, S) -> (batch, classes)."""
        result: Tensor = self.classifier(self.features(x))
        return result


class Digits(Dataset[tuple[Tensor, int]]):
    """Some classes of the digits, grey levels repeated in three channels; labels count from 0 in their order.

    Shapes:
        self[i]: float32 (3, S, S), normalised, and the label.
    """

    def __init__(self, classes: tuple[int, ...], *, train: bool, image_size: int = IMAGE_SIZE) -> None:
        if image_size < IMAGE_SIZE:
            raise UsageError(f"image_size={image_size}: the digits are {IMAGE_SIZE} px; use {IMAGE_SIZE} or more")
        pixels, labels, held_out = _all_digits()
        chosen = torch.isin(labels, torch.tensor(classes)) & (held_out != train)
        # kept small and enlarged sample by sample: at 224 px all of them would take 0.5 GB
        self.pixels = pixels[chosen]
        self.targets = [classes.index(int(label)) for label in labels[chosen]]
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.pixels[index].view(1, 1, IMAGE_SIZE, IMAGE_SIZE)
        if self.image_size != IMAGE_SIZE:
            size = (self.image_size, self.image_size)
            image = functional.interpolate(image, size, mode="bilinear", antialias=True)
        mean, std = torch.tensor(_MEAN).view(3, 1, 1), torch.tensor(_STD).view(3, 1, 1)
        return (image[0] - mean) / std, self.targets[index]


def pretrain(model: DigitsCNN, *, seed: int, image_size: int = IMAGE_SIZE, epochs: int = _PRETRAIN_EPOCHS) -> None:
    """Train all of ``model`` on the pretraining classes, then put its own classifier back, untouched.

    Plain PyTorch, on the model's device, one to two seconds on a CPU. The global random states and the model's
    modes are as before afterwards.
    """
    data = Digits(PRETRAIN_CLASSES, train=True, image_size=image_size)
    samples = [data[i] for i in range(len(data))]
    device = model.classifier.weight.device
    images = torch.stack([image for image, _ in samples]).to(device)
    labels = torch.tensor([label for _, label in samples], device=device)
    classifier, modes = model.classifier, [(module, module.training) for module in model.modules()]
    threads = torch.get_num_threads()
    try:
        # One thread: kernels this small gain little from more, on a busy machine waiting for the others costs tenfold,
        # and the features do not depend on the number of cores.
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which would seed the GPUs as well; nothing here draws on one
            torch.default_generator.manual_seed(seed)
            model.classifier = nn.Linear(classifier.in_features, len(PRETRAIN_CLASSES)).to(device)
            _fit(model, images, labels, epochs)
    finally:
        torch.set_num_threads(threads)
        model.classifier = classifier
        for module, training in modes:
            module.training = training


def _fit(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PRETRAIN_LR)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels)).to(labels.device)
        for start in range(0, len(order), _PRETRAIN_BATCH_SIZE):
            batch = order[start : start + _PRETRAIN_BATCH_SIZE]
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    optimizer.zero_grad()


def _layer(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


@cache
def _all_digits() -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (n, 8, 8) in [0, 1], labels (n,), and which samples (n,) are for validation: a fifth of each class."""
    loaded = demo_package("sklearn.datasets").load_digits()
    labels = np.asarray(loaded.target)
    held_out = np.zeros(len(labels), dtype=bool)
    # the old class, because its draws are the same in every version of numpy
    generator = np.random.RandomState(_SPLIT_SEED)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held_out[members[: round(len(members) * _VAL_FRACTION)]] = True
    # grey levels 0 to 16
    pixels = torch.tensor(loaded.images, dtype=torch.float32) / 16
    return pixels, torch.tensor(labels, dtype=torch.int64), torch.from_numpy(held_out)
