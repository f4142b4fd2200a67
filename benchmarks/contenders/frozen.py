"""Plain freezing without a cache: decode, frozen half, trained half, in every epoch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from contenders.job import Clock, Job, fit, whole


def run(job: Job, clock: Clock, *, workers: int = 0) -> Callable[[Tensor], Tensor]:
    frozen, trained = job.frozen_halves(job.model())

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            rows = frozen(x)
        return trained(rows)

    fit(job, clock, job.loader(job.train, workers=workers), forward, trained)
    return whole(frozen, trained)
