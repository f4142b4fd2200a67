"""What a boundary at each block would cost and save: bytes of a row, share of the forward before it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from cachefreeze.blocks import Block, list_blocks
from cachefreeze.errors import SplitError
from cachefreeze.flops import count_flops
from cachefreeze.isolation import evaluating, preserved_parameters
from cachefreeze.listed import example_of
from cachefreeze.padding import Padded
from cachefreeze.splitting.planner import compare, minimum_cut
from cachefreeze.splitting.recording import record
from cachefreeze.splitting.rules import OpenInstead, Rules, open_as_needed
from cachefreeze.splitting.values import Recording
from cachefreeze.tracing import Call, Example, Usage, usage_of


def blocks(model: nn.Module, example_inputs: Any = None) -> list[Block]:
    """List the blocks of ``model`` in order of first use in a forward.

    Args:
        model: Any module. Modes, weights and random states are as before afterwards.
        example_inputs: A tensor, a tuple (positional) or a dict (keyword) with a batch of at least 2. Without
            them the order is read from a symbolic trace, else from registration, with a warning.

    Returns:
        The blocks; bytes and share of the forward only with ``example_inputs``.
    """
    if example_inputs is None:
        return list_blocks(model, usage_of(model))
    return _with_costs(model, example_of(model, example_inputs))


def blocks_padded(model: nn.Module, longer: Padded, shorter: Padded, lengths: Tensor) -> list[Block]:
    """:func:`blocks` for samples of different lengths: bytes are those of a row of the mean length.

    The model's inputs are kept in any case, so that they are none of a row's bytes.

    Args:
        model: As for :func:`blocks`.
        longer: A batch of at least two samples.
        shorter: Another one that is padded less.
        lengths: (samples, axes) how much of each sample is content.
    """
    # what follows a length grows with it, whatever else is kept does not
    long, short = (sum(axis.size(batch.example) for axis in batch.axes) for batch in (longer, shorter))
    share = (float(lengths.sum(dim=1).double().mean()) - short) / (long - short)

    def mean(a: int | None, b: int | None) -> int | None:
        return None if a is None or b is None else round(b + share * (a - b))

    listed = (_with_costs(model, batch.example, inputs_kept=True) for batch in (longer, shorter))
    return [
        replace(block, bytes_per_sample=mean(block.bytes_per_sample, other.bytes_per_sample))
        for block, other in zip(*listed, strict=True)
    ]


def _with_costs(model: nn.Module, example: Example, *, inputs_kept: bool = False) -> list[Block]:
    usage = usage_of(model, example)
    listed = list_blocks(model, usage)
    calls = {block.name: call for block in listed if (call := usage.first_call_of(model, block.name))}
    with preserved_parameters(model.get_parameter(name) for name in usage.writes):
        shares = _forward_before(model, example, calls)
        crossing = _crossing_bytes(model, example, usage, calls, inputs_kept=inputs_kept)
    return [
        replace(block, bytes_per_sample=crossing.get(block.name), forward_before=shares.get(block.name))
        for block in listed
    ]


def _forward_before(model: nn.Module, example: Example, calls: dict[str, Call]) -> dict[str, float]:
    """Share of the FLOPs that a forward has spent when each block is first entered."""
    spent: dict[str, int] = {}

    def note(name: str, *_: Any) -> None:
        spent.setdefault(name, counter.total)

    handles = [
        model.get_submodule(call.name).register_forward_pre_hook(partial(note, name)) for name, call in calls.items()
    ]
    try:
        with evaluating(model), count_flops() as counter:
            example.fresh().call(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: flops / counter.total for name, flops in spent.items()} if counter.total else {}


def _crossing_bytes(
    model: nn.Module, example: Example, usage: Usage, calls: dict[str, Call], *, inputs_kept: bool
) -> dict[str, int]:
    """Bytes of a row at each block, from one recording in which all blocks are closed."""
    starts = {call.start: name for name, call in calls.items()}

    def closes(call: Call) -> bool:
        return not any(call.start < start < call.end for start in starts)

    rules = Rules(usage=usage, closes=closes, boundaries=starts, strict=False, shares=not inputs_kept)
    recording = _record_alike(model, example, rules)
    if recording is None:
        return {}
    inputs = {v.place for v in recording.values if inputs_kept and v.place is not None and v.place[0] == "input"}
    found = {}
    for name in recording.boundaries:
        kept, _, obstacle = minimum_cut(recording, name, inputs)
        if obstacle is None:
            values = (recording.values[number] for number in kept)
            specs = (value.spec for value in values if value.place not in inputs)
            found[name] = sum(spec.bytes_per_sample for spec in specs if spec is not None)
    return found


def _record_alike(model: nn.Module, example: Example, rules: Rules) -> Recording | None:
    """One recording with the values' batch dimensions, opening what cannot be closed; None where that fails."""

    def attempt(opened: frozenset[str]) -> Recording:
        with evaluating(model):
            two, three = (record(model, example.take([i % 2 for i in range(count)]), rules, opened) for count in (2, 3))
            compare(two, three, "the forward")
        return two

    try:
        return open_as_needed(attempt, lambda name: next(model.get_submodule(name).children(), None) is not None)
    except (OpenInstead, SplitError):  # split says why, when it is asked for a boundary
        return None
