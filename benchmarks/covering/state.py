"""What a library call must leave as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    """A checksum of a tensor's bits: of all bytes, and of them in their order."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = raw[: raw.numel() // 4 * 4].view(torch.int32)
    return tuple(tensor.shape), int(raw.numel()), int(words.sum()), int(words[::2].sum()), int(raw[-8:].sum())


class State:
    """Everything of a model and of the process that a library call must leave as it was."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = {n: (id(m), m.training) for n, m in model.named_modules(remove_duplicate=False)}
        self._tensors = {
            n: (id(t), _bits(t.detach()), t.requires_grad)
            for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        }
        self._grads = {n: p.grad for n, p in model.named_parameters()}
        self._hooks = [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
        ]
        self._attributes = [sorted(vars(m)) for m in model.modules()]
        self._random = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # noqa: NPY002

    def broken(self, model: nn.Module) -> str | None:
        """What differs now, or None."""
        now = State(model)
        if now._modes != self._modes:
            names = [n for n in {**self._modes, **now._modes} if self._modes.get(n) != now._modes.get(n)]
            return f"changed mode or identity of {names[:4]}"
        for name in {**self._tensors, **now._tensors}:
            was, is_now = self._tensors.get(name), now._tensors.get(name)
            if was is None or is_now is None or was[0] != is_now[0] or was[2] != is_now[2]:
                return f"replaced {name!r} or changed its requires_grad"
            if was[1] != is_now[1]:
                return f"changed the values of {name!r}"
        if any(now._grads[name] is not grad for name, grad in self._grads.items()):
            return "changed gradients"
        if now._hooks != self._hooks or now._attributes != self._attributes:
            return "left hooks or attributes behind"
        numpy_same = np.array_equal(now._random[1], self._random[1])
        if not torch.equal(now._random[0], self._random[0]) or not numpy_same or now._random[2] != self._random[2]:
            return "moved a random state"
        return None
