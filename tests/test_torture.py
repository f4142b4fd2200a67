"""What the store promises under kills, power cuts, failing disks, damage and hostile files.

By default a tenth of what the ``slow`` marker runs; ``python -m benchmarks.store_torture`` runs as long as one likes.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cachefreeze.errors import CorruptStoreError, StoreError, StoreSpaceError
from cachefreeze.stores.creation import lock_path
from cachefreeze.stores.file import read_header
from cachefreeze.stores.hdf5 import HDF5Store
from cachefreeze.stores.header import encode
from cachefreeze.stores.layout import HEADER_BYTES, metadata_sha256
from cachefreeze.stores.removal import remove_cache
from cachefreeze.stores.system import System
from cachefreeze.testing import faults, hostile, powercuts, torture
from cachefreeze.testing.judge import Truth, judge, judge_file, torture_spec
from cachefreeze.testing.specs import one_field, rows_of, values

# Python 3.12 warns of fork in a process with threads. The children here use one thread.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


def columns(tenth, whole):
    """A tenth in every run, the whole column when slow tests are asked for."""
    return pytest.mark.parametrize("count", [tenth, pytest.param(whole, marks=pytest.mark.slow)])


@pytest.fixture
def folder():
    """A folder in memory where there is one: what is simulated here needs no real disk."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as name:
        yield Path(name)


class TestKills:
    @columns(20, 200)
    def test_killed_while_filling(self, tmp_path, count):
        """Kill -9 at any instant: the file opens, reported rows are there, and no row is wrong."""
        found = torture.kill_fills(tmp_path, count, random.Random(0))
        assert found["kills"] == count
        assert found["kills within a fill"] > count / 5  # or the kills said nothing
        assert found["reported rows"] > 0

    @columns(4, 200)
    def test_killed_while_correcting(self, tmp_path, count):
        """Kill -9 while one field of rows is rewritten in place: no row mixes two states, for a reader either."""
        found = torture.kill_corrections(tmp_path, count, random.Random(0))
        assert found["corrected rows"]

    @columns(20, 200)
    def test_killed_while_creating(self, tmp_path, count):
        """Kill -9 at any instant: a whole file at the final name or none, and the next creation leaves nothing else."""
        found = torture.kill_creations(tmp_path, count, random.Random(0))
        assert found["kills"] == count

    @pytest.mark.parametrize("seconds", [0, pytest.param(60, marks=pytest.mark.slow)])
    def test_fillers_and_readers(self, tmp_path, seconds):
        """16 readers and 4 fillers, fillers killed: no row wrong, none written twice, none missing, nobody waits."""
        found = torture.fillers_and_readers(tmp_path, seconds, random.Random(0))
        assert found["fillers killed"] > 0
        assert found["rows written"] == 2000 * found["files"]


class TestFaults:
    def test_every_call_fails_once(self, folder):
        """Whichever system call fails: an exception of ours, a valid file, no leftovers, and it can be made up for."""
        found = faults.failing_calls(folder)
        assert set(found) == set(faults.CALLS)
        assert sum(found.values()) > 150

    @columns(500, 5000)
    def test_power_cuts(self, folder, count):
        """Unsynced sectors dropped, reordered and torn: no wrong row, no acknowledged one lost."""
        found = powercuts.power_cuts(folder, count, random.Random(0))
        assert found["states"] == count
        assert found["corrupt"] > count / 10  # cuts that tore a row, all detected
        assert found["right"] > count

    def test_the_simulator_finds_a_missing_sync(self, folder, monkeypatch):
        """Without fdatasync acknowledged rows are lost, and the simulator says so."""
        monkeypatch.setattr(System, "fdatasync", lambda self, fd: None)
        monkeypatch.setitem(powercuts.Disk._RULES, "fdatasync", lambda *_: None)
        with pytest.raises(AssertionError, match="acknowledged"):
            powercuts.power_cuts(folder, 500, random.Random(0))

    def test_the_simulator_finds_a_missing_checksum(self, folder, monkeypatch):
        """Without checksums torn rows are handed out, and the simulator says so."""
        monkeypatch.setattr(
            HDF5Store, "_take_checked", lambda _, index, made: [one.take(0, len(index)) for one in made]
        )
        with pytest.raises(AssertionError, match="what nobody wrote"):
            powercuts.power_cuts(folder, 500, random.Random(0))

    def test_the_simulator_finds_an_unsynced_name(self, folder, monkeypatch):
        """Without an fsync of the folder a created file may be gone, and the simulator says so."""
        monkeypatch.setattr("cachefreeze.stores.creation._sync_folder", lambda _: None)
        with pytest.raises(AssertionError, match="the file is gone"):
            powercuts.power_cuts(folder, 500, random.Random(0))


