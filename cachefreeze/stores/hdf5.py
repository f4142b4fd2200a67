"""Rows on disk: plain HDF5 that libhdf5 lays out once, in memory, and never touches again.

libhdf5 decides where things lie and what its metadata says; the bytes are written by us (``pwrite``) and read by us
(``mmap``). A row counts once its commit record names it, and is believed once the record's checksum matches the bytes
that are handed out. So no kill, torn write or flipped bit yields a wrong row. The format is in docs/store-format.md.

Shapes:
    records: (n,) of the 16-byte commit record.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, final, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachefreeze.errors import CorruptRowError, StoreError, UsageError
from cachefreeze.stores.base import BadRow, Store, StoreSpec
from cachefreeze.stores.columns import Column, Packed
from cachefreeze.stores.creation import check_target, create_file, lock_path
from cachefreeze.stores.file import CHUNK_ROWS, Header, open_regular, read_header, read_layout
from cachefreeze.stores.header import encode
from cachefreeze.stores.laying import lay_out
from cachefreeze.stores.layout import COMMIT, HEADER_BYTES, RECORD_BYTES, Layout, check_storable
from cachefreeze.stores.locks import FileLock, drop_in_children
from cachefreeze.stores.rows import COMPLETE, RECORD, complete, row_digest, stretches
from cachefreeze.stores.system import pwrite_all, store_error, system

__all__ = ["SYNC_BYTES", "HDF5Store", "Header", "Verify", "read_header"]

Verify = Literal["first", "always", "never"]

SYNC_BYTES = 256 << 20  # written bytes between two fdatasync: bounds what a power cut costs, and the stall at commit()


@final
class HDF5Store(Store):
    """Rows in one HDF5 file. Use :meth:`create` or :meth:`open`; the constructor is private.

    One process writes a file at a time, any number read it. A forked child keeps reading and cannot write; a pickled
    store reopens read-only. Which rows are present is read once, at open.
    """

    tier = "hdf5"

    def __init__(self, path: Path, layout: Layout, crc: int, fd: int, lock: FileLock | None, verify: Verify) -> None:
        super().__init__(layout.spec, torch.device("cpu"))
        self._path = path
        self._layout = layout
        self._crc = crc
        self._check_mode = verify
        self._handles = _Handles(fd, lock, mmap.mmap(fd, layout.file_bytes, access=mmap.ACCESS_READ))
        self._records = np.frombuffer(self._handles.mapping, RECORD, layout.spec.rows, layout.commit_offset)
        file = np.frombuffer(self._handles.mapping, np.uint8)
        self._columns = [
            Column(field, file, layout.offsets[field.name], layout.spec.rows) for field in layout.spec.fields
        ]
        present = self._present.numpy()
        for start in range(0, layout.spec.rows, CHUNK_ROWS):
            present[start : start + CHUNK_ROWS] = complete(self._records[start : start + CHUNK_ROWS], start)
        self._verified = np.zeros(layout.spec.rows, dtype=np.bool_)
        self._unsynced_bytes = 0
        self.writable = lock is not None
        weakref.finalize(self, self._handles.close)
        drop_in_children(self)

    @classmethod
    def create(
        cls,
        path: str | Path,
        spec: StoreSpec,
        *,
        fingerprint: Mapping[str, str],
        attributes: Mapping[str, str] | None = None,
    ) -> HDF5Store:
        """Make a new file with room for every row, and become its writer.

        Args:
            path: Must not exist; its folder must.
            spec: Rows and fields.
            fingerprint: What must be equal for the rows to be reused.
            attributes: Free strings for people, such as model and boundary.

        Raises:
            StoreSpaceError: There is no room for the whole file.
            StoreError: The spec does not fit the format, or the file cannot be made. Nothing is left behind.
        """
        path = Path(path).absolute()
        attributes = attributes or {}
        _require_platform()
        check_storable(spec, fingerprint, attributes)
        least_bytes = HEADER_BYTES + spec.rows * RECORD_BYTES + spec.nbytes
        check_target(path, least_bytes)
        layout, metadata = lay_out(spec, fingerprint, attributes)
        lock = create_file(path, layout.file_bytes, [*metadata, (0, encode(layout))])
        try:
            return cls._attach(path, lock, "first")
        except BaseException:
            system.unlink(path)
            lock.release(unlink=True)
            raise

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = True, verify: Verify = "first") -> HDF5Store:
        """Open an existing file.

        Args:
            path: The file; a link is refused.
            writable: Become the writer, if no other process is and the file may be written; see ``store.writable``.
            verify: When to compare a row with its checksum: on its ``first`` read in this process, ``always``, or
                ``never``.

        Raises:
            StoreError: There is no such file, or it cannot be opened.
            CorruptStoreError: It is no cache file, or header or HDF5 metadata are damaged.
        """
        if verify not in get_args(Verify):
            raise UsageError(f"verify={verify!r}: use one of {', '.join(map(repr, get_args(Verify)))}")
        path = Path(path).absolute()
        _require_platform()
        if not writable:
            return cls._attach(path, None, verify)
        os.close(open_regular(path, os.O_RDONLY)[0])  # or a lock would be left beside a file that does not exist
        try:
            lock = FileLock.take(lock_path(path), os.O_CREAT)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise store_error(error, "lock", path) from error
            lock = None  # reading needs no write permission, neither to the file nor to its folder
        try:
            return cls._attach(path, lock, verify)
        except BaseException:
            if lock is not None:
                lock.release(unlink=True)
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

    def verify(self) -> list[BadRow]:
        """Compare every present row with its checksum, and name damaged commit records.

        Reads the whole file. Bad rows stay present here; reading one raises and marks it absent. The checksum covers
        all fields of a row together, so a field can be named only where there is one.
        """
        self._require_open()
        names = [field.name for field in self.spec.fields]
        whole = f"the checksum over {', '.join(names)} does not match" + (" (any may be damaged)" if names[1:] else "")
        lost = f"its record in /{COMMIT} is damaged or was removed: the row is lost"
        bad: list[BadRow] = []
        for start in range(0, self.spec.rows, CHUNK_ROWS):
            records = self._records[start : start + CHUNK_ROWS]
            said = complete(records, start)
            present = self._present.numpy()[start : start + CHUNK_ROWS]
            broken = ~said & (present | (records != np.zeros((), RECORD)))
            bad.extend(BadRow(row, None, lost) for row in (np.flatnonzero(broken) + start).tolist())
            judged = torch.from_numpy(np.flatnonzero(said & present) + start)
            places = [zip(*(of.tolist() for of in column.spans(judged)), strict=True) for column in self._columns]
            for row, *spans in zip(judged.tolist(), *places, strict=True):
                parts = [column.row(*span) for column, span in zip(self._columns, spans, strict=True)]
                if row_digest(parts) != int(self._records[row]["xxh3_64"]):
                    self._verified[row] = False
                    bad.append(BadRow(row, None if names[1:] else names[0], whole))
        return sorted(bad, key=lambda one: one.row)

    def close(self) -> None:
        """Unmap and close the file and give up its lock."""
        super().close()
        self.writable = False
        self._records, self._columns = self._records[:0].copy(), []
        self._handles.close()

    def after_fork_in_child(self) -> None:
        """A child reads what its parent mapped; writing stays with the parent, which holds the lock."""
        self.writable = False
        self._handles.drop_writer()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self._path), self._check_mode, self._crc)

    @classmethod
    def _attach(cls, path: Path, lock: FileLock | None, verify: Verify) -> HDF5Store:
        """Check and map the file. Takes over ``lock`` when it returns; the caller keeps it when it raises."""
        fd, may_write = open_regular(path, os.O_RDONLY if lock is None else os.O_RDWR)
        try:
            layout, crc = read_layout(fd, path)
            store = cls(path, layout, crc, fd, lock if may_write else None, verify)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError) and not isinstance(error, StoreError):
                raise store_error(error, "map", path) from error
            raise
        if not may_write:
            store._handles.drop_writer()
            if lock is not None:
                lock.release()
        return store

    def _write(self, rows: Tensor, batch: Mapping[str, Tensor]) -> None:
        index = rows.numpy()
        packed = [column.pack(rows, batch[column.field.name]) for column in self._columns]
        records = np.zeros(len(index), RECORD)
        records["xxh3_64"] = [row_digest(row) for row in zip(*(part.rows() for part in packed), strict=True)]
        records["row_plus_1"] = index + 1
        records["flags"] = COMPLETE
        recorded = self._records["row_plus_1"][index] != 0
        self._present.numpy()[index] = False
        try:
            self._write_runs(rows, packed, records, recorded)
        except OSError as error:
            raise store_error(error, "write rows to", self._path, self._layout.file_bytes) from error
        self._verified[index] = True
        self._unsynced_bytes += records.nbytes + sum(part.data.nbytes for part in packed)
        if self._unsynced_bytes >= SYNC_BYTES:
            self.commit()

    def _write_runs(
        self, rows: Tensor, packed: Sequence[Packed], records: NDArray[Any], recorded: NDArray[np.bool_]
    ) -> None:
        fd = self._handles.fd
        assert fd is not None
        index = rows.numpy()
        runs = list(stretches(index))
        for start, stop in runs:
            # A row that is rewritten is absent until it is whole again, also to readers that never check.
            if recorded[start:stop].any():
                pwrite_all(fd, np.zeros_like(records[start:stop]), self._record_offset(index[start]))
        for column, part in zip(self._columns, packed, strict=True):
            starts, _ = column.spans(rows)
            for start, stop in runs:
                pwrite_all(fd, part.stretch(start, stop), column.offset + int(starts[start]))
        for start, stop in runs:
            pwrite_all(fd, records[start:stop], self._record_offset(index[start]))

    def _record_offset(self, row: int) -> int:
        return self._layout.commit_offset + int(row) * RECORD_BYTES

    def _sync(self, fd: int) -> None:
        try:
            system.fdatasync(fd)
        except OSError as error:
            # The kernel may have dropped the pages it could not write: no row of this process is above suspicion.
            # https://wiki.postgresql.org/wiki/Fsync_Errors
            self._verified[:] = False
            raise store_error(error, "make durable the rows of", self._path, self._layout.file_bytes) from error
        self._unsynced_bytes = 0

    def _read(self, rows: Tensor) -> dict[str, Tensor]:
        batch, raw = {}, []
        for column in self._columns:
            batch[column.field.name], parts = column.gather(rows)
            raw.append(parts)
        if self._check_mode != "never":
            self._check(rows.numpy(), raw)
        return batch

    def _check(self, index: NDArray[Any], raw: Sequence[Sequence[NDArray[np.uint8]]]) -> None:
        suspects = np.flatnonzero(~self._verified[index]) if self._check_mode == "first" else np.arange(len(index))
        expected = self._records["xxh3_64"][index[suspects]].tolist()
        good = [
            row_digest([data[at] for data in raw]) == digest
            for at, digest in zip(suspects.tolist(), expected, strict=True)
        ]
        bad = np.unique(index[suspects[~np.array(good, dtype=np.bool_)]])
        self._verified[index[suspects]] = True
        self._verified[bad] = False
        if len(bad):
            raise CorruptRowError(
                f"{len(bad)} of {len(index)} rows read from {self._path} do not match their checksum, first row "
                f"{bad[0]}: they are absent now and can be computed and written again",
                rows=bad.tolist(),
            )


@final
class _Handles:
    """What a store holds of the operating system; outlives it only until the finalizer ran."""

    def __init__(self, fd: int, lock: FileLock | None, mapping: mmap.mmap) -> None:
        self.fd: int | None = fd
        self.lock = lock
        self.mapping = mapping

    def drop_writer(self) -> None:
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        self.drop_writer()
        if self.lock is not None:
            self.lock.release()
        with suppress(BufferError):  # a read in another thread still gathers from it: freed when that ends
            self.mapping.close()


def _reopen(path: str, verify: Verify, crc: int) -> HDF5Store:
    store = HDF5Store.open(path, writable=False, verify=verify)
    if store._crc != crc:
        store.close()
        raise StoreError(f"{path} is another file than the one whose store was pickled: open the new one")
    return store


def _require_platform() -> None:
    if sys.byteorder != "little" or not hasattr(os, "pwrite"):
        raise StoreError("cache files need a little-endian POSIX system; use store='host' here")
