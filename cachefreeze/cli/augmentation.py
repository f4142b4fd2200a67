"""The augmentation of ``--variants``: a random crop and, where a mirrored image shows the same, a random flip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

# Of an image's side, 4 pixels of 32: the usual augmentation of CIFAR-10, He et al. (2015), section 4.2.
_PADDING_SHARE = 8


class Augmented(Dataset[tuple[Tensor, int]]):
    """Every image shifted by up to an eighth of its side and, with ``flip``, mirrored half of the time.

    Shapes:
        self[i]: as the dataset's own, (3, S, S) and the label; what is shifted in is zero, the mean colour.
    """

    def __init__(self, dataset: Any, *, flip: bool) -> None:
        self.dataset = dataset
        self.flip = flip

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        side = image.shape[-1]
        by = max(1, side // _PADDING_SHARE)
        top, left = torch.randint(0, 2 * by + 1, (2,)).tolist()
        image = functional.pad(image, (by, by, by, by))[..., top : top + side, left : left + side]
        return (image.flip(-1) if self.flip and torch.rand(()).item() < 0.5 else image.contiguous()), label
