"""Which store holds a loader's rows: what each way of naming one opens, and what is refused."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from cachefreeze.errors import StaleCacheError, StoreError, StoreSpaceError, UsageError
from cachefreeze.stores import HDF5Store, HostStore, opening
from cachefreeze.stores.creation import lock_path
from cachefreeze.stores.locks import FileLock
from cachefreeze.stores.opening import Wanted, for_another, open_store
from cachefreeze.testing.specs import one_field, one_ragged

WANTED = Wanted(
    spec=one_field(), name="train", boundary="layer4.0", fingerprint={"weights": "abc"}, attributes={},
    device=torch.device("cpu"),
)  # fmt: skip


@pytest.mark.parametrize(("where", "tier"), [("host", "host"), ("device", "device"), ("auto", "host")])
def test_tiers_by_name(where, tier):
    assert open_store(where, WANTED).tier == tier


@pytest.mark.parametrize("where", ["tape", "hdf5", "hdf5:", "host:DIR", "device:0", ""])
def test_other_names_are_refused(where):
    with pytest.raises(UsageError, match="expected 'auto', 'device', 'host', 'hdf5:DIR'"):
        open_store(where, WANTED)


def test_a_store_that_is_there(tmp_path):
    """It is taken as it is, if it holds rows of that kind."""
    store = HostStore(one_field())
    assert open_store(store, WANTED) is store
    with pytest.raises(StaleCacheError, match=r"activation.0 \(0..7, 3\) float32.* needed are .*\(2, 3\) float32"):
        open_store(HostStore(one_ragged()), WANTED)


def test_auto_takes_the_fastest_that_fits(tmp_path, monkeypatch):
    """The device while its share has room, with RAM for what has none there, then RAM, then the folder, then none."""
    nbytes = WANTED.spec.nbytes
    cuda = replace(WANTED, device=torch.device("meta"))
    monkeypatch.setattr(opening, "free_device_bytes", lambda device: 4 * nbytes)
    assert open_store("auto", cuda).tier == "device"
    monkeypatch.setattr(opening, "free_device_bytes", lambda device: 4 * nbytes - 1)
    assert [part.tier for part in open_store("auto", cuda).tiers] == ["device", "host"]
    for nothing_to_speak_of in (0, 4):
        monkeypatch.setattr(opening, "free_device_bytes", lambda device, free=nothing_to_speak_of: free)
        assert open_store("auto", cuda).tier == "host"
    monkeypatch.setattr(opening, "free_host_bytes", lambda: 2 * nbytes)
    assert open_store("auto", WANTED).tier == "host"
    monkeypatch.setattr(opening, "free_host_bytes", lambda: 2 * nbytes - 1)
    assert open_store(f"auto:{tmp_path}", WANTED).tier == "hdf5"
    with pytest.raises(StoreSpaceError, match=f"12 rows need {nbytes:,} bytes.*half of the {2 * nbytes - 1:,} free"):
        open_store("auto", WANTED)
    monkeypatch.setattr(opening, "free_host_bytes", lambda: None)
    assert open_store("auto", WANTED).tier == "host"


def test_auto_makes_no_folder_that_it_does_not_need(tmp_path):
    """Where memory has room, the disk is not asked: the folder need not even be possible."""
    (tmp_path / "file").touch()
    assert open_store(f"auto:{tmp_path / 'file' / 'folder'}", WANTED).tier == "host"
    assert open_store(f"auto:{tmp_path / 'folder'}", WANTED).tier == "host"
    assert not (tmp_path / "folder").exists()


def test_folders_and_files(tmp_path, caplog):
    """A folder gets a file per fingerprint, and a miss says why; a file that was named is that file or an error."""
    open_store(f"hdf5:{tmp_path / 'new' / 'folder'}", WANTED).close()
    (path,) = (tmp_path / "new" / "folder").glob("train-layer4.0-????????????.h5")
    again = open_store(f"hdf5:{path.parent}", WANTED)
    assert again.path == path
    again.close()
    other = replace(WANTED, fingerprint={"weights": "xyz"})
    open_store(f"hdf5:{path.parent}", other).close()
    assert f"{path.name} is not reused, these differ: weights: abc -> xyz" in caplog.text
    with pytest.raises(StaleCacheError, match=r"made for something else \(weights: abc -> xyz\)"):
        open_store(f"hdf5:{path}", other)
    with pytest.raises(StaleCacheError, match=r"made for something else \(12 rows .* -> 12 rows"):
        open_store(f"hdf5:{path}", replace(WANTED, spec=one_ragged()))
    named = open_store(f"hdf5:{tmp_path / 'mine.h5'}", WANTED)
    assert named.path == tmp_path / "mine.h5"
    named.close()


def test_a_damaged_neighbour_explains_nothing(tmp_path, caplog):
    """A miss beside a file that does not open is a miss all the same."""
    (tmp_path / "train-layer4.0-0123456789ab.h5").write_bytes(b"damaged")
    open_store(f"hdf5:{tmp_path}", WANTED).close()
    assert "not reused" not in caplog.text


def test_a_neighbour_that_vanishes(tmp_path):
    """Another process may clean the folder at any time: what is listed there need not be there any more."""
    (tmp_path / "train-layer4.0-0123456789ab.h5").symlink_to(tmp_path / "gone")
    open_store(f"hdf5:{tmp_path}", WANTED).close()


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(StoreError, match=r"cannot make the cache folder .*File name too long; give another one"):
        open_store(f"hdf5:{tmp_path / ('d' * 300)}", WANTED)


def test_a_loader_name_that_is_too_long(tmp_path):
    """Said before a file is made of it; what makes a file name that every file system takes is kept."""
    with pytest.raises(UsageError, match=r"name='n{20}…'.* 309 characters .*expected 200 at most.*shorter name="):
        open_store(f"hdf5:{tmp_path}", replace(WANTED, name="n" * 300))
    assert list(tmp_path.iterdir()) == []
    wanted = replace(WANTED, name="n" * (200 - len("-layer4.0")))
    open_store(f"hdf5:{tmp_path}", wanted).close()
    open_store(f"hdf5:{tmp_path}", wanted).close()
    assert len(list(tmp_path.glob("*.h5"))) == 1


def test_a_path_is_no_tier(tmp_path):
    with pytest.raises(UsageError, match=r"store=PosixPath.*expected 'auto', 'device', 'host', 'hdf5:DIR'"):
        open_store(tmp_path, WANTED)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot make the cache folder .*Not a directory; give another one"):
        open_store(f"hdf5:{tmp_path / 'file' / 'folder'}", WANTED)


def test_another_process_makes_it_first(tmp_path, monkeypatch):
    """The loser of a race opens the winner's file."""
    create = HDF5Store.create

    def late(path, spec, **options):
        create(path, spec, **options).close()
        raise StoreError("another process has just created it")

    monkeypatch.setattr(HDF5Store, "create", late)
    assert open_store(f"hdf5:{tmp_path}", WANTED).writable


