"""What a dataset is made of: of all its samples together, and of each one where that can be told without fetching it.

A sample's *key* is a digest of the elements that the dataset lists for it: rows of arrays, labels, and of files their
path, size and time of modification. Samples with equal keys are the same; of others only fetching tells what changed.
"""

from __future__ import annotations

import copy
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from cachefreeze.fingerprint import digest, tensor_bytes
from cachefreeze.generators import preserved_generators
from cachefreeze.isolation import preserved_random_state
from cachefreeze.ragged import evenly

# Samples that are fetched to see which element of each list they take.
_PROBED = 4
# Datasets within datasets that are looked into.
_MAX_DEPTH = 8


@dataclass(frozen=True)
class Keyed:
    """A dataset, taken apart.

    Attributes:
        keys: (samples,) int64.
        rest: What is not listed by sample, such as a transform.
    """

    keys: NDArray[np.int64]
    rest: Any


def keyed(dataset: Any) -> Keyed | None:
    """Keys of all samples; None where elements that belong to one sample cannot be told from what all depend on.

    Known are a TensorDataset, a Subset and a ConcatDataset of known ones, and a dataset whose attributes are lists or
    arrays with one element a sample, of which ``dataset[i]`` takes element *i* and no other. That is looked at for a
    few samples. Random states are as before afterwards.
    """
    if type(dataset) is Subset:
        inner = keyed(dataset.dataset)
        return (
            None if inner is None else Keyed(inner.keys[np.asarray(dataset.indices, np.int64)], ("Subset", inner.rest))
        )
    if type(dataset) is ConcatDataset:
        parts = [keyed(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return Keyed(np.concatenate([part.keys for part in known]), ("ConcatDataset", [part.rest for part in known]))
    if not hasattr(dataset, "__dict__") or hasattr(dataset, "__getitems__"):
        return None
    state = dict(vars(dataset))
    if type(dataset) is TensorDataset:
        columns = {f"tensors[{i}]": tensor for i, tensor in enumerate(state.pop("tensors"))}
    else:
        columns = _columns(dataset, state)
        state = {name: value for name, value in state.items() if name not in columns}
    if not columns:
        return None
    folders = _folders(dataset)
    # torchvision's folders list their files under two names
    digests = {
        id(column): _element_digests(column, folders) for column in {id(c): c for c in columns.values()}.values()
    }
    found = np.stack([digests[id(columns[name])] for name in sorted(columns)], axis=1)
    keys = np.fromiter((xxhash.xxh3_64_intdigest(row) for row in found), np.uint64, len(found)).view(np.int64)
    return Keyed(keys, (type(dataset).__qualname__, sorted(columns), _told(state, folders)))


def described(dataset: Any, depth: int = 0) -> Any:
    """All that a dataset is made of, without the folder it lies in and without :func:`listed_labels`."""
    if isinstance(dataset, Subset):
        return ("Subset", list(dataset.indices), described(dataset.dataset, depth))
    if isinstance(dataset, ConcatDataset):
        return ("ConcatDataset", [described(inner, depth) for inner in dataset.datasets])
    state = dict(vars(dataset)) if hasattr(dataset, "__dict__") else {}
    folders = _folders(dataset)
    labels = () if depth else ("targets", "labels")
    kept = {name: value for name, value in state.items() if name not in labels or _files_at(value, folders)}
    return (type(dataset).__qualname__, _told(kept, folders, depth))


def listed_labels(dataset: Any) -> Any:
    """All labels, where a dataset lists them."""
    if isinstance(dataset, Subset):
        inner = listed_labels(dataset.dataset)
        return None if inner is None else (inner, list(dataset.indices))
    if isinstance(dataset, ConcatDataset):
        return [listed_labels(inner) for inner in dataset.datasets]
    return getattr(dataset, "targets", getattr(dataset, "labels", None))


def _columns(dataset: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Attributes that list one element for each sample, and of which a sample takes its own alone."""
    count = len(dataset)
    listed = {name: value for name, value in state.items() if _is_list(value) and len(value) == count}
    # a method bound to this very object would take elements from behind the back of the copy below
    bound = any(isinstance(value, types.MethodType) and value.__self__ is dataset for value in state.values())
    if not listed or bound:
        return {}
    probed = evenly(count, _PROBED)
    taken = _taken(dataset, listed, probed)
    own = {name for name, indices in taken.items() if indices == {index: {index} for index in probed}}
    unused = {name for name, indices in taken.items() if not indices}
    repeated = {name for name in unused if any(_repeats(listed[name], listed[other]) for other in own)}
    return {name: listed[name] for name in own | repeated}


def _is_list(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return len(value.shape) > 0 and 0 not in value.shape
    return type(value) in (list, tuple)


def _taken(dataset: Any, listed: dict[str, Any], probed: list[int]) -> dict[str, dict[int, set[int | None]]]:
    """Per list and sample: which elements ``dataset[sample]`` takes; None stands for anything else than an element."""
    taken: dict[str, dict[int, set[int | None]]] = {name: {} for name in listed}
    with preserved_random_state(), preserved_generators(dataset):
        for index in probed:
            recorders = {name: _Recorder(value) for name, value in listed.items()}
            try:
                observed = copy.copy(dataset)
                vars(observed).update(recorders)
                same = digest(observed[index]) == digest(dataset[index])
            except Exception:
                same = False  # the user's code met something that is no list: then nothing is known
            for name, recorder in recorders.items():
                if recorder.taken or not same:
                    taken[name][index] = recorder.taken if same else {None}
    return taken


@final
class _Recorder:
    """Stands for a list and notes what is taken of it."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self.taken: set[int | None] = set()

    def __len__(self) -> int:
        return len(self._value)

    def __getitem__(self, index: Any) -> Any:
        first = index[0] if isinstance(index, tuple) and index else index
        whole = hasattr(first, "__index__") and not isinstance(first, bool)
        self.taken.add(int(first) % len(self._value) if whole else None)
        return self._value[index]

    def __iter__(self) -> Any:
        self.taken.add(None)
        return iter(self._value)

    def __getattr__(self, name: str) -> Any:
        self.taken.add(None)
        return getattr(self._value, name)


def _repeats(value: Any, other: Any) -> bool:
    """Whether a list says nothing that another does not: the same elements, or a part of each."""
    if value is other:
        return True
    if not isinstance(value, list | tuple) or not isinstance(other, list | tuple):
        return False
    plain = (str, int, float)
    return all(isinstance(a, plain) and isinstance(b, tuple) and a in b for a, b in zip(value, other, strict=True))


def _element_digests(column: Any, folders: Sequence[Path]) -> NDArray[np.uint64]:
    """(samples,) xxh3_64 of each element."""
    if isinstance(column, Tensor | np.ndarray) and column.dtype != object:
        head = str((tuple(column.shape[1:]), column.dtype)).encode()
        seed = xxhash.xxh3_64_intdigest(head)
        data = (
            tensor_bytes(column)
            if isinstance(column, Tensor)
            else np.ascontiguousarray(column).reshape(-1).view(np.uint8)
        )
        rows = np.frombuffer(data, np.uint8).reshape(len(column), -1)
        return np.fromiter((xxhash.xxh3_64_intdigest(row.data, seed) for row in rows), np.uint64, len(rows))
    files = _files_at(column, folders)
    listing = _file_facts(column, files, folders) if files else column
    digests = (xxhash.xxh3_64_intdigest(_text(element)) for element in listing)
    return np.fromiter(digests, np.uint64, len(listing))


def _text(element: Any) -> bytes:
    plain = (str, int, float, type(None))
    flat = element if isinstance(element, tuple) else (element,)
    if all(type(part) in plain for part in flat):
        return repr(element).encode(errors="surrogatepass")
    return digest(element).encode()


def _told(state: Mapping[str, Any], folders: Sequence[Path], depth: int = 0) -> dict[str, Any]:
    """Attributes of a dataset but for places, with what is known of the files and datasets among them."""
    told = {}
    for name, value in state.items():
        if name == "root" or _is_path(value):
            continue
        files = _files_at(value, folders)
        if files:
            told[name] = _file_facts(value, files, folders)
        elif isinstance(value, Dataset) and depth < _MAX_DEPTH:
            told[name] = described(value, depth + 1)
        elif type(value) in (list, tuple) and value and isinstance(value[0], Dataset) and depth < _MAX_DEPTH:
            told[name] = [described(part, depth + 1) for part in value]
        else:
            told[name] = value
    return told


def _is_path(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, str) and value.startswith(("/", "./", "../")))


def _folders(dataset: Any) -> list[Path]:
    """Where names of files may start: at ``root``, another folder among the attributes, or the working directory."""
    state = vars(dataset) if hasattr(dataset, "__dict__") else {}
    named = [state.get("root"), *state.values()]
    # os.path takes any string; pathlib raises for one that is too long for a name
    return [Path(value) for value in named if isinstance(value, str | Path) and os.path.isdir(value)] + [Path()]  # noqa: PTH112


def _parts(item: Any) -> tuple[Any, ...]:
    """An element of a list, taken apart: a path, (path, label) as torchvision's folders keep them, or a dict."""
    if isinstance(item, dict):
        return tuple(item.values())
    return tuple(item) if isinstance(item, tuple | list) else (item,)


def _files_at(value: Any, folders: Sequence[Path]) -> dict[int, Path]:
    """Which parts of a list's elements name files, and in which folder; nothing where it lists none."""
    if not isinstance(value, list | tuple) or not value:
        return {}
    names = {at: name for at, name in enumerate(_parts(value[0])) if isinstance(name, str | Path)}
    found = {at: [one for one in folders if os.path.isfile(one / name)] for at, name in names.items()}  # noqa: PTH113
    return {at: places[0] for at, places in found.items() if places}


def _file_facts(listing: Sequence[Any], files: Mapping[int, Path], folders: Sequence[Path]) -> list[Any]:
    """The elements, with relative path, size and time of modification of each file in place of its path."""
    named = [(one, os.path.join(one, "")) for one in folders[:-1]]  # noqa: PTH118 - pathlib takes three times as long
    places = {at: os.path.join(one, "") for at, one in files.items()}  # noqa: PTH118
    facts: list[Any] = []
    for item in listing:
        told: list[Any] = list(item) if isinstance(item, dict) else []
        for at, part in enumerate(_parts(item)):
            told += _facts_of(places[at], part, named) if at in files and isinstance(part, str | Path) else [part]
        facts.append(tuple(told))
    return facts


def _facts_of(place: str, part: str | Path, named: Sequence[tuple[Path, str]]) -> list[Any]:
    """What is known of a file: its path from the first of some folders that it is in, else its name; size and time."""
    path = os.path.join(place, part)  # noqa: PTH118
    if os.sep != "/" or "//" in path or "/." in path or path.startswith("."):  # as pathlib tells it
        whole = Path(path)
        shown = next((whole.relative_to(one).as_posix() for one, _ in named if whole.is_relative_to(one)), whole.name)
    else:
        shown = next((path[len(start) :] for _, start in named if path.startswith(start)), path.rpartition("/")[2])
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return [shown]
    return [shown, status.st_size, status.st_mtime_ns]
