"""Learning rates per block, without a rebuilt optimizer.

The optimizer's groups are split in place, one for each block, so that state, hyperparameters and the order of
parameters within a group stay. A block's factor is there only while ``optimizer.step`` runs: between steps a group's
``lr`` is the user's own, so that schedulers that multiply what they find (StepLR, the chained forms of torch) never
multiply a factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cachefreeze.errors import CheckpointError, UsageError
from cachefreeze.freezing import boundary_event
from cachefreeze.schedules import Ladder
from cachefreeze.tracing import Usage

_BLOCK = "block"


class BlockRates:
    """Multiplies the learning rate of every block while an optimizer steps.

    Args:
        optimizer: Any of torch.optim but LBFGS, before a scheduler is made and before a state is loaded.
        blocks: For every parameter of the model, by ``id``, the index of its block.
        names: Of the blocks.

    Attributes:
        factors: What each block's learning rate is multiplied with from the next step on.

    Raises:
        UsageError: There is a scheduler already, groups cannot be split, or parameters are not the model's.
    """

    def __init__(self, optimizer: Optimizer, blocks: Mapping[int, int], names: Sequence[str]) -> None:
        _check(optimizer)
        groups = [part for group in optimizer.param_groups for part in _parts(group, blocks, names)]
        optimizer.param_groups[:] = groups
        self.factors: tuple[float, ...] = (1.0,) * len(names)
        self._optimizer = optimizer
        self._names = [group[_BLOCK] for group in groups]
        self._blocks = [names.index(name) for name in self._names]
        self._kept: list[tuple[dict[str, Any], Any]] = []

    def start(self) -> None:
        """Multiply from the next step on; hooks that were registered before this see the user's own rates."""
        self._optimizer.register_step_pre_hook(self._multiply)
        self._optimizer.register_step_post_hook(self._restore)

    def of_blocks(self) -> list[float]:
        """The user's learning rate of each block, the largest where its groups differ; 0 where it has none."""
        rates = [0.0] * len(self.factors)
        for block, group in zip(self._blocks, self._optimizer.param_groups, strict=True):
            rates[block] = max(rates[block], float(group["lr"]))
        return rates

    def check(self) -> None:
        """Raise where groups were added, removed or loaded from an optimizer that was split otherwise."""
        found = [group.get(_BLOCK) for group in self._optimizer.param_groups]
        if found != self._names:
            raise CheckpointError(
                f"the optimizer's groups are of blocks {found}, attach made them for {self._names}: add groups before "
                "engine.attach(optimizer), and load only states that were saved after it"
            )

    def _multiply(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore(optimizer, args, kwargs)  # where the step before raised
        self.check()
        for block, group in zip(self._blocks, optimizer.param_groups, strict=True):
            rate, factor = group["lr"], self.factors[block]
            if factor == 1.0:
                continue
            if isinstance(rate, Tensor):
                # a captured graph reads this very tensor
                self._kept.append((group, rate.clone()))
                rate.mul_(factor)
            else:
                self._kept.append((group, rate))
                group["lr"] = rate * factor

    def _restore(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in self._kept:
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        self._kept.clear()


def parameter_blocks(model: nn.Module, ladder: Ladder, usage: Usage) -> dict[int, int]:
    """The block of every parameter, by ``id``: the last one that begins before its first use.

    It freezes with this block, as ``cf.freeze(train_from=…)`` has it; what no forward uses goes with the last block.
    """
    starts = [boundary_event(model, name, usage) for name in ladder.names]
    owners = {}
    for name, parameter in model.named_parameters():
        event = usage.parameters.get(name)
        block = len(ladder) - 1 if event is None else sum(start <= event for start in starts) - 1
        owners[id(parameter)] = max(block, 0)
    return owners


def _check(optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UsageError("LBFGS knows no groups, so it has no learning rate per block; use another optimizer")
    if any(_BLOCK in group for group in optimizer.param_groups):
        raise UsageError("this optimizer was attached before; an optimizer belongs to one engine")
    scheduled = any("initial_lr" in group for group in optimizer.param_groups)
    if scheduled or hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise UsageError(
            "this optimizer has a learning-rate scheduler, which counts its groups: call engine.attach(optimizer) "
            "first, then make the scheduler"
        )


def _parts(group: dict[str, Any], blocks: Mapping[int, int], names: Sequence[str]) -> list[dict[str, Any]]:
    """A group's parameters by block, each part with the group's own settings."""
    foreign = sum(id(parameter) not in blocks for parameter in group["params"])
    if foreign:
        raise UsageError(f"the optimizer holds {foreign} parameters that are not the engine's model's")
    by_block: dict[int, list[int]] = {}
    for position, parameter in enumerate(group["params"]):
        by_block.setdefault(blocks[id(parameter)], []).append(position)
    parts = []
    for block in sorted(by_block):
        rate = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
        # the two entries that have one value a parameter
        listed: dict[str, Any] = {
            key: [group[key][at] for at in by_block[block]] for key in ("params", "param_names") if key in group
        }
        parts.append({**group, **listed, "lr": rate, _BLOCK: names[block]})
    return parts
