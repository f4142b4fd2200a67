"""CIFAR-10 by classes, decoded once, and a small ResNet pretrained on five of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from freezeout import Augmented, ResNet
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from cachefreeze.cli.data import load_data

PRETRAINED_ON, TRANSFERRED_TO = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


def classes_of(classes: Sequence[int], train: int, test: int) -> tuple[TensorDataset, TensorDataset]:
    """The first ``train`` and ``test`` images of some classes, decoded; labels count from 0 in their order."""
    found = load_data("cifar10")
    return _first(found.train, classes, train), _first(found.val, classes, test)


def _first(dataset, classes: Sequence[int], count: int) -> TensorDataset:
    chosen = [index for index, label in enumerate(dataset.targets) if label in classes][:count]
    samples = [dataset[index] for index in chosen]
    labels = torch.tensor([classes.index(int(label)) for _, label in samples])
    return TensorDataset(torch.stack([image for image, _ in samples]), labels)


def pretrained(blocks: int, width: int, samples: int, epochs: int, lr: float = 0.1) -> dict[str, Tensor]:
    """Weights of a ResNet that learned the first five classes, without its classifier."""
    torch.manual_seed(1234)
    model = ResNet(blocks, width)
    data, _ = classes_of(PRETRAINED_ON, samples, 1)
    batches = DataLoader(Augmented(data), 50, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    model.train()
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    return {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}


def accuracy(model: torch.nn.Module, test: TensorDataset) -> float:
    """Share of the test images that are classified right."""
    images, labels = test.tensors
    batches = zip(images.split(500), labels.split(500), strict=True)
    with torch.no_grad():
        hits = [(model.eval()(x).argmax(1) == y).float() for x, y in batches]
    return float(torch.cat(hits).mean())
