"""Whether the data is still what rows were made of: looked at when a pass begins, since training scripts do change it.

A curriculum sets ``dataset.epoch``, self-training replaces ``dataset.targets``, progressive resizing binds another
transform. Files are covered by the fingerprint when a store is opened; here it is the objects of this process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import TensorDataset

from cachefreeze.errors import StaleCacheError
from cachefreeze.fingerprint import digest
from cachefreeze.generators import generators_of, preserved_states
from cachefreeze.isolation import preserved_random_state
from cachefreeze.ragged import evenly
from cachefreeze.samples import View, collate_samples, is_map_style

# Attributes that list something for every sample.
_LISTED = ("targets", "labels", "indices")
# Samples whose content is known; a pass fetches two of them, or one that takes longer than this many seconds, and all
# where an attribute was bound anew.
_KNOWN, _LONG = 8, 5e-4
# Of a list or dict as many are looked at whether they are datasets: joined ones are.
_MAX_PARTS = 256
# Lists of more bytes than this are digested at evenly spaced samples: about 5 ms.
_WHOLE_BYTES = 64 * 2**20


class SampleWatch:
    """What the samples of a view were when it was made.

    Noticed: another number of samples; any change of what a dataset lists for every sample (``targets``, ``labels``,
    ``indices``, the tensors of a TensorDataset), in place or not; and whatever changes the content of the samples that
    are fetched again: the first one, and one in the middle unless that takes long. A change of a few other samples that
    binds nothing anew goes unnoticed.

    Args:
        view: The samples.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._count, self._samples = len(view), view.samples
        datasets = self._datasets()
        self._lists = _listed(datasets)
        before = _bound(datasets)  # holds the objects: another one cannot take the address of one of them meanwhile
        known = evenly(self._count, _KNOWN)
        began = time.perf_counter()
        fetched = self._fetch(known)
        is_long = time.perf_counter() - began > _LONG * len(known)
        self._content = {i: self._digests(batch) for i, batch in zip(known, fetched, strict=True)}
        self._again = sorted({known[0], known[0 if is_long else len(known) // 2]})
        after = _bound(self._datasets())
        # a dataset that counts or keeps what it has loaded binds attributes with every access
        steady = [where for where in before if where in after and _key(before[where]) == _key(after[where])]
        self._steady = {where: _key(before[where]) for where in steady}

    def check(self, name: str) -> None:
        """Compare with what the samples are now. Random states are as before afterwards.

        Args:
            name: Of the store, for the error.

        Raises:
            StaleCacheError: Names what changed.
        """
        changed = self._changed()
        if changed:
            raise StaleCacheError(
                f"the data of {name!r} changed since its cache was opened, so its rows are stale: {changed}. Change "
                "data before the loader is made; for data that changes from epoch to epoch make a new Engine each "
                "time, or train with store='off'"
            )

    def _changed(self) -> str:
        if len(self._view) != self._count:
            each = self._count // self._samples
            return f"there are {len(self._view) // each} samples, there were {self._samples}"
        datasets = self._datasets()
        lists = _listed(datasets)
        for where in sorted(lists.keys() | self._lists.keys()):
            if lists.get(where) != self._lists.get(where):
                return f"{where} is not what it was"
        now = _bound(datasets)
        bound = [where for where, key in self._steady.items() if where not in now or _key(now[where]) != key]
        again = list(self._content) if bound else self._again
        for index, batch in zip(again, self._fetch(again), strict=True):
            inputs, whole = self._content[index]
            if digest(batch) != whole:  # which is of the inputs too
                what = "inputs" if self._digests(batch)[0] != inputs else "fields beside the inputs (labels?)"
                hint = f" (set since: {', '.join(bound)})" if bound else ""
                return f"the {what} of sample {index} are not what they were{hint}"
        return ""

    def _fetch(self, samples: Sequence[int]) -> list[Any]:
        """What the collate function makes of each of some samples."""
        drawn_from = [
            found for held in (self._view.dataset, self._view.collate_fn) for _, found in generators_of(held, "")
        ]
        batches = []
        with preserved_random_state():
            for index in samples:
                with preserved_states(drawn_from):  # each as if it were the first
                    batches.append(collate_samples(self._view.dataset, self._view.collate_fn, [index]))
        return batches

    def _digests(self, batch: Any) -> tuple[str, str]:
        """Digests of what the model consumes of a batch, and of all of it."""
        example = self._view.layout.example(batch)
        return digest((example.args, example.kwargs)), digest(batch)

    def _datasets(self) -> list[tuple[str, Any]]:
        """All that samples are made of, with the expression that leads to each."""
        seen: set[int] = set()
        own = [] if self._view.turns is not None else [*_within(self._view.dataset, "dataset", seen)]
        # under view= the loader's own dataset is another one, whose labels the user knows
        return [*own, *_within(self._view.source, "dataset", seen)]


def _listed(datasets: Sequence[tuple[str, Any]]) -> dict[str, str]:
    """Digests of what datasets list for every sample."""
    found = {}
    for where, dataset in datasets:
        for key, value in vars(dataset).items():
            if key in _LISTED or (key == "tensors" and isinstance(dataset, TensorDataset)):
                found[f"{where}.{key}"] = _list_digest(value)
    return found


def _bound(datasets: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The other attributes of datasets."""
    return {
        f"{where}.{key}": value
        for where, dataset in datasets
        for key, value in vars(dataset).items()
        if key not in _LISTED
    }


def _key(value: Any) -> Any:
    """Plain values themselves; objects by their address, since to hold them would keep replaced data in memory."""
    return value if isinstance(value, bool | int | float | str) else ("object", id(value))


def _within(dataset: Any, where: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """A dataset and those that it is made of, with the expression that leads to each."""
    if id(dataset) in seen or not hasattr(dataset, "__dict__"):
        return
    seen.add(id(dataset))
    yield where, dataset
    for key, value in vars(dataset).items():
        inside: Any = value.items() if isinstance(value, dict) else ()
        if isinstance(value, list | tuple):
            inside = enumerate(value)
        found = [("", value), *((f"[{at!r}]", part) for at, part in islice(inside, _MAX_PARTS) if _may_hold(part))]
        for at, inner in found:
            if _may_hold(inner):
                yield from _within(inner, f"{where}.{key}{at}", seen)


def _may_hold(part: Any) -> bool:
    """Whether a part of a dataset may be one itself; most are numbers or names, of which there are many."""
    return hasattr(part, "__dict__") and is_map_style(part) and not isinstance(part, Tensor | type)


def _list_digest(value: Any) -> str:
    """Digest of a list, array or tensor with something for every sample."""
    if isinstance(value, Tensor | np.ndarray):
        step = -(-value.nbytes // _WHOLE_BYTES)
        return digest(value[::step] if step > 1 else value)
    if isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value):
        return " ".join(map(_list_digest, value))
    try:
        packed = np.asarray(value)  # a list of a million numbers: 50 ms instead of seconds
    except (ValueError, TypeError, RuntimeError):
        return digest(value)
    if packed.dtype == object:
        return digest(value) if isinstance(value, list | tuple | dict) else ""
    return _list_digest(packed)
