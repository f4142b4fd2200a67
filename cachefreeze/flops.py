"""Floating-point operations of a forward, counted as torch's own counter does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs inside it.

    ``torch.utils.flop_counter.FlopCounterMode`` counts by module as well, with gradient hooks that fail on custom
    autograd functions; only the sum is needed here.

    Attributes:
        total: Operations so far; a multiplication and an addition are two.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self._formulas = dict(flop_registry)
        for name in ("_scaled_dot_product_flash_attention_for_cpu",):
            self._formulas.setdefault(getattr(torch.ops.aten, name), sdpa_flop)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._formulas and func._overloadpacket not in self._formulas:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket, self._formulas.get(func))
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


@contextmanager
def count_flops() -> Iterator[FlopCounter]:
    """Count, without the fused attention of eval mode, which no counter knows."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounter() as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