def test_a_creator_is_waited_for(tmp_path, monkeypatch):
    """While another process holds the lock of a file that is not there yet; not for ever."""
    path = tmp_path / "mine.h5"
    creator = FileLock.take(lock_path(path), os.O_CREAT)
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            creator.release(unlink=True)

    monkeypatch.setattr(opening.time, "sleep", sleep)
    open_store(f"hdf5:{path}", WANTED).close()
    assert len(waits) == 2
    path.unlink()
    creator = FileLock.take(lock_path(path), os.O_CREAT)
    monkeypatch.setattr(opening, "_CREATION_SECONDS", -1.0)
    with pytest.raises(StoreError, match="another process is creating or removing"):
        open_store(f"hdf5:{path}", WANTED)
    creator.release()


def test_what_does_not_fit_is_not_waited_for(tmp_path):
    with pytest.raises(StoreSpaceError, match="are free"):
        open_store(f"hdf5:{tmp_path}", replace(WANTED, spec=one_field((10**6,), rows=10**9)))


@pytest.mark.parametrize("where", ["auto", "host", "hdf5:folder"])
def test_the_same_again_for_another_loader(where):
    assert for_another(where) == where


def test_a_file_serves_one_loader(tmp_path):
    """Another one gets a file of its own in the same folder, or the same tier."""
    assert for_another(f"hdf5:{tmp_path / 'mine.h5'}") == f"hdf5:{tmp_path}"
    assert for_another(HostStore(one_field())) == "host"
    store = HDF5Store.create(tmp_path / "mine.h5", one_field(), fingerprint={})
    assert for_another(store) == f"hdf5:{tmp_path}"
