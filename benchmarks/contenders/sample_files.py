"""One ``.pt`` file per sample, as AutoFreeze and many latent caches keep them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from contenders.job import Clock, Job, fit, whole


class Files(Dataset):
    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return torch.load(self.folder / f"{index}.pt", weights_only=True)


def run(job: Job, clock: Clock, *, workers: int = 0) -> Callable[[Tensor], Tensor]:
    frozen, trained = job.frozen_halves(job.model())
    done = 0
    for rows, labels in job.activations(frozen):
        for row, label in zip(rows, labels, strict=True):
            torch.save((row.clone(), label.clone()), job.folder / f"{done}.pt")
            done += 1
    fit(job, clock, job.loader(Files(job.folder, done), workers=workers), trained, trained)
    return whole(frozen, trained)
