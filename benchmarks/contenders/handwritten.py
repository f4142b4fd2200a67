"""The cache of twenty lines: all activations in one TensorDataset, then a DataLoader over it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from contenders.job import Clock, Job, fit, whole


def run(job: Job, clock: Clock, *, workers: int = 0) -> Callable[[Tensor], Tensor]:
    frozen, trained = job.frozen_halves(job.model())
    rows, labels = zip(*job.activations(frozen), strict=True)
    dataset = TensorDataset(torch.cat(rows), torch.cat(labels))
    fit(job, clock, job.loader(dataset, workers=workers), trained, trained)
    return whole(frozen, trained)
