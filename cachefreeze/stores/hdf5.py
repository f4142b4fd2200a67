"""Rows on disk: plain HDF5 that libhdf5 lays out once, in memory, and never touches again.

libhdf5 decides where things lie and what its metadata says; the bytes are written by us (``pwrite``) and read by us
(``mmap`` or ``pread``). A row counts once its commit record names it, and is believed once the record's checksum
matches the bytes that are handed out. So no kill, torn write or flipped bit yields a wrong row. The format is in
docs/store-format.md.

Shapes:
    records: (n,) of the 16-byte commit record.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal, final, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachefreeze.errors import CorruptRowError, StoreError, UsageError
from cachefreeze.stores.base import BadRow, Store, StoreSpec
from cachefreeze.stores.columns import Column, Gathering, Packed
from cachefreeze.stores.creation import check_target, create_file
from cachefreeze.stores.file import Header, checked_layout, open_regular, read_header
from cachefreeze.stores.handles import Handles, take
from cachefreeze.stores.header import encode
from cachefreeze.stores.laying import lay_out
from cachefreeze.stores.layout import COMMIT, HEADER_BYTES, RECORD_BYTES, Layout, check_storable
from cachefreeze.stores.locks import FileLock, drop_in_children
from cachefreeze.stores.recycling import Recycler
from cachefreeze.stores.rows import RECORD, CommitTable, complete, records_of, row_digest
from cachefreeze.stores.source import IO, open_source, stretches
from cachefreeze.stores.system import failing_as, pwrite_all, store_error, system

__all__ = ["SYNC_BYTES", "HDF5Store", "Header", "Verify", "read_header"]

Verify = Literal["first", "always", "never"]

# Of rows that are copied before they are digested: what stays in a core's caches until then.
_CHECKED_BYTES = 1 << 20

SYNC_BYTES = 256 << 20  # written bytes between two fdatasync: bounds what a power cut costs, and the stall at commit()


@final
class HDF5Store(Store):
    """Rows in one HDF5 file. Use :meth:`create` or :meth:`open`; the constructor is private.

    Any number of processes of one host read a file and fill it. A forked child keeps reading and cannot write; a
    pickled store reopens read-only.
    """

    tier = "hdf5"

    def __init__(self, path: Path, layout: Layout, crc: int, handles: Handles, *, verify: Verify, io: IO) -> None:
        super().__init__(layout.spec, torch.device("cpu"))
        self._path = path
        self._layout = layout
        self._crc = crc
        self._check_mode: Verify = verify
        self._io: IO = io
        self._handles = handles
        self._table = CommitTable(handles.source, layout.commit_offset, layout.spec.rows)
        self._recycler = Recycler()
        self._columns = [
            Column(field, handles.source, layout.offsets[field.name], self._recycler) for field in layout.spec.fields
        ]
        for rows, records in self._table.chunks():
            self._mark(torch.from_numpy(rows[complete(records, rows)]), present=True)
        self._verified = np.zeros(layout.spec.rows, np.bool_)
        self._forgotten = np.zeros(layout.spec.rows, np.bool_)
        self._claimed = np.zeros(layout.spec.rows, np.bool_)
        self._unsynced = np.zeros(layout.spec.rows, np.bool_)
        self._unsynced_bytes = 0
        self.writable = handles.lock is not None
        weakref.finalize(self, handles.close)
        drop_in_children(self)

    @classmethod
    def create(
        cls,
        path: str | Path,
        spec: StoreSpec,
        *,
        fingerprint: Mapping[str, str],
        attributes: Mapping[str, str] | None = None,
        io: IO = "auto",
    ) -> HDF5Store:
        """Make a new file with room for every row.

        Args:
            path: Must not exist; its folder must.
            spec: Rows and fields.
            fingerprint: What must be equal for the rows to be reused.
            attributes: Free strings for people, such as model and boundary.
            io: How rows are read; see :meth:`open`.

        Raises:
            UsageError: ``io`` names no way of reading.
            StoreSpaceError: There is no room for the whole file.
            StoreError: The spec does not fit the format, or the file cannot be made. Nothing is left behind.
        """
        _check_choice("io", io, IO)
        path = Path(path).absolute()
        attributes = attributes or {}
        _require_platform()
        check_storable(spec, fingerprint, attributes)
        least_bytes = HEADER_BYTES + spec.rows * RECORD_BYTES + spec.nbytes
        check_target(path, least_bytes)
        layout, metadata = lay_out(spec, fingerprint, attributes)
        lock = create_file(path, layout.file_bytes, [*metadata, (0, encode(layout))])
        try:
            fd, _ = open_regular(path, os.O_RDWR)
            return cls._attach(path, fd, *checked_layout(fd, path), lock, verify="first", io=io)
        except BaseException:
            system.unlink(path)
            lock.release(unlink=True)
            raise

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        writable: bool = True,
        alone: bool = False,
        verify: Verify = "first",
        io: IO = "auto",
    ) -> HDF5Store:
        """Open an existing file.

        Args:
            path: The file; a link is refused.
            writable: Fill it too, if it and its folder may be written; see ``store.writable``.
            alone: As its only filler, until it is closed; others wait for that when they open it.
            verify: When to compare a row with its checksum: on its ``first`` read in this process, ``always``, or
                ``never``.
            io: Read through a memory map (``mmap``), or by ``pread``: slower for small rows, and the way for files on a
                network file system and files that somebody may shorten, where a map ends the process by a signal.
                ``auto`` maps files up to 256 MiB, since what is mapped counts as memory of the process.

        Raises:
            UsageError: ``verify`` or ``io`` is none of these.
            StoreError: There is no such file, it cannot be opened, or not ``alone``.
            CorruptStoreError: It is no cache file, or header or HDF5 metadata are damaged.
        """
        _check_choice("verify", verify, Verify)
        _check_choice("io", io, IO)
        path = Path(path).absolute()
        _require_platform()
        fd, may_write = open_regular(path, os.O_RDWR if writable else os.O_RDONLY)
        layout, crc = checked_layout(fd, path)  # first, or a lock would be left beside a file that is no cache
        try:
            lock = take(path, fd, alone=alone) if may_write else None
            _require_alone(path, alone and lock is None)
        except BaseException:
            os.close(fd)
            raise
        try:
            return cls._attach(path, fd, layout, crc, lock, verify=verify, io=io)
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def fingerprint(self) -> dict[str, str]:
        """What must be equal for the rows to be reused."""
        return dict(self._layout.fingerprint)

    @property
    def attributes(self) -> dict[str, str]:
        """Free strings that the creator put in."""
        return dict(self._layout.attributes)

    def commit(self) -> None:
        """Return once every row written so far survives a loss of power, if the disk honours fsync.

        Raises:
            StoreError: The system could not write them; what it kept is judged by checksum from here on.
        """
        self._require_open()
        if self._handles.fd is not None:
            self._sync(self._handles.fd)

    def replace(self, rows: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Write some fields of rows that are present; the others keep their bytes, which are compared first.

        A row is absent from the first byte that changes to the last, as in :meth:`write`. For who has the file alone.

        Raises:
            StoreError: The store is closed or read-only, a row is absent, or ``batch`` does not fit the spec.
            CorruptRowError: A row failed its checksum; it is absent from now on.
        """
        self._verified[self._checked(rows).numpy()] = False
        whole = {**self.read(rows), **batch}
        self._check_write(rows, whole)
        if len(rows):
            self._put(rows, whole, changed=batch.keys())
            self._mark(rows, present=True)

    def discard(self, rows: Tensor) -> None:
        """Make rows absent, for every process. For who has the file alone.

        Raises:
            StoreError: The store is closed or read-only, or the system could not write.
        """
        rows = self._checked(rows)
        self._require_writable()
        assert self._handles.fd is not None
        with failing_as("write rows to", self._path):
            for row in rows.tolist():
                pwrite_all(self._handles.fd, bytes(RECORD_BYTES), self._table.position(row))
        self._mark(rows, present=False)

    def pin(self) -> None:
        """Read into pinned memory from now on, for batches that go to a CUDA device; a forked child cannot."""
        self._recycler.pin = True  # needs CUDA

    def unverified(self, name: str, rows: Tensor) -> Tensor:
        """One field of some rows as the file has it, absent and damaged rows too: to look for rows, not to use them."""
        rows = self._checked(rows)
        column = next(column for column in self._columns if column.field.name == name)
        with failing_as("read", self._path):
            return column.gathering(rows).whole()

    def verify(self) -> list[BadRow]:
        """Compare every present row with its checksum, and name damaged commit records.

        Reads the whole file. Bad rows stay present here; reading one raises and marks it absent. The checksum covers
        all fields of a row together, so a field can be named only where there is one.
        """
        self._require_open()
        with failing_as("read", self._path):
            return sorted(self._bad_rows(), key=lambda one: one.row)

    def close(self) -> None:
        """Close the file and give up its locks."""
        super().close()
        self.writable = False
        self._handles.close()

    def after_fork_in_child(self) -> None:
        """A child reads what its parent opened; writing stays with the parent, which holds the locks, as CUDA does."""
        self._recycler.pin = False
        self.writable = False
        self._handles.drop_writer()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self._path), self._check_mode, self._io, self._crc)

    @classmethod
    def _attach(
        cls, path: Path, fd: int, layout: Layout, crc: int, lock: FileLock | None, *, verify: Verify, io: IO
    ) -> HDF5Store:
        """Make a store of an open file; it owns ``fd`` from here on, and ``lock`` too once it is made."""
        try:
            with failing_as("read", path):
                handles = Handles(fd, lock, open_source(io, fd, layout.file_bytes))
                store = cls(path, layout, crc, handles, verify=verify, io=io)
        except BaseException:
            os.close(fd)
            raise
        if lock is None:
            handles.drop_writer()
        return store

    def _bad_rows(self) -> Iterator[BadRow]:
        names = [field.name for field in self.spec.fields]
        whole = f"the checksum over {', '.join(names)} does not match" + (" (any may be damaged)" if names[1:] else "")
        lost = f"its record in /{COMMIT} is damaged or was removed: the row is lost"
        for rows, records in self._table.chunks():
            said = complete(records, rows)
            present = self._present.numpy()[rows] | (said & ~self._forgotten[rows])  # others may have written since
            suspect = rows[~said & (present | (records != np.zeros((), RECORD)))]
            whole_now = complete(self._table.of(suspect), suspect)  # if another process has just written it
            for row in suspect[~whole_now].tolist():
                yield BadRow(row, None, lost)
            judged = rows[said & present]
            expected = records["xxh3_64"][said & present].tolist()
            parts = zip(*(column.each(torch.from_numpy(judged)) for column in self._columns), strict=True)
            for row, digest, row_parts in zip(judged.tolist(), expected, parts, strict=True):
                if row_digest(row_parts) != digest:
                    self._verified[row] = False
                    yield BadRow(row, None if names[1:] else names[0], whole)

    def _look(self, rows: Tensor) -> None:
        index = rows.numpy()
        index = index[~self._forgotten[index]]
        with failing_as("read", self._path):
            found = index[complete(self._table.of(index), index)]
        self._mark(torch.from_numpy(found), present=True)

    def _claim(self, rows: Tensor) -> Tensor:
        lock = self._handles.lock
        assert lock is not None
        index = np.unique(rows[~self._looked(rows)].numpy())
        with failing_as("lock rows of", self._path):
            for start, stop in stretches(index):
                run = index[start:stop]
                if lock.claim(run[0], len(run)):
                    self._claimed[run] = True
                elif len(run) > 1:  # another process has some of them
                    self._claimed[run] = [lock.claim(row, 1) for row in run.tolist()]
        # between the look above and the locks another process may have written some, and let go of them
        self._look(torch.from_numpy(index))
        written = index[self._claimed[index] & self._present.numpy()[index]]
        self._release(torch.from_numpy(written))
        return torch.from_numpy(self._claimed[rows.numpy()])

    def _release(self, rows: Tensor) -> None:
        lock = self._handles.lock
        index = np.unique(rows.numpy())
        index = index[self._claimed[index]]
        self._claimed[index] = False
        if lock is not None and lock.fd is not None:
            with failing_as("unlock rows of", self._path):
                for start, stop in stretches(index):
                    lock.unclaim(int(index[start]), stop - start)

    def _expect(self, rows: Tensor) -> None:
        for column in self._columns:
            column.expect(rows)

    def _forget(self, rows: Tensor) -> None:
        self._forgotten[rows.numpy()] = True

    def _write(self, rows: Tensor, batch: Mapping[str, Tensor]) -> None:
        self._put(rows, batch, changed=batch.keys())

    def _put(self, rows: Tensor, batch: Mapping[str, Tensor], changed: Set[str]) -> None:
        """Write the ``changed`` fields of whole rows, and their records."""
        index = rows.numpy()
        packed = [column.pack(rows, batch[column.field.name]) for column in self._columns]
        records = records_of(index, [row_digest(row) for row in zip(*(part.rows() for part in packed), strict=True)])
        packed = [part for part, column in zip(packed, self._columns, strict=True) if column.field.name in changed]
        self._mark(rows, present=False)
        self._forgotten[index] = True  # until it is whole again, whatever its record says meanwhile
        try:
            with failing_as("write rows to", self._path, self._layout.file_bytes):
                self._write_runs(index, packed, records)
        finally:
            self._release(rows)
        self._verified[index] = True
        self._forgotten[index] = False
        self._unsynced[index] = True
        self._unsynced_bytes += records.nbytes + sum(part.data.nbytes for part in packed)
        if self._unsynced_bytes >= SYNC_BYTES:
            self.commit()

    def _write_runs(self, index: NDArray[np.int64], packed: Sequence[Packed], records: NDArray[Any]) -> None:
        fd = self._handles.fd
        assert fd is not None
        recorded = self._table.of(index)["row_plus_1"] != 0
        runs = list(stretches(index))
        table = self._table.pack(index, records)
        for start, stop in runs if recorded.any() else ():
            # A row that is rewritten is absent until it is whole again, also to readers that never check.
            if recorded[start:stop].any():
                pwrite_all(fd, bytes((stop - start) * RECORD_BYTES), table.starts[start])
        # The last field first, as a read takes it last: whoever finds the old one there has old ones all through.
        for part in (*reversed(packed), table):
            data, ends, starts = part.data, part.ends, part.starts
            for start, stop in runs:
                pwrite_all(fd, data[ends[start] : ends[stop]], starts[start])

    def _sync(self, fd: int) -> None:
        try:
            system.fdatasync(fd)
        except OSError as error:
            # The kernel may have dropped the pages it could not write, and a later sync will not miss them: rows since
            # the last good one are absent until they are written again, and no other is above suspicion.
            # https://wiki.postgresql.org/wiki/Fsync_Errors
            self.forget(torch.from_numpy(np.flatnonzero(self._unsynced)))
            self._verified[:] = False
            raise store_error(error, "make durable the rows of", self._path, self._layout.file_bytes) from error
        self._unsynced[:] = False
        self._unsynced_bytes = 0

    def _read(self, rows: Tensor) -> dict[str, Tensor]:
        index, made = rows.numpy(), [column.gathering(rows) for column in self._columns]
        with failing_as("read", self._path):
            if self._check_mode == "never" or (self._check_mode == "first" and self._verified[index].all()):
                return {column.field.name: one.whole() for column, one in zip(self._columns, made, strict=True)}
            self._take_checked(index, made)
        return {column.field.name: one.batch() for column, one in zip(self._columns, made, strict=True)}

    def _take_checked(self, index: NDArray[np.int64], made: Sequence[Gathering]) -> None:
        """Copy some rows, and digest the copies while they are still in the processor's cache."""
        expected = self._table.of(index)["xxh3_64"].tolist()
        raw = [one.raw for one in made]
        suspect = [True] * len(index) if self._check_mode == "always" else (~self._verified[index]).tolist()
        wrong: list[int] = []
        step = max(1, _CHECKED_BYTES * self.spec.rows // max(1, self.spec.nbytes))
        for start in range(0, len(index), step):
            stop = min(start + step, len(index))
            for one in made:
                one.take(start, stop)
            parts = zip(*(data[start:stop] for data in raw), strict=True)
            wrong += [at for at, row in enumerate(parts, start) if suspect[at] and row_digest(row) != expected[at]]
        bad = np.unique(index[np.array(wrong, np.int64)])
        self._verified[index] = True
        self._verified[bad] = False
        if len(bad):
            raise CorruptRowError(
                f"{len(bad)} of {len(index)} rows read from {self._path} do not match their checksum, first row "
                f"{bad[0]}: they are absent now and can be computed and written again",
                rows=bad.tolist(),
            )


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise UsageError(f"{name}={value!r}: use one of {', '.join(map(repr, get_args(choices)))}")


def _reopen(path: str, verify: Verify, io: IO, crc: int) -> HDF5Store:
    store = HDF5Store.open(path, writable=False, verify=verify, io=io)
    if store._crc != crc:
        store.close()
        raise StoreError(f"{path} is another file than the one whose store was pickled: open the new one")
    return store


def _require_alone(path: Path, missing: bool) -> None:
    if missing:
        raise StoreError(
            f"{path} cannot be had alone: another process has it open to fill it, or it may not be written"
        )


def _require_platform() -> None:
    if sys.byteorder != "little" or not hasattr(os, "pwrite"):
        raise StoreError("cache files need a little-endian POSIX system; use store='host' here")
