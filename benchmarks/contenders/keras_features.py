"""Keras 3 on torch: bottleneck features by ``predict``, then ``fit`` of what trains on the array, as its guide does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from contenders.job import Clock, Job, whole


class Timer(keras.callbacks.Callback):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def on_train_begin(self, logs: Any = None) -> None:
        self.clock.start()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        torch.manual_seed(self.clock.job.seed + epoch)
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.clock.seconds.append(time.perf_counter() - self.began)
        self.clock.losses.append(float(logs["loss"]))


def run(job: Job, clock: Clock) -> Callable[[Tensor], Tensor]:
    keras.utils.set_random_seed(job.seed)
    frozen, trained = job.frozen_halves(job.model())
    base = keras.Sequential([keras.Input((3, job.image_size, job.image_size)), keras.layers.TorchModuleWrapper(frozen)])
    features = base.predict(DataLoader(job.train, job.batch_size), verbose=0)
    labels = np.array([y for _, y in job.files])
    model = _head(features, trained)
    model.compile(
        optimizer=keras.optimizers.AdamW(1e-3, weight_decay=0.01, epsilon=1e-8),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(features, labels, batch_size=job.batch_size, epochs=job.epochs, verbose=0, callbacks=[Timer(clock)])
    return whole(frozen, model)


def _head(features: Any, trained: nn.Module) -> Any:
    """Dropout and a dense layer, with the weights that the others start from; a middle cut wraps the torch half."""
    inputs = keras.Input(features.shape[1:])
    linear = trained[-1]
    if not isinstance(linear, nn.Linear):
        return keras.Sequential([inputs, keras.layers.TorchModuleWrapper(trained)])
    dense = keras.layers.Dense(linear.out_features)
    model = keras.Sequential([inputs, keras.layers.Dropout(trained[0].p), dense])
    dense.set_weights([linear.weight.detach().numpy().T, linear.bias.detach().numpy()])
    return model
