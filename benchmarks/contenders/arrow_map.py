"""Hugging Face ``datasets``: a batched ``map`` to a column of activations, then torch format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import torch
from torch import Tensor

from contenders.job import Clock, Job, fit, whole


def run(job: Job, clock: Clock) -> Callable[[Tensor], Tensor]:
    datasets.disable_progress_bars()
    frozen, trained = job.frozen_halves(job.model())
    paths, labels = zip(*job.files, strict=True)
    images = datasets.Dataset.from_dict({"image": list(paths), "label": list(labels)})
    images = images.cast_column("image", datasets.Image())

    @torch.no_grad()
    def extract(batch: dict[str, Any]) -> dict[str, Any]:
        x = torch.stack([job.loaded.train.transform(image.convert("RGB")) for image in batch["image"]])
        return {"rows": frozen(x).numpy()}

    cached = images.map(
        extract,
        batched=True,
        batch_size=job.batch_size,
        remove_columns="image",
        cache_file_name=str(job.folder / "rows.arrow"),
    )
    loader = job.loader(cached.with_format("torch"))
    fit(job, clock, Pairs(loader), trained, trained)
    return whole(frozen, trained)


class Pairs:
    """The loader's dictionaries as pairs."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        return ((batch["rows"], batch["label"]) for batch in self.loader)
