"""Only the inputs are cached: decoded photos in memory, the frozen half in bf16 and channels_last in every epoch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from contenders.job import Clock, Job, fit, whole


def run(job: Job, clock: Clock, *, compiled: bool = False) -> Callable[[Tensor], Tensor]:
    frozen, trained = job.frozen_halves(job.model())
    images, labels = zip(*DataLoader(job.train, job.batch_size), strict=True)
    decoded = TensorDataset(torch.cat(images), torch.cat(labels))
    half = frozen.to(memory_format=torch.channels_last)
    if compiled:
        half = torch.compile(half, dynamic=True)  # the last batch is smaller

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rows = half(x.contiguous(memory_format=torch.channels_last))
        return trained(rows.float())

    fit(job, clock, job.loader(decoded), forward, trained)
    return whole(frozen, trained)
