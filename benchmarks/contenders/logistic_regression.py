"""scikit-learn: features as an array, and a logistic regression by L-BFGS. Another training, to its optimum."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from contenders.job import Clock, Job


def run(job: Job, clock: Clock) -> Callable[[Tensor], Tensor]:
    frozen, _ = job.frozen_halves(job.model())
    rows, labels = zip(*job.activations(frozen), strict=True)
    features, targets = torch.cat(rows).numpy(), torch.cat(labels).numpy()
    clock.start()
    began = time.perf_counter()
    found = LogisticRegression(max_iter=1000).fit(features, targets)
    # it has no epochs: the whole fit stands for all of them
    clock.seconds = [(time.perf_counter() - began) / job.epochs] * job.epochs
    return lambda x: torch.from_numpy(found.decision_function(frozen(x).numpy()))
