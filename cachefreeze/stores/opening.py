"""Which store holds a loader's rows: chosen by name, reused when its fingerprint matches."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol

import torch

from cachefreeze.errors import CacheFreezeError, StaleCacheError, StoreError, StoreSpaceError, UsageError
from cachefreeze.fingerprint import difference, differing, identity
from cachefreeze.stores.base import FieldSpec, Store, StoreSpec
from cachefreeze.stores.creation import lock_path
from cachefreeze.stores.file import read_header
from cachefreeze.stores.hdf5 import HDF5Store
from cachefreeze.stores.memory import DeviceStore, HostStore, free_device_bytes, free_host_bytes
from cachefreeze.stores.mixed import MixedStore, part_of, spread
from cachefreeze.stores.system import free_bytes as free_disk_bytes

_LOG = logging.getLogger("cachefreeze")

# Shares of what is free that ``auto`` takes: a training step still needs its own memory, and its peak is not
# known before the first one.
_DEVICE_SHARE = 0.25
_HOST_SHARE = 0.5
_DISK_SHARE = 0.9
# How long to wait for a file that another process is creating: reserving its blocks takes a while on slow disks.
_CREATION_SECONDS = 10.0


class Revising(Protocol):
    """What is known of single samples."""

    def serves(self, path: Path, *, same: bool) -> bool:
        """Whether a file holds these samples but for a few, and is up to date now, or needs not be.

        Args:
            path: A file whose fingerprint is right but for what single samples change.
            same: That is right as well.
        """


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A store that is asked for.

    Attributes:
        spec: Rows and fields.
        name: Of the loader: ``train``, ``val``.
        boundary: The boundary's name.
        fingerprint: What must be equal for rows to be reused.
        attributes: Readable facts for ``cachefreeze info``.
        device: Where the suffix runs.
        beside: Fields that a file has and a store in memory needs not: what each row was made from.
        of_rows: Fields of the fingerprint that may differ where ``revision`` serves.
        revision: Brings a file's rows up to date; None where they cannot be told apart.
    """

    spec: StoreSpec
    name: str
    boundary: str
    fingerprint: Mapping[str, str]
    attributes: Mapping[str, str]
    device: torch.device
    beside: tuple[FieldSpec, ...] = ()
    of_rows: frozenset[str] = frozenset()
    revision: Revising | None = None

    @property
    def file_spec(self) -> StoreSpec:
        """Rows and fields of a file."""
        return replace(self.spec, fields=(*self.spec.fields, *self.beside))

    @property
    def file_stem(self) -> str:
        """``<name>-<boundary>``, in characters that every file system takes.

        Raises:
            UsageError: There are too many of them.
        """
        stem = f"{_plain(self.name)}-{_plain(self.boundary)}"
        if len(stem) > _LONGEST_STEM:
            raise UsageError(
                f"name={self.name[:20] + '…'!r}: with the boundary it makes {len(stem)} characters of a file's name, "
                f"expected {_LONGEST_STEM} at most, since file systems take 255 with what is added; give the loader a "
                "shorter name="
            )
        return stem


def open_store(where: str | Store, wanted: Wanted) -> Store:
    """Open or create a store.

    Args:
        where: ``auto``, ``auto:DIR`` (on disk in DIR where memory is too small), ``device``, ``host``, ``hdf5:DIR``,
            ``hdf5:FILE.h5``, or a store that is there already.
        wanted: What it must hold.

    Raises:
        UsageError: ``where`` names no tier.
        StoreSpaceError: The rows do not fit.
        StaleCacheError: A file that was named, or a store that was handed over, holds other rows.
    """
    if isinstance(where, Store):
        if where.spec not in (wanted.spec, wanted.file_spec if isinstance(where, HDF5Store) else wanted.spec):
            raise StaleCacheError(
                f"the store given for {wanted.name!r} holds {_shape(where.spec)}, needed are {_shape(wanted.spec)}"
            )
        return where
    tier, _, place = str(where).partition(":")
    if tier == "auto":
        room = _room_in_memory(wanted.spec.nbytes, wanted.device)
        parts = _parts(wanted.spec, room, place)
        if parts:
            return _spread_over_tiers(wanted, place, parts)
        tier, _, place = _fastest(wanted.spec, room, place).partition(":")
    if tier == "device" and not place:
        return DeviceStore(wanted.spec, wanted.device)
    if tier == "host" and not place:
        return HostStore(wanted.spec)
    if tier == "hdf5" and place:
        file = _open_file(Path(place).expanduser(), wanted)
        if wanted.device.type == "cuda":  # needs CUDA
            file.pin()
        return file
    raise UsageError(
        f"store={where!r}: expected 'auto', 'device', 'host', 'hdf5:DIR', 'off', or a Store"
        + (" (give the folder: 'hdf5:DIR')" if tier == "hdf5" else "")
    )


