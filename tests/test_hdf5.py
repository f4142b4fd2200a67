"""The file format and its promises: plain HDF5, no wrong row after any kill or flip, no leftovers, no second writer."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import tempfile
import time
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from cachefreeze.errors import (
    CorruptRowError,
    CorruptStoreError,
    StoreError,
    StoreSpaceError,
    UsageError,
)
from cachefreeze.stores import handles, hdf5, source
from cachefreeze.stores.base import FieldSpec, StoreSpec
from cachefreeze.stores.creation import lock_path, sweep
from cachefreeze.stores.file import open_regular, read_layout
from cachefreeze.stores.hdf5 import HDF5Store, read_header
from cachefreeze.stores.header import encode
from cachefreeze.stores.layout import CREATED_MAX, HEADER_BYTES, metadata_sha256
from cachefreeze.stores.locks import FileLock
from cachefreeze.stores.sparse import SparseFile
from cachefreeze.stores.system import System, system
from cachefreeze.testing.specs import (
    ROWS,
    assert_same,
    every_kind,
    lengths_of,
    one_field,
    one_ragged,
    rows_of,
    values,
)

# Python 3.12 warns of fork in a process with threads. The children here use one thread.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

EVERY = torch.arange(ROWS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.h5"


def create(path, spec=None, io="mmap", **attributes):
    return HDF5Store.create(path, spec or every_kind(), fingerprint={"weights": "abc"}, attributes=attributes, io=io)


def fill(path, spec=None):
    """A closed file with every row written; returns its layout."""
    store = create(path, spec)
    store.write(EVERY, values(store.spec, EVERY))
    store.close()
    return layout_of(path)


def layout_of(path):
    fd, _ = open_regular(path, os.O_RDONLY)
    try:
        return read_layout(fd, path)[0]
    finally:
        os.close(fd)


def place(layout, field, row):
    """(offset in the file, bytes) of one row of a field."""
    start, items = row, 1
    if field.lengths is not None:
        start, items = sum(field.lengths.values[:row].tolist()), int(field.lengths.values[row])
    return layout.offsets[field.name] + start * field.item_bytes, items * field.item_bytes


def flip(path, offset, bit=0):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def in_child(work):
    """Run ``work`` in a forked child and return its exit status: 0 when it returned, 1 when it raised."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the parent's thread pool does not exist here, and waiting for it would hang
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start_and_kill(work, seconds):
    """Run ``work(ready)`` in a child, kill -9 it ``seconds`` after it called ``ready()``."""
    receiver, sender = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            torch.set_num_threads(1)  # see in_child
            work(lambda: os.write(sender, b"."))
            signal.pause()
        finally:
            os._exit(1)
    os.close(sender)
    assert os.read(receiver, 1) == b"."
    os.close(receiver)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


class TestFormat:
    def test_plain_h5py_reads_it(self, path):
        """Anyone with h5py sees the values under the fields' names."""
        spec = every_kind()
        fill(path)
        with h5py.File(path) as file:
            ragged = [field for field in spec.fields if field.lengths is not None]
            assert set(file) == {
                "commit", *(field.name for field in spec.fields), *(f"lengths.{field.name}" for field in ragged)
            }  # fmt: skip
            for field in ragged:
                np.testing.assert_array_equal(file[f"lengths.{field.name}"][()], field.lengths.values.numpy())
                assert "items" in file[f"lengths.{field.name}"].attrs["cachefreeze"]
            for field in spec.fields:
                want, dataset = values(spec, EVERY)[field.name], file[field.name]
                assert dataset.attrs["cachefreeze"] == str(field.dtype).removeprefix("torch.")
                if field.dtype in (torch.bfloat16, torch.bool):
                    want = want.view(torch.uint16 if field.dtype == torch.bfloat16 else torch.uint8)
                if field.lengths is not None:  # in the file there is no padding
                    want = want[field.lengths.mask(EVERY, want.shape[1])]
                assert dataset.dtype.byteorder in "<=|"
                np.testing.assert_array_equal(dataset[()], want.numpy())
            assert file["commit"]["row_plus_1"].tolist() == list(range(1, ROWS + 1))

    def test_layout(self, path):
        """Contiguous, aligned, at the offsets that the header names; the format's bytes are where the docs say."""
        layout = fill(path)
        with h5py.File(path) as file:
            assert file.userblock_size == HEADER_BYTES
            lengths = {f"lengths.{name}": offset for name, offset in layout.lengths_offsets.items()}
            assert len(lengths) == 3
            for name, offset in {**layout.offsets, **lengths, "commit": layout.commit_offset}.items():
                assert file[name].chunks is None
                assert file[name].id.get_offset() == offset
                assert offset % 4096 == 0
        block = path.read_bytes()[:HEADER_BYTES]
        magic, version, length = struct.unpack_from("<8sII", block)
        assert (magic, version) == (b"\x89CFRZ\r\n\x1a", 1)
        assert json.loads(block[16 : 16 + length])["fingerprint"] == {"weights": "abc"}
        assert struct.unpack_from("<I", block, 65532) == (zlib.crc32(block[:65532]),)
        assert path.stat().st_size == layout.file_bytes
        assert path.stat().st_blocks * 512 >= layout.spec.nbytes

    def test_older_libraries_read_it(self, path):
        """Nothing in the file needs more than HDF5 1.10; its metadata carries checksums."""
        fill(path)
        raw = path.read_bytes()
        assert raw[HEADER_BYTES + 8] == 3  # superblock version
        datatype_version = raw[raw.index(b"xxh3_64\0") - 8] >> 4  # 8 bytes before a compound's first member
        assert datatype_version == 3  # HDF5 2.0 writes 5 unless told otherwise

    def test_header_for_info(self, path):
        """Info shows everything without mapping the file."""
        store = create(path, model="resnet18", boundary="layer4")
        store.write(rows_of(3, 4), values(store.spec, rows_of(3, 4)))
        header = read_header(path)
        assert (header.rows, header.count, header.fields) == (ROWS, 2, store.spec.fields)
        assert header.fingerprint == store.fingerprint == {"weights": "abc"}
        assert header.attributes == store.attributes == {"model": "resnet18", "boundary": "layer4"}
        assert header.nbytes == path.stat().st_size
        assert abs(header.created.timestamp() - time.time()) < 60
        assert store.path == path

    def test_only_the_owner_reads_it(self, path):
        """Activations reveal inputs: 0600 for the file and its lock."""
        store = create(path)
        assert [p.stat().st_mode & 0o777 for p in (path, lock_path(path))] == [0o600, 0o600]
        store.close()

    def test_many_fields_fit(self, path):
        """As many fields as the format allows can be made and opened."""
        spec = StoreSpec(
            rows=2, fields=tuple(FieldSpec(name=f"f{at}", shape=(), dtype=torch.uint8) for at in range(256))
        )
        store = create(path, spec)
        store.write(rows_of(1), values(spec, rows_of(1)))
        store.close()
        assert_same(HDF5Store.open(path).read(rows_of(1)), values(spec, rows_of(1)))

    def test_many_ragged_fields_fit(self, path):
        """As many ragged fields as the format allows, too, although each takes two datasets."""
        fields = [FieldSpec.ragged(name=f"f{at}", lengths=[1, at], rest=(), dtype=torch.uint8) for at in range(256)]
        spec = StoreSpec(rows=2, fields=tuple(fields))
        store = create(path, spec)
        store.write(rows_of(1), values(spec, rows_of(1)))
        store.close()
        assert_same(HDF5Store.open(path).read(rows_of(1)), values(spec, rows_of(1)))

    def test_ragged_rows_take_their_own_length(self, path):
        """Sentences of 0 to 60 tokens: the file is less than 5 % larger than their activations and ids."""
        lengths = torch.randint(0, 60, (500,), generator=torch.Generator().manual_seed(0))
        spec = StoreSpec(
            rows=500,
            fields=(
                FieldSpec.ragged(name="activation.0", lengths=lengths, rest=(96,), dtype=torch.float32),
                FieldSpec.ragged(name="field.ids", lengths=lengths, rest=(), dtype=torch.int64),
            ),
        )
        true_bytes = int(lengths.sum()) * (96 * 4 + 8)
        assert spec.nbytes == true_bytes
        fill(path, spec)
        assert true_bytes < path.stat().st_size < 1.05 * true_bytes
        with h5py.File(path) as file:  # the example of docs/store-format.md
            flat, lengths = file["activation.0"], file["lengths.activation.0"][()].astype(int)
            starts = lengths.cumsum() - lengths
            row = flat[starts[7] : starts[7] + lengths[7]]
        np.testing.assert_array_equal(row, HDF5Store.open(path).read(rows_of(7))["activation.0"][0].numpy())

    def test_lengths_are_part_of_the_spec(self, path):
        """A file of the same shape but other lengths is another spec, and a reopened one has its own."""
        store = create(path, one_ragged())
        store.close()
        assert HDF5Store.open(path).spec == store.spec
        moved = FieldSpec.ragged(name="activation.0", lengths=lengths_of()[::-1], rest=(3,), dtype=torch.float32)
        assert HDF5Store.open(path).spec != replace(store.spec, fields=(moved,))

    @pytest.mark.parametrize(
        ("name", "dtype", "message"),
        [
            ("commit", torch.float32, "field name"),
            ("a/b", torch.float32, "field name"),
            ("../x", torch.float32, "field name"),
            ("", torch.float32, "field name"),
            (".", torch.float32, "field name"),
            ("a\n", torch.float32, "field name"),
            ("lengths.a", torch.float32, "field name"),
            ("ok", torch.complex64, "complex64"),
        ],
    )
    def test_refused_fields(self, path, name, dtype, message):
        """What the format cannot hold is named, and no file is made."""
        with pytest.raises(StoreError, match=message):
            create(path, StoreSpec(rows=2, fields=(FieldSpec(name=name, shape=(2,), dtype=dtype),)))
        assert not list(path.parent.iterdir())

    def test_refused_lengths(self, path):
        """A row of more items than the format's u32 can say is named."""
        long = FieldSpec.ragged(name="a", lengths=[1, 2**32], rest=(), dtype=torch.uint8)
        with pytest.raises(StoreError, match=r"a row of 4,294,967,296 items"):
            create(path, StoreSpec(rows=2, fields=(long,)))
        assert not list(path.parent.iterdir())

    def test_refused_strings(self, path):
        """Fingerprints and attributes that do not fit, or are no text, are named."""
        with pytest.raises(StoreError, match="header of"):
            HDF5Store.create(path, one_field(), fingerprint={"code": "x" * 70_000})
        with pytest.raises(StoreError, match="fingerprint must map strings"):
            HDF5Store.create(path, one_field(), fingerprint={"n": 3})
        with pytest.raises(StoreError, match="attributes must map strings"):
            create(path, one_field(), bad="\ud800")
        assert not list(path.parent.iterdir())


