"""The hand-written cache on disk: an h5py dataset that is written in batches and read row by row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor
from torch.utils.data import Dataset

from contenders.job import Clock, Job, fit, whole


class Rows(Dataset):
    """Opens the file when it is first read, in each worker for itself."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count, self.file = path, count, None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.file is None:
            self.file = h5py.File(self.path, "r")
        return torch.from_numpy(self.file["rows"][index]), int(self.file["labels"][index])


def run(job: Job, clock: Clock, *, workers: int = 0) -> Callable[[Tensor], Tensor]:
    frozen, trained = job.frozen_halves(job.model())
    path, done = job.folder / "rows.h5", 0
    with h5py.File(path, "w") as file:
        for rows, labels in job.activations(frozen):
            if not done:
                _create(file, rows, len(job.train))
            file["rows"][done : done + len(rows)] = rows.numpy()
            file["labels"][done : done + len(rows)] = labels.numpy()
            done += len(rows)
    fit(job, clock, job.loader(Rows(path, done), workers=workers), trained, trained)
    return whole(frozen, trained)


def _create(file: Any, rows: Tensor, count: int) -> None:
    file.create_dataset("rows", (count, *rows.shape[1:]), "f4")
    file.create_dataset("labels", (count,), "i8")