class TestDamage:
    @columns(100, 1000)
    def test_bit_flips(self, folder, count):
        """One flipped bit anywhere is found; in the table or the data it costs one row and no other."""
        assert hostile.bit_flips(folder, count, random.Random(0)) == dict.fromkeys(
            ("header", "metadata", "table", "data"), count
        )

    def test_sizes(self, folder):
        """A file that was cut, or grew, by any number of sectors is refused."""
        found = hostile.sizes(folder)
        assert found["cut"] > 300
        assert found["grown"] > 300

    @columns(1000, 10_000)
    def test_malformed_headers(self, folder, count):
        """Whatever a header with a valid CRC says: our own errors only, within 0.1 s and 64 MiB."""
        found = hostile.malformed_headers(folder, count, random.Random(0))
        assert found["refused"] + found["as good"] == 2 * count
        assert found["refused"] > count


@contextmanager
def small_disk(folder, megabytes, kind="tmpfs"):
    """Mount a file system of a few megabytes over ``folder``, where that is permitted."""
    image = folder.with_name("image")
    if kind == "tmpfs":
        mounted = not run_as_root("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder)
    else:
        image.write_bytes(bytes(megabytes << 20))
        made = not run_as_root("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", image)
        mounted = made and not run_as_root("mount", "-o", "loop", image, folder)
    if not mounted:
        pytest.skip(f"no {kind} can be mounted here; test_limit_on_file_size covers part of this")
    try:
        shutil.rmtree(folder / "lost+found", ignore_errors=True)
        yield
    finally:
        run_as_root("umount", "-l", folder)
        image.unlink(missing_ok=True)


def run_as_root(*command):
    """Exit status of a command that needs root; not 0 where this process is not, or there is no such command."""
    if os.geteuid() != 0 or shutil.which(command[0]) is None:
        return 1
    return subprocess.run(command, capture_output=True, check=False).returncode


def taking_space(folder):
    """Take all the space that there is and give it back, again and again."""
    taken = folder / "taken"
    while True:
        with suppress(OSError), taken.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        taken.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4 on a loop device"])
class TestFullDisk:
    @columns(2, 10)
    def test_at_creation(self, tmp_path, kind, count):
        """No room: an error with the bytes needed and free, before anything is computed, and no leftover."""
        (folder := tmp_path / "disk").mkdir()
        with small_disk(folder, 2, kind):
            for at in range(count):
                with pytest.raises(StoreSpaceError, match=r"needs [\d,]+ bytes, [\d,]+ are free: free some space"):
                    HDF5Store.create(folder / f"{at}.h5", one_field((1 << 10,), rows=1 << 10), fingerprint={})
                assert not list(folder.iterdir())

    def test_filled_by_another_process(self, tmp_path, monkeypatch, kind):
        """While another process takes the space between the check and the allocation: the same error, no leftover."""
        (folder := tmp_path / "disk").mkdir()
        with small_disk(folder, 4, kind):
            real = System.fallocate

            def taken(self, fd, size_bytes):
                (folder / "other").write_bytes(bytes(3 << 20))
                real(self, fd, size_bytes)

            monkeypatch.setattr(System, "fallocate", taken)
            with pytest.raises(StoreSpaceError, match=r"needs [\d,]+ bytes, [\d,]+ are free"):
                HDF5Store.create(folder / "rows.h5", one_field((1 << 10,), rows=500), fingerprint={})
            assert [path.name for path in folder.iterdir()] == ["other"]

    @columns(3, 100)
    def test_while_another_process_fills_the_disk(self, tmp_path, kind, count):
        """At whatever instant the space is gone: a whole file whose rows all fit, or the error and nothing."""
        (folder := tmp_path / "disk").mkdir()
        with small_disk(folder, 4, kind):
            truth, path = Truth(torture_spec(400)), folder / "rows.h5"
            everything = torch.arange(400)
            other = torture.forked(partial(taking_space, folder))
            try:
                outcomes = Counter()
                for at in range(20 * count):
                    time.sleep(0.003 * (at % 3))
                    try:
                        store = HDF5Store.create(path, truth.spec, fingerprint={})
                    except StoreSpaceError as error:
                        assert re.search(r"needs [\d,]+ bytes, [\d,]+ are free", str(error))  # noqa: PT017 - either may come
                        left = {found.name for found in folder.iterdir()} - {"taken"}
                        assert not left
                        outcomes["refused"] += 1
                    else:
                        store.write(everything, truth.batch(everything))
                        store.commit()
                        judge(store, truth, [{0}] * 400)
                        store.close()
                        remove_cache(path)
                        outcomes["filled"] += 1
                    if min(outcomes["refused"], outcomes["filled"]) >= count:
                        break
            finally:
                torture.killed(other)
            assert outcomes["refused"]

    def test_during_a_fill(self, tmp_path, kind):
        """Once a file is there its rows have their space, whatever else fills the disk."""
        (folder := tmp_path / "disk").mkdir()
        with small_disk(folder, 4, kind):
            truth = Truth(torture_spec(400))
            store = HDF5Store.create(folder / "rows.h5", truth.spec, fingerprint={})
            with pytest.raises(OSError, match="No space"):
                (folder / "other").write_bytes(bytes(8 << 20))
            everything = torch.arange(400)
            store.write(everything, truth.batch(everything))
            store.commit()
            judge(store, truth, [{0}] * 400)
            store.close()


SECRET = b"the private key of somebody else".ljust(64, b"!")


def external(file, folder):
    (folder / "secret.bin").write_bytes(SECRET)
    file.create_dataset("activation.0", (4, 16), "u1", external=[(str(folder / "secret.bin"), 0, 64)])


def virtual(file, folder):
    with h5py.File(folder / "secret.h5", "w") as other:
        other["x"] = np.frombuffer(SECRET, "u1").reshape(4, 16)
    layout = h5py.VirtualLayout((4, 16), "u1")
    layout[:] = h5py.VirtualSource(str(folder / "secret.h5"), "x", (4, 16))
    file.create_virtual_dataset("activation.0", layout)


def external_link(file, folder):
    with h5py.File(folder / "secret.h5", "w") as other:
        other["x"] = np.frombuffer(SECRET, "u1").reshape(4, 16)
    file["activation.0"] = h5py.ExternalLink(str(folder / "secret.h5"), "x")


def soft_link(file, folder):
    file["elsewhere"] = np.zeros((4, 16), "u1")
    file["activation.0"] = h5py.SoftLink("/elsewhere")


def decompression_bomb(file, folder):
    file.create_dataset("activation.0", (1 << 30, 16), "u1", chunks=(1 << 20, 16), compression="gzip")[0] = 1


def shape_bomb(file, folder):
    file.create_dataset("activation.0", (1 << 60, 1), "u1", chunks=(1 << 10, 1))


HOSTILE = [external, virtual, external_link, soft_link, decompression_bomb, shape_bomb]


@pytest.mark.parametrize("kind", HOSTILE)
class TestHostileHDF5:
    """Whatever libhdf5 would do with a file, it is not asked."""

    def made(self, kind, folder):
        path = folder / "hostile.h5"
        with h5py.File(path, "w", libver="latest", userblock_size=HEADER_BYTES) as file:
            kind(file, folder)
        return path

    def test_without_our_header(self, tmp_path, kind):
        """It is no cache file."""
        with pytest.raises(CorruptStoreError, match="wrong magic"):
            HDF5Store.open(self.made(kind, tmp_path))

    def test_with_the_header_of_a_good_file(self, tmp_path, kind):
        """Its HDF5 metadata is not what that header vouches for."""
        truth = Truth(torture_spec(8))
        hostile.full_file(tmp_path / "good.h5", truth)
        good = (tmp_path / "good.h5").read_bytes()
        path = self.made(kind, tmp_path)
        raw = (good[:HEADER_BYTES] + path.read_bytes()[HEADER_BYTES:])[: len(good)].ljust(len(good), b"\0")
        path.write_bytes(raw)
        with pytest.raises(CorruptStoreError, match="metadata is damaged"):
            HDF5Store.open(path)

    def test_with_a_forged_header(self, tmp_path, kind):
        """A header that vouches for it gets at nothing but the file's own bytes."""
        spec = one_field((16,), torch.uint8, rows=4)
        layout = hostile.full_file(tmp_path / "good.h5", Truth(spec))
        path = self.made(kind, tmp_path)
        raw = bytearray(path.read_bytes())
        raw.extend(bytes(-len(raw) % 4096))
        start = len(raw)
        raw.extend(bytes(8192))
        forged = replace(layout, offsets={"activation.0": start}, commit_offset=start + 4096, file_bytes=len(raw))
        raw[start + 4096 :][:64] = b"\1" * 64
        records = b"".join(struct.pack("<QII", 0, row + 1, 1) for row in range(4))
        raw[start + 4096 : start + 4096 + 64] = records
        digest = metadata_sha256(forged.gaps, lambda offset, size: bytes(raw[offset : offset + size]))
        raw[:HEADER_BYTES] = encode(replace(forged, metadata_sha256=digest))
        path.write_bytes(raw)
        if kind in (external, virtual, external_link):
            with h5py.File(path) as file:
                assert file["activation.0"][()].tobytes() == SECRET  # what a reader that asks libhdf5 hands out
        store = HDF5Store.open(path, writable=False, verify="never")
        assert store.read(torch.arange(4))["activation.0"].eq(0).all()


def test_libhdf5_opens_what_a_filler_holds_open(tmp_path):
    """A cache is plain HDF5 to h5py and h5dump, also while it is being filled."""
    truth = Truth(torture_spec(8))
    hostile.full_file(tmp_path / "rows.h5", truth)
    store = HDF5Store.open(tmp_path / "rows.h5")
    assert store.writable
    with h5py.File(tmp_path / "rows.h5") as file:
        assert {name: file[name].shape for name in file} == {
            "activation.0": (8, 173), "activation.1": (truth.spec.fields[1].lengths.total, 5),
            "commit": (8,), "field.1": (8,), "lengths.activation.1": (8,),
        }  # fmt: skip
    if shutil.which("h5dump"):
        shown = subprocess.run(["h5dump", "-H", tmp_path / "rows.h5"], capture_output=True, text=True, check=True)
        assert 'DATASET "lengths.activation.1"' in shown.stdout


class Stored(Dataset):
    """A dataset that reads its items from a store, as workers do."""

    def __init__(self, store):
        self.store = store

    def __len__(self):
        return self.store.spec.rows

    def __getitem__(self, row):
        return self.store.read(rows_of(row))["activation.0"][0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes")  # more than there are processors
@pytest.mark.parametrize("workers", [0, 1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_workers_read_what_one_process_reads(tmp_path, start, workers, io):
    """Readers in DataLoader workers, however they are started, get the rows and leave the file to its fillers."""
    if not workers and start != "fork":
        pytest.skip("no worker, so none is started")
    if start != "fork" and io == "pread" and workers == 1:
        pytest.skip("one start of an interpreter is enough by default")
    spec = one_field((5,), rows=24)
    store = HDF5Store.create(tmp_path / "rows.h5", spec, fingerprint={}, io=io)
    everything = torch.arange(24)
    store.write(everything, values(spec, everything))
    loader = DataLoader(Stored(store), 6, num_workers=workers, multiprocessing_context=start if workers else None)
    assert torch.equal(torch.cat(list(loader)), values(spec, everything)["activation.0"])
    assert store.writable
    store.write(rows_of(3), values(spec, rows_of(3), seed=1))
    store.close()
    assert HDF5Store.open(tmp_path / "rows.h5").writable


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_read_only_media(tmp_path, io):
    """From a file system that is mounted read-only a cache is read, by root too, and nothing is tried beside it."""
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs none {tmp_path} 2>/dev/null"):
        pytest.skip("cannot mount a file system")
    try:
        truth = Truth(torture_spec(8))
        hostile.full_file(tmp_path / "rows.h5", truth)
        lock_path(tmp_path / "rows.h5").unlink()
        assert not os.system(f"mount -o remount,ro {tmp_path}")
        store = HDF5Store.open(tmp_path / "rows.h5", io=io)
        assert not store.writable
        judge(store, truth, [{0}] * 8)
        assert read_header(tmp_path / "rows.h5").count == 8
        with pytest.raises(StoreError, match="Read-only file system; use a folder"):
            HDF5Store.create(tmp_path / "more.h5", truth.spec, fingerprint={})
        store.close()
    finally:
        os.system(f"umount -l {tmp_path}")


def test_judges_find_a_wrong_row(tmp_path):
    """The judge of all these tests condemns a wrong row whose checksum is right, and a missing one."""
    truth = Truth(torture_spec(8), seeds=2)
    path = tmp_path / "rows.h5"
    hostile.full_file(path, truth)
    judge_file(path, truth, [{0}] * 8)
    with pytest.raises(AssertionError, match="row 0 carries"):
        judge_file(path, truth, [{1, None}, *[{0}] * 7])
    store = HDF5Store.open(path)
    store.forget(rows_of(2))
    with pytest.raises(AssertionError, match="row 2 is absent"):
        judge(store, truth, [{0}] * 8)


def test_the_threat_model_names_tests_that_exist():
    """A page that says which test shows a promise is itself a promise."""
    tests = Path(__file__).parent
    page = (tests.parent / "docs" / "threat-model.md").read_text()
    shown = {
        name
        for row in re.findall(r"^\|.*\| (.*) \|$", page, re.MULTILINE)
        for name in re.findall(r"`(\w+(?:\.py)?)`", row)
    }
    assert len(shown) > 12
    code = "".join(path.read_text() for path in tests.glob("test_*.py"))
    for name in shown:
        assert (tests / name).exists() or re.search(rf"(def|class) {name}\b", code), name