def for_another(where: str | Store) -> str:
    """The same kind of store, for a loader that a single store cannot also serve."""
    if isinstance(where, HDF5Store):
        return f"hdf5:{where.path.parent}"
    if isinstance(where, MixedStore):
        return "auto" if where.path is None else f"auto:{where.path.parent}"
    if isinstance(where, Store):
        return where.tier
    tier, _, place = where.partition(":")
    if tier == "hdf5" and _names_a_file(Path(place).expanduser()):
        return f"hdf5:{Path(place).expanduser().parent}"
    return where


def fitting_tier(nbytes: int, device: torch.device, folder: str = "") -> str | None:
    """The fastest tier that ``auto`` would take for rows of so many bytes: ``device``, ``host`` or ``hdf5:DIR``.

    Args:
        nbytes: Of all rows.
        device: Where the suffix runs.
        folder: Of ``auto:DIR``; without one nothing goes to disk.

    Returns:
        The tier; None where no tier has room.
    """
    return _first_with_room(nbytes, _room_in_memory(nbytes, device), folder)


def fitting_shares(row_bytes: int, rows: int, device: torch.device, folder: str = "") -> dict[str, float]:
    """How ``auto`` would spread rows: the share of each tier, fastest first; {} where there is no room for all."""
    spec = StoreSpec(rows=rows, fields=(FieldSpec(name="row", shape=(row_bytes,), dtype=torch.uint8),))
    room = _room_in_memory(spec.nbytes, device)
    parts = _parts(spec, room, folder)
    if parts:
        return {f"hdf5:{folder}" if tier == "hdf5" else tier: (end - start) / rows for tier, start, end in parts}
    tier = _first_with_room(spec.nbytes, room, folder)
    return {} if tier is None else {tier: 1.0}


def free_bytes_at(place: str) -> int:
    """Bytes that are free where a folder is, or would be made."""
    path = Path(place).expanduser().absolute()
    return free_disk_bytes(next(parent for parent in (path, *path.parents) if parent.exists()))


def _room_in_memory(nbytes: int, device: torch.device) -> dict[str, int]:
    """Bytes that ``auto`` takes of each tier in memory, fastest first; ``nbytes`` where the host does not say."""
    room = {}
    if device.type != "cpu":
        room["device"] = int(_DEVICE_SHARE * (free_device_bytes(device) or 0))
    free_bytes = free_host_bytes()
    room["host"] = nbytes if free_bytes is None else int(_HOST_SHARE * free_bytes)
    return room


def _first_with_room(nbytes: int, room: Mapping[str, int], folder: str) -> str | None:
    tier = next((tier for tier, free_bytes in room.items() if nbytes <= free_bytes), None)
    return tier or (f"hdf5:{folder}" if folder else None)


def _fastest(spec: StoreSpec, room: Mapping[str, int], folder: str) -> str:
    tier = _first_with_room(spec.nbytes, room, folder)
    if tier is None:
        raise StoreSpaceError(
            f"{spec.rows:,} rows need {spec.nbytes:,} bytes; store='auto' takes half of the "
            f"{free_host_bytes():,} free in RAM at most. Use store='hdf5:DIR', a smaller dtype or a later boundary"
        )
    return tier


def _parts(spec: StoreSpec, room: Mapping[str, int], folder: str) -> list[tuple[str, int, int]]:
    """(tier, its first row, the first row of the next); none where one tier is as good, or all have no room together.

    Rows beyond a device's room are best beside it. Rows beyond the room in memory are best all on disk, where the next
    run finds them and the system keeps in memory what it can, unless the disk has no room for all of them.
    """
    shares, disk_bytes = spread(spec, list(room.values())), 0
    if shares is None and folder:
        disk_bytes = int(_DISK_SHARE * free_bytes_at(folder))
        room = {**room, "hdf5": disk_bytes}
        shares = spread(spec, list(room.values()))
    if shares is None:
        return []
    edges = pairwise([0, *accumulate(shares)])
    parts = [(tier, start, stop) for tier, (start, stop) in zip(room, edges, strict=True) if start < stop]
    one_is_as_good = len(parts) == 1 or (parts[0][0] == "host" and spec.nbytes <= disk_bytes)
    return [] if one_is_as_good else parts