class TestReopen:
    def test_rows_survive(self, path):
        """What was written is there after a reopen; what was not is absent."""
        store = create(path)
        store.write(rows_of(1, 2, 9), values(store.spec, rows_of(1, 2, 9)))
        store.close()
        store = HDF5Store.open(path)
        assert store.writable
        assert torch.equal(store.present(EVERY).nonzero()[:, 0], rows_of(1, 2, 9))
        assert_same(store.read(rows_of(9, 1)), values(store.spec, rows_of(9, 1)))
        store.write(rows_of(0), values(store.spec, rows_of(0)))
        assert_same(store.read(rows_of(0, 2)), values(store.spec, rows_of(0, 2)))

    def test_reading_calls_no_libhdf5(self, path, monkeypatch):
        """Opening and reading somebody else's file never reaches libhdf5's parser."""
        fill(path)
        monkeypatch.setitem(__import__("sys").modules, "h5py", None)
        store = HDF5Store.open(path)
        store.read(EVERY)
        assert store.verify() == []
        read_header(path)

    def test_closing_frees_the_operating_system(self, path):
        """After close(), and after garbage collection, no descriptor is left and the lock is free."""

        def descriptors():
            links = []
            for fd in Path("/proc/self/fd").iterdir():
                with suppress(FileNotFoundError):  # the one that lists the folder
                    links.append(str(fd.readlink()))
            return [link for link in links if str(path) in link]

        store = create(path)
        store.write(EVERY, values(store.spec, EVERY))
        store.read(EVERY)
        assert descriptors()
        store.close()
        assert not descriptors()
        store = HDF5Store.open(path)
        assert store.writable
        del store
        gc.collect()
        assert not descriptors()
        assert HDF5Store.open(path).writable

    @pytest.mark.parametrize("bad", ["sometimes", "", None])
    def test_choices(self, path, bad):
        """Verify is one of three, io one of two; anything else is named before anything is opened or made."""
        for make in (create, lambda path, **choice: HDF5Store.open(path, **choice)):
            with pytest.raises(UsageError, match=r"io=.*'mmap', 'pread'"):
                make(path, io=bad)
        with pytest.raises(UsageError, match="verify="):
            HDF5Store.open(path, verify=bad)
        assert not list(path.parent.iterdir())

    @pytest.mark.parametrize("more", [0, 1])
    def test_large_files_are_not_mapped(self, path, monkeypatch, more):
        """With io="auto" a file beyond the bound is in nobody's memory: a run's peak does not grow with it."""
        create(path).close()
        monkeypatch.setattr(source, "MAPPED_BYTES", path.stat().st_size - more)
        store = HDF5Store.open(path)
        assert (str(path) in Path("/proc/self/maps").read_text()) == (not more)
        store.close()

    def test_what_is_expected_is_asked_of_the_system(self, path, monkeypatch):
        """Neighbouring rows in one stretch, in pieces that Linux takes; a map is left to the system."""
        fill(path, one_field())
        asked = []
        monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, size, advice: asked.append((offset, size, advice)))
        monkeypatch.setattr(source, "_EXPECTED_BYTES", 40)
        store = HDF5Store.open(path, io="pread")
        first = store._layout.offsets["activation.0"]
        store.expect(rows_of(3, 2, 9, 3))
        wanted = os.POSIX_FADV_WILLNEED
        assert asked == [(first + 48, 40, wanted), (first + 88, 8, wanted), (first + 9 * 24, 24, wanted)]
        HDF5Store.open(path, io="mmap").expect(EVERY)
        assert len(asked) == 3

        def refuse(*_):
            raise OSError(errno.EINVAL, "no hints here")

        monkeypatch.setattr(os, "posix_fadvise", refuse)
        store.expect(EVERY)
        monkeypatch.delattr(os, "posix_fadvise")
        store.expect(EVERY)

    def test_pread_maps_nothing(self, path):
        """With io="pread" no part of the file is in the address space; workers get it the same way."""
        fill(path)
        store = HDF5Store.open(path, io="pread")
        copy = pickle.loads(pickle.dumps(store))
        for one in (store, copy):
            assert_same(one.read(EVERY), values(store.spec, EVERY))
            assert one.verify() == []
        assert str(path) not in Path("/proc/self/maps").read_text()
        mapped = HDF5Store.open(path)
        assert str(path) in Path("/proc/self/maps").read_text()
        for one in (store, copy, mapped):
            one.close()
        assert str(path) not in Path("/proc/self/maps").read_text()

    def test_a_shortened_file_is_an_error_with_pread(self, path):
        """Where a map would end the process by a signal, pread raises and names the file."""
        layout = fill(path)
        store = HDF5Store.open(path, io="pread")
        os.truncate(path, layout.commit_offset)
        with pytest.raises(StoreError, match=rf"cannot read {path}: the file ends [\d,]+ bytes early"):
            store.read(EVERY)
        with pytest.raises(StoreError, match="bytes early"):
            store.verify()
        store.forget(rows_of(1))


