"""This package, in the user's own loop."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import cachefreeze as cf
from contenders.job import Clock, Job, fit


def run(job: Job, clock: Clock, *, store: str = "host", **options: str) -> Callable[[Tensor], Tensor]:
    model = job.model()
    cf.freeze(model, job.train_from)
    engine = cf.Engine(model, f"hdf5:{job.folder}" if store == "hdf5" else store, **options)
    train = engine.loader(job.loader(job.train))
    fit(job, clock, train, engine, model, own=engine.epochs(job.epochs))
    engine.close()
    return model.eval()