def _spread_over_tiers(wanted: Wanted, folder: str, parts: Sequence[tuple[str, int, int]]) -> Store:
    """A store over several tiers; the parts that are made are closed where a later one cannot be."""
    made: list[Store] = []
    try:
        for tier, start, stop in parts:
            part = replace(
                wanted,
                spec=part_of(wanted.spec, start, stop),
                fingerprint={**wanted.fingerprint, "part": f"{start}..{stop - 1}"},
                beside=(),
                of_rows=frozenset(),
                revision=None,
            )
            made.append(open_store(f"{tier}:{folder}" if tier == "hdf5" else tier, part))
        store = MixedStore(wanted.spec, made)
    except BaseException:
        for one in made:
            one.close()
        raise
    shown = ", ".join(f"{stop - start:,} on {tier}" for tier, start, stop in parts)
    _LOG.info("the rows of %r are spread over tiers: %s", wanted.name, shown)
    return store


def _open_file(place: Path, wanted: Wanted) -> HDF5Store:
    if _names_a_file(place):
        return _matching(place, wanted) if place.exists() else _create(place, wanted)
    folder, again = _folder(place), 0
    path = folder / f"{wanted.file_stem}-{identity(wanted.fingerprint)}.h5"
    found = [path] if path.exists() else _older(folder, wanted)
    for other in found:
        with nullcontext() if other == path else suppress(CacheFreezeError):  # a damaged neighbour is none
            if _serves(other, wanted):
                return HDF5Store.open(other)
    if path not in found:
        _explain_miss(found, wanted)
    while path.exists():  # its rows were brought up to date with other samples since it was made
        again += 1
        path = folder / f"{wanted.file_stem}-{identity({**wanted.fingerprint, 'again': str(again)})}.h5"
        if path.exists() and _serves(path, wanted):
            return HDF5Store.open(path)
    return _create(path, wanted)


def _older(folder: Path, wanted: Wanted) -> list[Path]:
    """Files of the same name and boundary, the newest first."""
    return sorted(folder.glob(f"{wanted.file_stem}-????????????.h5"), key=_written, reverse=True)


def _written(path: Path) -> float:
    """When, in seconds since 1970; 0 where it is gone, since another process may remove it at any time."""
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _serves(path: Path, wanted: Wanted) -> bool:
    """Whether a file holds the wanted rows, perhaps brought up to date."""
    header = read_header(path)
    different = differing(header.fingerprint, wanted.fingerprint)
    if header.fields != wanted.file_spec.fields or header.rows != wanted.spec.rows:
        return False
    if wanted.revision is None:
        return not different
    return different <= wanted.of_rows and wanted.revision.serves(path, same=not different)


def _folder(place: Path) -> Path:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the cache folder {place}: {error.strerror}; give another one") from error
    return place


def _matching(path: Path, wanted: Wanted) -> HDF5Store:
    if not _serves(path, wanted):
        header = read_header(path)
        found = StoreSpec(rows=header.rows, fields=header.fields)
        shown = "; ".join(difference(header.fingerprint, wanted.fingerprint))
        if not shown:
            shown = "other samples" if found == wanted.file_spec else f"{_shape(found)} -> {_shape(wanted.file_spec)}"
        raise StaleCacheError(f"{path} was made for something else ({shown}); name another file, or a folder")
    return HDF5Store.open(path)


def _create(path: Path, wanted: Wanted) -> HDF5Store:
    deadline = time.monotonic() + _CREATION_SECONDS
    while True:
        try:
            return HDF5Store.create(
                path, wanted.file_spec, fingerprint=wanted.fingerprint, attributes=wanted.attributes
            )
        except StoreSpaceError:
            raise
        except StoreError:
            if path.exists():  # another process made it in the meantime
                return _matching(path, wanted)
            if time.monotonic() > deadline or not lock_path(path).exists():
                raise
            time.sleep(0.05)  # another process holds the lock and is about to make it


def _explain_miss(older: Sequence[Path], wanted: Wanted) -> None:
    """Say why the newest cache of the same name and boundary is not reused."""
    if not older:
        return
    with suppress(CacheFreezeError):
        lines = difference(read_header(older[0]).fingerprint, wanted.fingerprint)
        _LOG.warning("%s is not reused, these differ: %s; filling a new file", older[0].name, "; ".join(lines))


def _names_a_file(place: Path) -> bool:
    if place.suffix == ".h5":
        return True
    with suppress(OSError):  # a name that is too long: making the folder says so
        return place.is_file()
    return False


# Of the 255 bytes that file systems take: a fingerprint, the ending and that of locks and temporaries follow.
_LONGEST_STEM = 200


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text) or "_"


def _shape(spec: StoreSpec) -> str:
    return f"{spec.rows:,} rows ({spec.nbytes:,} bytes) of {', '.join(str(field) for field in spec.fields)}"