class TestDamage:
    """One flipped bit anywhere is found."""

    @pytest.mark.parametrize("verify", ["first", "always"])
    def test_data(self, path, verify):
        """A flip in any field of a row raises on reading, names the row, and the row can be written again."""
        layout = fill(path)
        for field in layout.spec.fields:
            offset, size = place(layout, field, 5)
            flip(path, offset + size // 2, bit=3)
            store = HDF5Store.open(path, verify=verify)
            assert [(bad.row, bad.field) for bad in store.verify()] == [(5, None)]
            assert field.name in store.verify()[0].reason
            with pytest.raises(CorruptRowError) as caught:
                store.read(rows_of(4, 5, 6, 5))
            assert caught.value.rows == (5,)
            assert store.present(rows_of(4, 5, 6)).tolist() == [True, False, True]
            assert_same(store.read(rows_of(4, 6)), values(store.spec, rows_of(4, 6)))
            store.write(rows_of(5), values(store.spec, rows_of(5)))
            assert_same(store.read(EVERY), values(store.spec, EVERY))
            assert store.verify() == []
            store.close()

    @pytest.mark.parametrize("row", [0, 7, ROWS - 1])
    def test_every_portion_is_digested(self, path, monkeypatch, row):
        """Rows that are copied and digested in several portions are so to the last."""
        monkeypatch.setattr(hdf5, "_CHECKED_BYTES", 2 * 24)
        layout = fill(path, one_field())
        flip(path, layout.offsets["activation.0"] + 24 * row)
        for rows in (EVERY, EVERY.flip(0)):
            with pytest.raises(CorruptRowError) as caught:
                HDF5Store.open(path, writable=False).read(rows)
            assert caught.value.rows == (row,)

    def test_rows_written_meanwhile_are_no_damage(self, path, monkeypatch):
        """A row whose record another process writes between two looks at it is neither lost nor damaged."""
        filler = HDF5Store.create(path, one_field(), fingerprint={})
        store = HDF5Store.open(path, io="mmap")
        whole = hdf5.complete

        def complete(records, rows):
            found = whole(records, rows)
            monkeypatch.setattr(hdf5, "complete", whole)
            filler.write(EVERY, values(filler.spec, EVERY))
            return found

        monkeypatch.setattr(hdf5, "complete", complete)
        assert store.verify() == []
        assert_same(store.read(EVERY), values(store.spec, EVERY))

    def test_single_field_is_named(self, path):
        """With one field the damaged dataset is known."""
        layout = fill(path, one_field())
        flip(path, layout.offsets["activation.0"] + 24 * 7)
        (bad,) = HDF5Store.open(path).verify()
        assert (bad.row, bad.field) == (7, "activation.0")

    def test_first_read_only(self, path):
        """verify="first" checks a row once, "always" every time, "never" not at all; own writes are trusted."""
        layout = fill(path, one_field())
        stores = {verify: HDF5Store.open(path, writable=False, verify=verify) for verify in ("first", "always")}
        for store in stores.values():
            store.read(rows_of(2))
        flip(path, layout.offsets["activation.0"] + 24 * 2)
        stores["first"].read(rows_of(2))
        with pytest.raises(CorruptRowError):
            stores["always"].read(rows_of(2))
        HDF5Store.open(path, writable=False, verify="never").read(rows_of(2))
        assert [bad.row for bad in stores["first"].verify()] == [2]
        with pytest.raises(CorruptRowError):  # verify() has told it
            stores["first"].read(rows_of(2))

    def test_commit_table(self, path):
        """A flip in a record makes its row absent or corrupt, never wrong, and verify() reports it."""
        layout = fill(path)
        for byte in range(16):
            flip(path, layout.commit_offset + 16 * 6 + byte, bit=byte % 8)
            store = HDF5Store.open(path, writable=False)
            with pytest.raises(StoreError, match="absent" if byte >= 8 else "checksum"):
                store.read(rows_of(6))
            assert [bad.row for bad in HDF5Store.open(path, writable=False).verify()] == [6]
            others = EVERY[EVERY != 6]
            assert_same(store.read(others), values(store.spec, others))
            flip(path, layout.commit_offset + 16 * 6 + byte, bit=byte % 8)

    def test_record_of_another_row(self, path):
        """Rows and records that were moved together do not pass for another row."""
        layout = fill(path, one_field())
        raw = bytearray(path.read_bytes())
        for start, size in ((layout.offsets["activation.0"], 24), (layout.commit_offset, 16)):
            raw[start : start + size] = raw[start + size : start + 2 * size]
        path.write_bytes(raw)
        assert HDF5Store.open(path).present(rows_of(0, 1)).tolist() == [False, True]

    def test_header_and_metadata(self, path):
        """Any flip in the header block, in HDF5's metadata or in padding refuses the file."""
        layout = fill(path)
        rng = random.Random(0)
        spans = [(0, 16), (0, 1024), (0, HEADER_BYTES), *layout.gaps]
        offsets = [start + rng.randrange(size) for start, size in spans for _ in range(20)]
        for offset in [*offsets, 65532, 65535, HEADER_BYTES, layout.gaps[-1][0]]:
            bit = rng.randrange(8)
            flip(path, offset, bit)
            with pytest.raises(CorruptStoreError, match=str(path)):
                HDF5Store.open(path)
            with pytest.raises(CorruptStoreError):
                read_header(path)
            flip(path, offset, bit)
        HDF5Store.open(path).read(EVERY)

    @pytest.mark.parametrize("change", [-1, 1, 4096, -4096])
    def test_size(self, path, change):
        """A file that was cut or grew is refused before it is mapped."""
        layout = fill(path)
        os.truncate(path, layout.file_bytes + change)
        with pytest.raises(CorruptStoreError, match="cut or grew"):
            HDF5Store.open(path)
        os.truncate(path, 10)
        with pytest.raises(CorruptStoreError, match="too few"):
            HDF5Store.open(path)

    def test_cut_while_it_is_opened(self, path, monkeypatch):
        """A file that becomes shorter between the check of its header and its mapping is an error of the store."""
        layout = fill(path)

        def cut(io, fd, file_bytes):
            os.truncate(path, layout.file_bytes // 2)
            return source.open_source(io, fd, file_bytes)

        monkeypatch.setattr(hdf5, "open_source", cut)
        with pytest.raises(StoreError, match="shorter"):
            HDF5Store.open(path, io="mmap")

    def test_bool_bytes(self, path):
        """A bool of byte 2, which torch does not define, is handed out as a plain True."""
        store = create(path, one_field((3,), torch.bool))
        odd = torch.tensor([[2, 0, 255]], dtype=torch.uint8).view(torch.bool)
        store.write(rows_of(0), {"activation.0": odd})
        got = store.read(rows_of(0))["activation.0"]
        assert got.view(torch.uint8).tolist() == [[1, 0, 1]]

    @pytest.mark.parametrize(
        ("lengths", "message"),
        [
            ([2, 5, 0, 1, 1, 7, 0, 2, 5, 0, 1, 2], "at most 7 and 26 in all, the header says 7 and 25"),
            ([2, 5, 0, 1, 1, 6, 1, 2, 5, 0, 1, 1], "at most 6 and 25 in all, the header says 7 and 25"),
            ([2**32 - 1] * 12, "at most 4,294,967,295 and 51,539,607,540 in all"),
            ([0] * 12, "at most 0 and 0 in all"),
        ],
    )
    def test_lying_lengths(self, path, lengths, message):
        """Lengths that the digest vouches for are still held to what the header says of them."""
        honest = fill(path, one_ragged())
        raw = bytearray(path.read_bytes())
        struct.pack_into("<12I", raw, honest.lengths_offsets["activation.0"], *lengths)
        digest = metadata_sha256(honest.gaps, lambda offset, size: bytes(raw[offset : offset + size]))
        raw[:HEADER_BYTES] = encode(replace(honest, metadata_sha256=digest))
        path.write_bytes(raw)
        for call in (HDF5Store.open, read_header):
            with pytest.raises(CorruptStoreError, match=message):
                call(path)

    @pytest.mark.parametrize(
        "changes",
        [
            {"items": 6},
            {"items": 12 * 7 + 1},
            {"items": 2**62},
            {"items": True},
            {"lengths_offset": 0},
            {"lengths_offset": 65536 + 8},
            {"lengths_offset": 2**62},
            {"lengths_offset": "offset"},
            {"shape": []},
            {"shape": [0, 3]},
        ],
        ids=str,
    )
    def test_lying_ragged_fields(self, path, changes):
        """What a header with a valid CRC says of a ragged field is held to the file's bounds."""
        fill(path, one_ragged())
        block = bytearray(path.read_bytes()[:HEADER_BYTES])
        length = struct.unpack_from("<I", block, 12)[0]
        tree = json.loads(block[16 : 16 + length])
        field = tree["fields"][0]
        field.update({key: field[value] if value == "offset" else value for key, value in changes.items()})
        text = json.dumps(tree).encode()
        block[12:65532] = (struct.pack("<I", len(text)) + text).ljust(65520, b"\0")
        block[65532:] = struct.pack("<I", zlib.crc32(block[:65532]))
        with path.open("r+b") as file:
            file.write(block)
        for call in (HDF5Store.open, read_header):
            with pytest.raises(CorruptStoreError, match=r"items|lengths_offset|aligned|overlap|beyond|dimension|shape"):
                call(path)

    @pytest.mark.parametrize("case", ["beyond the end", "overlap", "not aligned", "no dataset"])
    def test_consistent_lies(self, path, case):
        """A header whose CRC and digest agree with what it says is still held to the file's bounds."""
        honest = fill(path)
        last, first = max(honest.offsets, key=honest.offsets.get), min(honest.offsets, key=honest.offsets.get)
        offsets, spec = dict(honest.offsets), honest.spec
        if case == "beyond the end":
            offsets[last] += 1 << 40
        elif case == "overlap":
            offsets[last] = offsets[first]
        elif case == "not aligned":
            offsets[last] -= 8
        else:
            spec = StoreSpec(rows=1, fields=spec.fields[:1])
            with path.open("r+b") as file:
                file.truncate(honest.file_bytes + (8 << 20))
        lie = replace(honest, spec=spec, offsets=offsets, file_bytes=path.stat().st_size)
        raw = path.read_bytes()
        digest = metadata_sha256(lie.gaps, lambda offset, size: raw[offset : offset + max(size, 0)])
        with path.open("r+b") as file:
            file.write(encode(replace(lie, metadata_sha256=digest)))
        for call in (HDF5Store.open, read_header):
            with pytest.raises(CorruptStoreError, match=case):
                call(path)

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("symlink", "symbolic link"),
            ("fifo", "no regular file"),
            ("folder", "no regular file"),
            ("missing", "no cache file"),
            ("text", "wrong magic"),
        ],
    )
    def test_other_things(self, path, tmp_path, kind, message):
        """What is no regular cache file is refused with one line, and nothing is left beside it."""
        if kind == "symlink":
            fill(tmp_path / "real.h5")
            path.symlink_to(tmp_path / "real.h5")
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "text":
            path.write_text("no cache file\n" * 10_000)
        before = sorted(tmp_path.iterdir())
        for call in (HDF5Store.open, read_header):
            with pytest.raises(StoreError, match=message) as caught:
                call(path)
            assert "\n" not in str(caught.value)
            assert str(path) in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before


