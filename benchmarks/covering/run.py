"""Run one model at all its cuts, in this process."""

from __future__ import annotations

import copy
import time
import traceback
import warnings
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import cachefreeze as cf
from covering import checks
from covering.case import Case
from covering.comparing import call, draw
from covering.mincut import minimum_bytes
from covering.recording import Recording, record
from covering.reference import Reference, draws_before, reached, settle, why_not
from covering.state import State

SPLIT_BATCH = 3
# Which block, as a share of the way to the last one.
PLACES = {"early": 1 / 6, "middle": 1 / 2, "late": 5 / 6, "head": 1.0}


@cache
def package_digest() -> str:
    """What was tested: a run that is resumed may see two states of the package."""
    sources = sorted(Path(cf.__file__).parent.rglob("*.py"))
    return sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def run_case(case: Case, places: tuple[str, ...]) -> dict[str, Any]:
    """Every cut of one model, as JSON can hold it."""
    began = time.perf_counter()
    warnings.simplefilter("ignore")
    result = {"library": case.library, "name": case.name, "note": case.note, "package": package_digest()}
    try:
        torch.manual_seed(0)
        model = case.build()
        settle(case, model)
        inputs = (case.example or case.inputs)(SPLIT_BATCH, torch.Generator().manual_seed(1))
        trained = reached(case, model)
        two, three = (record(copy.deepcopy(model), draw(case, n, 2), call) for n in (2, 3))
    except Exception as error:
        return {**result, "cuts": [_cut("all", "", "n/a", f"the model itself fails: {_short(error)}")]}
    result["parameters"] = sum(p.numel() for p in model.parameters())
    try:
        listed = [block.name for block in cf.blocks(model, inputs)]
    except Exception as error:
        return {**result, "cuts": [_cut("all", "", "crash", f"cf.blocks: {_short(error)}", traceback.format_exc())]}
    cuts = [
        _beyond_rounding(_one(case, model, inputs, place, name, two, three), case, model, inputs)
        for place, name in _chosen(_trainable(listed, two, trained), places)
    ]
    return {**result, "blocks": len(listed), "cuts": cuts, "seconds": round(time.perf_counter() - began, 1)}


def _trainable(listed: list[str], recording: Recording, reached: set[str]) -> list[str]:
    """Blocks that leave something to train.

    A head that is tied to the embeddings is frozen with them; one whose output the model does not return (a loss that
    takes labels) gets no gradient in the model itself.
    """
    times = [at for name, at in recording.parameters.items() if name in reached]
    return [n for n in listed if n not in recording.starts or any(at > recording.starts[n] for at in times)]


def _chosen(listed: list[str], places: tuple[str, ...]) -> list[tuple[str, str]]:
    """One block per place; a model of few blocks has fewer places."""
    found: dict[str, str] = {}
    last = len(listed) - 1
    for place, share in PLACES.items():
        at = min(max(1, int(last * share)), last)
        if place in places and at > 0 and listed[at] not in found.values():
            found[place] = listed[at]
    return list(found.items())


def _beyond_rounding(found: dict[str, Any], case: Case, model: nn.Module, inputs: Any) -> dict[str, Any]:
    """What is wrong or refused is tried again in float64.

    A deep network of random weights amplifies one unit in the last place to any size: in float32 its rows differ by
    batch as a wrong row would. What is wrong by more than rounding is so in float64 too.
    """
    if found["status"] not in ("silent", "refused"):
        return found
    exact = replace(case, inputs=lambda batch, generator: _double(case.inputs(batch, generator)), example=None)
    doubled = copy.deepcopy(model).double()
    try:
        recorded = [record(copy.deepcopy(doubled), draw(exact, count, 2), call) for count in (2, 3)]
        again = _one(exact, doubled, _double(inputs), found["place"], found["boundary"], *recorded)
    except Exception as error:  # a model that makes float32 tensors of its own, or no memory: it says nothing
        return {**found, "reason": f"{found['reason']}; in float64: {_short(error)}"}
    if again["status"] != "ok":
        return found
    return {**again, "reason": f"float32: {found['status']}: {found['reason']}", "float64": True}


def _double(inputs: Any) -> Any:
    def convert(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(convert, inputs)


def _one(
    case: Case, untouched: nn.Module, inputs: Any, place: str, name: str, two: Recording, three: Recording
) -> dict[str, Any]:
    began = time.perf_counter()
    model = copy.deepcopy(untouched)
    if name not in two.starts:
        return _cut(place, name, "crash", "cf.blocks lists a module that a forward never calls")
    try:
        cf.freeze(model, train_from=name, example_inputs=inputs)
        with torch.no_grad():
            call(model.eval(), inputs)  # what a forward of the model leaves behind by itself is no trace of ours
        model.train()
        before = State(model)
        parts = cf.split(model, inputs)
        broken = before.broken(model)
    except cf.CacheFreezeError as error:
        why = why_not(case, untouched, two, name)
        found = _cut(place, name, "n/a" if why else "refused", _short(error))
        return {**found, "why": why} if why else found
    except Exception as error:  # anything else that comes out of the package is a fault of its own
        return _cut(place, name, "crash", _short(error), traceback.format_exc())
    seconds = time.perf_counter() - began
    reference = Reference(untouched, two, name)
    minimum = minimum_bytes(two, three, name)
    kept = parts.boundary.bytes_per_sample
    found = {
        "executor": parts.executor,
        "bytes": kept,
        "minimum_bytes": minimum,
        "ratio": round(kept / minimum, 4) if minimum else None,
        "cached_fraction": round(parts.cached_fraction, 4),
        "split_seconds": round(seconds, 2),
    }
    try:
        exact = checks.check_all(checks.Subject(case, model, parts, reference, two, name, SPLIT_BATCH))
    except checks.WorkError as error:
        if not draws_before(case, untouched, two, name):
            return {**_cut(place, name, "work", str(error)), **found}
        # the minimum knows nothing of draws: it would keep what is another value in every step
        found |= {"live": str(error), "ratio": None, "minimum_bytes": None}
        exact = None
    except Exception as error:  # the parts may raise anything where the model itself does not
        return {**_cut(place, name, "silent", _short(error), traceback.format_exc()), **found}
    if broken:
        return {**_cut(place, name, "state", f"cf.split {broken}"), **found}
    return {**_cut(place, name, "ok", ""), **found, "exact": exact}


def _cut(place: str, name: str, status: str, reason: str, trace: str = "") -> dict[str, Any]:
    return {"place": place, "boundary": name, "status": status, "reason": reason, **({"trace": trace} if trace else {})}


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
