"""Lightning with ``BackboneFinetuning``: the backbone frozen for the whole run, and run in every step."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from torch import Tensor, nn
from torch.nn import functional

from contenders.job import Clock, Job, whole


class Classifier(lightning.LightningModule):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def on_train_epoch_start(self) -> None:
        self.backbone.eval()

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self.head(self.backbone(x)), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Frozen(BackboneFinetuning):
    """All of the backbone: by itself the callback goes on training the weights of its norms, whatever ``train_bn``."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)


class Timer(Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_start(self, *_: Any) -> None:
        self.clock.start()

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        torch.manual_seed(self.clock.job.seed + trainer.current_epoch)
        self.total, self.began = torch.zeros(()), time.perf_counter()

    def on_train_batch_end(self, _: Any, __: Any, outputs: Any, *___: Any) -> None:
        self.total += outputs["loss"].detach()

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.clock.seconds.append(time.perf_counter() - self.began)
        self.clock.losses.append(float(self.total) / trainer.num_training_batches)


def run(job: Job, clock: Clock, *, workers: int = 0) -> Callable[[Tensor], Tensor]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # on workers and on unused callbacks
    frozen, trained = job.frozen_halves(job.model())
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=clock.limit,
        callbacks=[Frozen(unfreeze_backbone_at_epoch=job.epochs + 1), Timer(clock)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(frozen, trained), job.loader(job.train, workers=workers))
    return whole(frozen.eval(), trained)