class TestCreation:
    def test_exclusive(self, path):
        """A file is never replaced, not even by one of the same name made at the same instant."""
        store = create(path)
        with pytest.raises(StoreError, match="exists"):
            create(path)
        store.write(EVERY, values(store.spec, EVERY))
        assert_same(store.read(EVERY), values(store.spec, EVERY))

    def test_folder_behind_a_link(self, tmp_path):
        """A cache folder may be a symbolic link, as scratch folders are; by either name the rows have one lock."""
        (tmp_path / "scratch").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "scratch")
        store = create(tmp_path / "link" / "rows.h5")
        other = HDF5Store.open(tmp_path / "scratch" / "rows.h5")
        assert store.claim(EVERY).all()
        assert not other.claim(EVERY).any()
        store.write(EVERY, values(store.spec, EVERY))
        store.close()
        other.close()
        other = HDF5Store.open(tmp_path / "scratch" / "rows.h5", writable=False)
        assert_same(other.read(EVERY), values(store.spec, EVERY))

    def test_a_file_system_without_hard_links_is_named(self, path, monkeypatch):
        """FAT answers link() as if something were not permitted."""

        def link(source, target):
            raise OSError(errno.EPERM, "Operation not permitted", str(source), None, str(target))

        monkeypatch.setattr(system, "link", link)
        with pytest.raises(StoreError, match=r"no hard links .*use a folder on another one"):
            create(path)
        assert list(path.parent.iterdir()) == []

    def test_a_folder_in_place_of_the_lock_is_named(self, path):
        lock_path(path).mkdir()
        with pytest.raises(StoreError, match=rf"cannot create {path}: Is a directory \({lock_path(path)}\)"):
            create(path)

    @pytest.mark.parametrize("now", [-5.0, 3e11])
    def test_clock(self, path, monkeypatch, now):
        """A clock before 1970 or after the year 9999 makes a file that opens."""
        monkeypatch.setattr(time, "time", lambda: now)
        layout = fill(path)
        assert layout.created == min(max(now, 0), CREATED_MAX)
        store = HDF5Store.open(path)
        assert_same(store.read(EVERY), values(store.spec, EVERY))

    def test_lost_race(self, path, monkeypatch):
        """The loser of a race to the same name gets an error and leaves the winner's file alone."""

        def link(source, target):
            target.write_bytes(b"the winner's")
            System.link(system, source, target)

        monkeypatch.setattr(system, "link", link)
        with pytest.raises(StoreError, match="another process has just created it"):
            create(path)
        assert path.read_bytes() == b"the winner's"
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "fallocate", "link", "unlink"])
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
    def test_failing_calls(self, path, monkeypatch, call, code):
        """Whichever system call fails first, creation raises one clear error and leaves nothing behind."""
        calls = []

        def fail(*args, **kwargs):
            calls.append(args)
            if len(calls) == 1:
                raise OSError(code, os.strerror(code))
            return getattr(System, call)(system, *args, **kwargs)

        monkeypatch.setattr(system, call, fail)
        with pytest.raises(StoreSpaceError if code == errno.ENOSPC else StoreError, match=r"rows\.h5"):
            create(path)
        assert calls
        monkeypatch.undo()
        sweep(path.parent)  # an unlink that failed can only be made up for later
        assert not list(path.parent.iterdir())
        create(path).close()

    def test_folder_fsync_fails(self, path, monkeypatch):
        """A file whose name may not survive a power cut is not left behind as if it did."""
        done = []

        def fsync(fd):
            done.append(fd)
            if len(done) == 2:
                raise OSError(errno.EIO, "lost")
            os.fsync(fd)

        monkeypatch.setattr(system, "fsync", fsync)
        with pytest.raises(StoreError, match="lost"):
            create(path)
        assert not list(path.parent.iterdir())

    def test_too_large_for_the_disk(self, path, monkeypatch):
        """What cannot fit is refused at once, with both numbers, before anything is written."""
        monkeypatch.setattr(system, "open", None)
        with pytest.raises(StoreSpaceError, match=r"needs 4,\d+,\d+,\d+,\d+,\d+ bytes, [\d,]+ are free"):
            create(path, one_field((10**6,), rows=10**9))
        assert not list(path.parent.iterdir())

    def test_limit_on_file_size(self, path):
        """A limit that only the allocation meets is an exception, not a signal, and leaves nothing."""

        def work():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            with pytest.raises(StoreSpaceError, match="limit on file sizes"):
                create(path, one_field((1 << 10,), rows=1 << 10))

        assert in_child(work) == 0
        assert not list(path.parent.iterdir())

    @pytest.mark.parametrize("name", ["missing/rows.h5", "folder", "x" * 300 + ".h5"])
    def test_bad_paths(self, tmp_path, name):
        """A missing folder, a folder, a name that is too long: one line that names the path."""
        (tmp_path / "folder").mkdir()
        with pytest.raises(StoreError) as caught:
            create(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["folder"]

    def test_unwritable_folder(self, path):
        """A folder without write permission is one clear line; so is one that may not be entered."""

        def work():
            if os.geteuid() == 0:
                os.seteuid(65534)  # to root nothing is forbidden
            with pytest.raises(StoreError, match="Permission denied; use a folder"):
                create(path)

        for mode in (0o500, 0o000):
            path.parent.chmod(mode)
            assert in_child(work) == 0
        path.parent.chmod(0o700)
        assert not list(path.parent.iterdir())

    def test_killed_creators_leave_nothing(self, path, monkeypatch):
        """A creator killed at any step leaves no file at the final name, and its temporary is swept by the next."""
        for step in ("fallocate", "pwrite", "fsync", "link"):

            def work(ready, step=step):
                def stop(*args):
                    ready()
                    signal.pause()

                setattr(system, step, stop)
                create(path)

            start_and_kill(work, 0)
            left = [p.name for p in path.parent.iterdir() if p.name.endswith(".tmp")]
            assert len(left) == 1
            assert not path.exists()
        create(path).close()
        assert sorted(p.name for p in path.parent.iterdir()) == ["rows.h5", "rows.h5.lock"]

    def test_living_creators_are_not_swept(self, path):
        """A sweep leaves the temporary of a creator at work, and files that only look similar."""
        alive = FileLock.take(path.parent / f".cachefreeze-{'0' * 16}.tmp", os.O_CREAT | os.O_EXCL)
        (path.parent / f".cachefreeze-{'0' * 15}.tmp").touch()
        (path.parent / f".cachefreeze-{'1' * 16}.tmp").touch()
        sweep(path.parent)
        assert sorted(p.name for p in path.parent.iterdir()) == [
            f".cachefreeze-{'0' * 15}.tmp",
            f".cachefreeze-{'0' * 16}.tmp",
        ]
        alive.release()


class TestSharing:
    def test_fillers_share_a_file(self, path):
        """Whoever opens the file may fill it, and sees at once what others write."""
        one = create(path)
        two, reader = HDF5Store.open(path), HDF5Store.open(path, writable=False)
        assert two.writable
        one.write(rows_of(1), values(one.spec, rows_of(1)))
        two.write(rows_of(2), values(one.spec, rows_of(2)))
        for store in (one, two, reader):
            assert store.present(rows_of(1, 2, 3)).tolist() == [True, True, False]
            assert_same(store.read(rows_of(2, 1)), values(store.spec, rows_of(2, 1)))
        with pytest.raises(StoreError, match="exists"):
            create(path)

    def test_a_row_is_claimed_once(self, path):
        """Of two fillers one gets a row; the other learns that it is taken, and later that it is there."""
        one, two = create(path), HDF5Store.open(path)
        assert one.claim(rows_of(3, 4, 4, 9)).tolist() == [True] * 4
        assert one.claim(rows_of(4)).tolist() == [True]  # still
        assert two.claim(rows_of(2, 3, 4, 5, 9)).tolist() == [True, False, False, True, False]
        one.write(rows_of(4), values(one.spec, rows_of(4)))
        one.release(rows_of(3, 3, 7))
        assert two.claim(rows_of(3, 4, 9)).tolist() == [True, False, False]
        assert two.present(rows_of(3, 4, 9)).tolist() == [False, True, False]
        one.close()
        assert two.claim(rows_of(9)).tolist() == [True]
        with pytest.raises(StoreError, match="read-only"):
            HDF5Store.open(path, writable=False).claim(rows_of(0))

    def test_a_row_written_while_it_is_claimed(self, path, monkeypatch):
        """A row that another filler finishes between a look and the lock is not computed again."""
        one, two = create(path), HDF5Store.open(path)
        lock = System.lock

        def late(self, *args, **kwargs):
            monkeypatch.undo()
            one.write(rows_of(3), values(one.spec, rows_of(3)))
            return lock(self, *args, **kwargs)

        monkeypatch.setattr(System, "lock", late)
        assert two.claim(rows_of(2, 3)).tolist() == [True, False]
        assert one.claim(rows_of(2)).tolist() == [False]
        one.forget(rows_of(3))
        assert one.claim(rows_of(3)).tolist() == [True]  # and two has let go of it

    def test_a_failed_write_gives_up_its_claim(self, path, monkeypatch):
        """When one filler's disk fails, another may try."""
        one, two = create(path), HDF5Store.open(path)
        one.claim(rows_of(3))
        monkeypatch.setattr(system, "pwrite", lambda fd, data, offset: 0)
        with pytest.raises(StoreError, match="took no bytes"):
            one.write(rows_of(3), values(one.spec, rows_of(3)))
        assert two.claim(rows_of(3)).tolist() == [True]

    def test_forgotten_rows_stay_absent(self, path):
        """A row that was forgotten here is not found again in the table, until somebody here writes it."""
        store = create(path)
        store.write(rows_of(3), values(store.spec, rows_of(3)))
        store.forget(rows_of(3))
        assert store.present(rows_of(3)).tolist() == [False]
        assert HDF5Store.open(path).present(rows_of(3)).tolist() == [True]
        store.write(rows_of(3), values(store.spec, rows_of(3)))
        assert store.present(rows_of(3)).tolist() == [True]

    def test_locks_die_with_their_holder(self, path):
        """After kill -9 of a filler its rows are anybody's; there are no stale locks."""
        fill(path)

        def work(ready):
            store = HDF5Store.open(path)
            store.forget(rows_of(1, 2))
            assert store.claim(rows_of(1, 2)).all()
            ready()
            signal.pause()

        store = HDF5Store.open(path)
        store.forget(rows_of(1, 2))
        start_and_kill(work, 0)
        assert store.claim(rows_of(1, 2)).all()
        store.close()
        assert FileLock.take(lock_path(path), 0) is not None

    def test_forked_child(self, path):
        """A forked child reads on, cannot write, and keeps no lock once the parent closes."""
        store = create(path)
        store.write(EVERY, values(store.spec, EVERY))

        def work():
            assert not store.writable
            assert_same(store.read(EVERY), values(store.spec, EVERY))
            with pytest.raises(StoreError, match="read-only"):
                store.write(rows_of(0), values(store.spec, rows_of(0)))
            store.commit()

        assert in_child(work) == 0
        receiver, sender = os.pipe()
        if (pid := os.fork()) == 0:
            os.write(sender, b".")
            signal.pause()
        try:
            os.read(receiver, 1)  # the child is past the hook that closes its descriptors
            assert store.writable
            store.write(rows_of(0), values(store.spec, rows_of(0)))
            store._handles.lock.after_fork_in_child()  # as a kill would: closed, and nothing unlocked by hand
            assert FileLock.take(lock_path(path), 0) is not None
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(receiver)
            os.close(sender)

    def test_child_closing_leaves_the_parents_lock(self, path):
        """What a forked child closes was never its own."""
        store = create(path)
        store.claim(rows_of(3))

        def work():
            store.release(rows_of(3))
            store.close()

        assert in_child(work) == 0
        assert FileLock.take(lock_path(path), 0) is None
        assert HDF5Store.open(path).claim(rows_of(3, 4)).tolist() == [False, True]

    def test_pickle_reopens_read_only(self, path):
        """A worker process gets the store read-only, under spawn as under fork."""
        store = create(path)
        store.write(EVERY, values(store.spec, EVERY))
        copy = pickle.loads(pickle.dumps(store))
        assert not copy.writable
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            got = pool.apply(_read_in_worker, (store,))
        np.testing.assert_array_equal(got, store.read(EVERY)["field.8"].numpy())
        assert store.writable

    def test_pickle_of_a_replaced_file(self, path):
        """A pickled store does not open another file that has taken its place."""
        store = create(path, one_field())
        data = pickle.dumps(store)
        store.close()
        path.unlink()
        HDF5Store.create(path, one_field(), fingerprint={"weights": "other"}).close()
        with pytest.raises(StoreError, match="another file"):
            pickle.loads(data)

    def test_readers_need_no_permission(self):
        """A file and a folder that may only be read are opened read-only, without an error."""
        with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
            path = Path(folder) / "rows.h5"
            fill(path)
            lock_path(path).unlink()
            path.chmod(0o444)
            path.parent.chmod(0o555)

            def work():
                if os.geteuid() == 0:
                    os.seteuid(65534)  # to root nothing is forbidden
                store = HDF5Store.open(path)
                assert not store.writable
                assert_same(store.read(EVERY), values(store.spec, EVERY))

            assert in_child(work) == 0
            assert list(path.parent.iterdir()) == [path]
            path.parent.chmod(0o700)


def _read_in_worker(store):
    assert not store.writable
    return store.read(EVERY)["field.8"].numpy()


class TestFilling:
    def test_record_follows_data(self, path, monkeypatch):
        """A row that is rewritten is absent on disk from before its first changed byte until after its last."""
        layout = fill(path)
        store = HDF5Store.open(path)
        record = layout.commit_offset + 16 * 5
        present = []

        def pwrite(fd, data, offset):
            present.append(HDF5Store.open(path, writable=False).present(rows_of(5)).item())
            in_table = layout.commit_offset <= offset < layout.commit_offset + 16 * ROWS
            order.append("record" if in_table else "data")
            assert not in_table or offset == record
            return os.pwrite(fd, data, offset)

        order = []
        monkeypatch.setattr(system, "pwrite", pwrite)
        store.write(rows_of(5), values(store.spec, rows_of(5), seed=1))
        count = len(store.spec.fields)
        assert order == ["record", *["data"] * count, "record"]
        assert present == [True, *[False] * count, False]

    def test_neighbours_are_one_write(self, path, monkeypatch):
        """Consecutive rows cost one call per field and one for their records."""
        calls = []

        def pwrite(fd, data, offset):
            calls.append(len(data))
            return os.pwrite(fd, data, offset)

        store = create(path, one_field())
        monkeypatch.setattr(system, "pwrite", pwrite)
        store.write(rows_of(1, 2, 3, 7, 8), values(store.spec, rows_of(1, 2, 3, 7, 8)))
        assert calls == [72, 48, 48, 32]

    def test_short_and_interrupted_writes(self, path, monkeypatch):
        """A kernel that takes a byte at a time, or is interrupted, costs time and nothing else."""
        calls = []

        def pwrite(fd, data, offset):
            calls.append(offset)
            if len(calls) % 3 == 0:
                raise InterruptedError
            return os.pwrite(fd, data[:5], offset)

        store = create(path)
        monkeypatch.setattr(system, "pwrite", pwrite)
        store.write(EVERY, values(store.spec, EVERY))
        monkeypatch.undo()
        store.close()
        store = HDF5Store.open(path, verify="always")
        assert_same(store.read(EVERY), values(store.spec, EVERY))
        assert store.verify() == []

    @pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
    def test_failing_writes(self, path, monkeypatch, code):
        """At whichever write the disk fails: an exception, absent rows, and no wrong row in the file."""
        fill(path)
        for fail_at in range(1, 22, 4):
            store = HDF5Store.open(path)
            calls = []

            def pwrite(fd, data, offset, calls=calls, fail_at=fail_at):
                calls.append(offset)
                if len(calls) == fail_at:
                    raise OSError(code, os.strerror(code))
                return os.pwrite(fd, data[: len(data) // 2 + 1], offset)

            monkeypatch.setattr(system, "pwrite", pwrite)
            with pytest.raises(StoreSpaceError if code == errno.ENOSPC else StoreError, match=r"rows\.h5"):
                store.write(rows_of(3, 4), values(store.spec, rows_of(3, 4), seed=7))
            monkeypatch.undo()
            assert store.present(rows_of(2, 3, 4)).tolist() == [True, False, False]
            store.close()
            store = HDF5Store.open(path)
            for row in (3, 4):
                if store.present(rows_of(row)):
                    # whole, old or new; or found out
                    with suppress(CorruptRowError):
                        got = store.read(rows_of(row))
                        seed = 7 if torch.equal(got["field.8"], values(store.spec, rows_of(row), 7)["field.8"]) else 0
                        assert_same(got, values(store.spec, rows_of(row), seed))
            store.write(rows_of(3, 4), values(store.spec, rows_of(3, 4)))
            assert_same(store.read(EVERY), values(store.spec, EVERY))
            store.close()

    def test_zero_bytes_written(self, path, monkeypatch):
        """A file system that takes nothing is an error, not an endless loop."""
        store = create(path)
        monkeypatch.setattr(system, "pwrite", lambda fd, data, offset: 0)
        with pytest.raises(StoreError, match="took no bytes"):
            store.write(EVERY, values(store.spec, EVERY))

    def test_commit_reaches_the_disk(self, path, monkeypatch):
        """commit() syncs, and so does every SYNC_BYTES of writing."""
        calls = []
        monkeypatch.setattr(system, "fdatasync", calls.append)
        monkeypatch.setattr(hdf5, "SYNC_BYTES", 3 * 40)
        store = create(path, one_field())
        for row in range(6):
            store.write(rows_of(row), values(store.spec, rows_of(row)))
        assert len(calls) == 2
        store.commit()
        assert len(calls) == 3

    def test_failed_sync(self, path, monkeypatch):
        """After a failed fsync the kernel may have dropped pages, and the next one succeeds without them.

        Rows since the last good one are absent until written again; the others are judged by checksum again.
        """
        store = create(path, one_field())
        store.write(rows_of(0, 1), values(store.spec, rows_of(0, 1)))
        store.commit()
        store.write(rows_of(*range(2, ROWS)), values(store.spec, rows_of(*range(2, ROWS))))

        def fdatasync(fd):
            raise OSError(errno.EIO, "lost")

        monkeypatch.setattr(system, "fdatasync", fdatasync)
        with pytest.raises(StoreError, match="lost"):
            store.commit()
        assert store.present(EVERY).tolist() == [True, True, *[False] * (ROWS - 2)]
        assert HDF5Store.open(path).present(EVERY).all()
        flip(path, layout_of(path).offsets["activation.0"] + 24)  # by the same token
        with pytest.raises(CorruptRowError):
            store.read(rows_of(0, 1))
        monkeypatch.undo()
        store.write(rows_of(*range(1, ROWS)), values(store.spec, rows_of(*range(1, ROWS))))
        store.commit()
        assert_same(store.read(EVERY), values(store.spec, EVERY))

    def test_portable_allocation(self, path, monkeypatch):
        """Without posix_fallocate the blocks are reserved all the same, by writing them."""
        monkeypatch.delattr(os, "posix_fallocate")
        store = create(path, one_field((1 << 12,), rows=100))
        assert path.stat().st_blocks * 512 >= store.nbytes
        assert store.count == 0


def test_flock_where_there_are_no_ofd_locks(path, monkeypatch):
    """Without open-file-description locks one process fills the file, and claims what it likes."""
    monkeypatch.delattr("fcntl.F_OFD_SETLK")
    store = create(path)
    assert store.claim(rows_of(1)).all()
    store.write(rows_of(1), values(store.spec, rows_of(1)))
    assert not HDF5Store.open(path).writable
    assert in_child(lambda: store.close()) == 0
    assert not HDF5Store.open(path).writable
    store.close()
    assert HDF5Store.open(path).writable


class TestEdges:
    """What few machines and few moments show."""

    def test_create_while_another_creates(self, path):
        """Two creators of one name: the second is told, and leaves the first alone."""
        creator = FileLock.take(lock_path(path), os.O_CREAT)
        with pytest.raises(StoreError, match="another process is creating or removing"):
            create(path)
        creator.release(unlink=True)
        create(path).close()

    def test_a_sweeper_takes_a_temporary(self, path, monkeypatch):
        """A temporary that a sweeper locks between its creation and its lock costs another name and no more."""
        lock, swept = System.lock, []

        def late(self, fd, *args, **options):
            locked = Path(f"/proc/self/fd/{fd}").readlink()
            if locked.suffix == ".tmp" and not swept:
                swept.append(locked)
                locked.unlink()
            return lock(self, fd, *args, **options)

        monkeypatch.setattr(System, "lock", late)
        create(path).close()
        assert swept
        assert sorted(found.name for found in path.parent.iterdir()) == ["rows.h5", "rows.h5.lock"]

    def test_removed_between_open_and_lock(self, path, monkeypatch):
        """Whoever opens a file that is being removed is told, and leaves no lock behind."""
        fill(path)
        take = FileLock.take

        def late(*args, **options):
            path.unlink(missing_ok=True)
            return take(*args, **options)

        monkeypatch.setattr(FileLock, "take", late)
        with pytest.raises(StoreError, match="removed while it was being opened"):
            HDF5Store.open(path)
        assert not list(path.parent.iterdir())

    def test_the_lock_file_is_replaced_meanwhile(self, path, monkeypatch):
        """A lock on a file that has lost its name is no lock: it is taken again."""
        fill(path)
        lock, unlinked = System.lock, []

        def late(self, *args, **options):
            if not unlinked:
                lock_path(path).unlink()
                unlinked.append(1)
            return lock(self, *args, **options)

        monkeypatch.setattr(System, "lock", late)
        store = HDF5Store.open(path)
        assert store.writable
        assert FileLock.take(lock_path(path), 0) is None

    @pytest.mark.parametrize("step", ["Mapped", "FileLock"])
    def test_opening_fails_late(self, path, monkeypatch, step):
        """A map that is refused, or a file system without locks: one clear error, no descriptor and no lock left."""
        fill(path)

        def refuse(*_, **__):
            raise OSError(errno.ENOMEM if step == "Mapped" else errno.ENOLCK, "refused")

        if step == "Mapped":
            monkeypatch.setattr("cachefreeze.stores.source.mmap.mmap", refuse)
        else:
            monkeypatch.setattr(System, "lock", refuse)
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with pytest.raises(StoreError, match=rf"cannot (read|lock) {path}: refused"):
            HDF5Store.open(path)
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
        with pytest.raises(StoreError, match="refused"):
            create(path.with_name("new.h5"))
        monkeypatch.undo()
        assert not path.with_name("new.h5").exists()
        assert FileLock.take(lock_path(path), 0) is not None

    def test_a_folder_that_takes_no_lock(self, path, monkeypatch):
        """A file that may be written in a folder that may not is read, without an error."""
        fill(path)
        lock_path(path).unlink()
        real = System.open

        def refuse(self, path, flags):
            if flags & os.O_CREAT:
                raise OSError(errno.EROFS, "read-only")
            return real(self, path, flags)

        monkeypatch.setattr(System, "open", refuse)
        store = HDF5Store.open(path)
        assert not store.writable
        assert_same(store.read(EVERY), values(store.spec, EVERY))
        monkeypatch.setattr("cachefreeze.stores.source.mmap.mmap", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            HDF5Store.open(path)

    def test_a_lock_that_the_system_refuses(self, path):
        """Only a lock that another holds is reported as such; any other refusal is an error."""
        path.touch()
        with path.open("rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
            system.lock(file.fileno(), 0, 1)

    def test_creation_fails_late(self, path, monkeypatch):
        """A file that was made and cannot be opened is not left behind, nor is its lock."""
        monkeypatch.setattr("cachefreeze.stores.source.mmap.mmap", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            create(path)
        assert not list(path.parent.iterdir())

    def test_file_systems_without_reservation(self, path, monkeypatch):
        """Where the blocks cannot be reserved they are written; where that fails for another reason it is an error."""

        def refuse(fd, offset, size):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        code = errno.EOPNOTSUPP
        create(path).close()
        assert path.stat().st_blocks * 512 >= path.stat().st_size - 4096
        code = errno.EIO
        with pytest.raises(StoreError, match="Input/output error"):
            create(path.with_name("more.h5"))

    @pytest.mark.parametrize("where", ["byteorder", "pwrite"])
    def test_other_platforms(self, path, monkeypatch, where):
        """Big-endian machines and systems without pwrite are refused by name, with what to use there."""
        if where == "byteorder":
            monkeypatch.setattr(hdf5.sys, "byteorder", "big")
        else:
            monkeypatch.delattr(os, "pwrite")
        for call in (create, HDF5Store.open):
            with pytest.raises(StoreError, match="little-endian POSIX system; use store='host'"):
                call(path)

    def test_free_space_that_nobody_knows(self, path, monkeypatch):
        """The error for a full disk does not depend on the disk's answering."""

        def refuse(_):
            raise OSError(errno.EIO, "no answer")

        monkeypatch.setattr("cachefreeze.stores.creation.free_bytes", lambda _: 1 << 40)
        monkeypatch.setattr("cachefreeze.stores.system.free_bytes", refuse)
        monkeypatch.setattr(System, "fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(StoreSpaceError, match="0 are free"):
            create(path)

    def test_libhdf5_that_does_not_align(self, path, monkeypatch):
        """A libhdf5 that places data elsewhere than asked is found out before anything is written."""
        real = h5py.File
        monkeypatch.setattr(h5py, "File", lambda *args, **options: real(*args, **options | {"alignment_interval": 1}))
        with pytest.raises(StoreError, match="libhdf5 placed datasets at"):
            create(path)
        assert not list(path.parent.iterdir())

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (one_field((1,), rows=2**32 - 1), "at most 4,294,967,294 rows"),
            (one_field((1,) * 32), "32 dimensions, at most 31"),
            (StoreSpec(rows=1, fields=one_field().fields * 257), "."),
            (
                StoreSpec(
                    rows=1,
                    fields=tuple(FieldSpec(name=f"f{at}", shape=(), dtype=torch.uint8) for at in range(257)),
                ),
                "257 fields: a cache file holds at most 256",
            ),
        ],
        ids=["rows", "dimensions", "names", "fields"],
    )
    def test_beyond_the_format(self, path, spec, message):
        with pytest.raises(StoreError, match=message):
            create(path, spec)
        assert not list(path.parent.iterdir())


def test_sparse_file():
    """It behaves as a file of zeros in which only what was written takes memory."""
    file = SparseFile()
    assert (file.readable(), file.writable(), file.seekable()) == (True, True, True)
    assert file.seek(1 << 40) == file.tell() == 1 << 40
    assert file.write(b"abc") == 3
    assert file.seek(-5, os.SEEK_END) == (1 << 40) - 2
    assert file.read(6) == b"\0\0abc\0"
    assert file.seek(-1, os.SEEK_CUR) == (1 << 40) + 3
    assert file.truncate() == file.size == (1 << 40) + 3
    assert file.truncate(7) == 7
    assert len(file.pages) == 1


class TestAlone:
    """Rows change in place only for who has the file alone."""

    def test_not_beside_another_filler(self, path):
        store = create(path)
        with pytest.raises(StoreError, match="cannot be had alone: another process has it open to fill it"):
            HDF5Store.open(path, alone=True)
        store.close()
        HDF5Store.open(path, alone=True).close()

    def test_others_wait(self, path, monkeypatch):
        """For a while as fillers; then they read."""
        create(path).close()
        alone = HDF5Store.open(path, alone=True)
        with monkeypatch.context() as patch:
            patch.setattr(handles, "_OTHERS_SECONDS", 0.03)
            reader = HDF5Store.open(path)
            assert not reader.writable
            reader.close()
        monkeypatch.setattr(handles.time, "sleep", lambda seconds: alone.close())
        waited = HDF5Store.open(path)
        assert waited.writable
        waited.close()

    def test_one_field_is_replaced(self, path):
        """The others keep their bytes; a damaged or absent row is not made a good one."""
        store = create(path)
        rows = rows_of(2, 3, 7)
        whole = values(store.spec, rows)
        store.write(rows, whole)
        name = store.spec.fields[-1].name
        other = values(store.spec, rows, seed=1)[name]
        store.replace(rows, {name: other})
        store.replace(rows_of(), {name: other[:0]})
        found = store.read(rows)
        assert torch.equal(found[name], other)
        assert all(torch.equal(found[field.name], whole[field.name]) for field in store.spec.fields[:-1])
        assert not store.verify()
        with pytest.raises(StoreError, match="row 4 is absent"):
            store.replace(rows_of(4), {name: other[:1]})
        with pytest.raises(StoreError, match="got fields"):
            store.replace(rows, {"elsewhere": other})
        first = store._columns[0].spans(rows)[0][0]
        with path.open("r+b") as file:
            file.seek(first)
            byte = file.read(1)
            file.seek(first)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(CorruptRowError):
            store.replace(rows, {name: other})
        assert store.present(rows).tolist() == [False, True, True]

    def test_rows_are_discarded(self, path):
        """For every process, and for good."""
        store = create(path)
        store.write(rows_of(2, 3), values(store.spec, rows_of(2, 3)))
        store.discard(rows_of(2))
        assert store.present(rows_of(2, 3)).tolist() == [False, True]
        store.close()
        store = HDF5Store.open(path, writable=False)
        assert store.present(rows_of(2, 3)).tolist() == [False, True]
        with pytest.raises(StoreError, match="read-only"):
            store.discard(rows_of(3))
        with pytest.raises(StoreError, match="read-only"):
            store.replace(rows_of(3), {})
        store.close()
