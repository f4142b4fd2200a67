"""``info``, ``verify`` and ``clean`` over folders of caches: what is listed, what goes, what stays."""

from __future__ import annotations

import os
import time

import pytest
import torch

from cachefreeze.cli import clean, main
from cachefreeze.stores import HDF5Store
from cachefreeze.testing.specs import one_field, one_ragged, rows_of, values

DAY = 86400


@pytest.fixture
def folder(tmp_path):
    """Four caches of 1, 2, 3 and 4 days, and a file that is none."""
    for days in (1, 2, 3, 4):
        store = HDF5Store.create(
            tmp_path / f"c{days}.h5", one_ragged(), fingerprint={"weights": "abc"},
            attributes={"model": "Net\x1b[31m", "boundary": f"layer{days}"},
        )  # fmt: skip
        store.write(rows_of(2, 5, 6)[:days], values(store.spec, rows_of(2, 5, 6)[:days]))
        store.close()
        os.utime(tmp_path / f"c{days}.h5", (time.time() - days * DAY,) * 2)
    (tmp_path / "notes.h5").write_text("not ours")
    return tmp_path


def run(capfd, *words):
    try:
        status = main([str(word) for word in words])
    except SystemExit as error:
        status = error.code
    out, err = capfd.readouterr()
    return status, out, err


def caches(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".h5")


def test_info_lists_a_folder(capfd, folder):
    """Model, boundary, rows, size and age of each; of another file why it is none; nothing that a terminal obeys."""
    status, out, _ = run(capfd, "info", folder)
    assert status == 0
    assert "c2.h5: Net?[31m at layer2, 2/12 rows, " in out
    assert " kB, made 20" in out
    assert "seconds ago)" in out
    assert "activation.0 (0..7, 3) float32" in out
    assert "notes.h5: " in out
    assert "\x1b" not in out


def test_clean_removes_caches_only(capfd, folder):
    status, out, _ = run(capfd, "clean", folder)
    assert status == 0
    assert "4 caches removed" in out
    assert "kept notes.h5: " in out
    assert [path.name for path in folder.iterdir()] == ["notes.h5"]


def test_two_may_clean_at_once(capfd, folder, monkeypatch):
    """What is gone by the time that it is looked at is nobody's mistake."""
    look = clean.in_use

    def gone(path):
        used = look(path)
        if path.name == "c2.h5":
            path.unlink()
        return used

    monkeypatch.setattr(clean, "in_use", gone)
    status, out, _ = run(capfd, "clean", folder)
    assert status == 0
    assert "3 caches removed" in out


def test_a_dry_run_removes_nothing(capfd, folder):
    """It names what a run would remove, the longest unwritten first."""
    before = sorted(folder.iterdir())
    status, out, _ = run(capfd, "clean", folder, "--dry-run")
    assert status == 0
    assert [line.split(",")[0] for line in out.splitlines()[1:-1]] == [f"would remove c{d}.h5" for d in (4, 3, 2, 1)]
    assert "4 caches would be removed" in out
    assert sorted(folder.iterdir()) == before


def test_clean_by_age(capfd, folder):
    assert run(capfd, "clean", folder, "--older-than", 2.5)[0] == 0
    assert caches(folder) == ["c1.h5", "c2.h5", "notes.h5"]


@pytest.mark.parametrize(("files", "left"), [(4, [1, 2, 3, 4]), (2.5, [1, 2]), (1, [1]), (0, [])])
def test_clean_by_size(capfd, folder, files, left):
    """The longest unwritten go, until what is left is small enough."""
    one = (folder / "c1.h5").stat().st_size
    assert run(capfd, "clean", folder, "--max-bytes", f"{files * one / 1000}kB")[0] == 0
    assert caches(folder) == [*(f"c{days}.h5" for days in left), "notes.h5"]


def test_clean_by_age_and_size(capfd, folder):
    """Only what is old enough goes, also where more would have to go."""
    assert run(capfd, "clean", folder, "--max-bytes", 0, "--older-than", 3.5)[0] == 0
    assert caches(folder) == ["c1.h5", "c2.h5", "c3.h5", "notes.h5"]


def test_clean_leaves_what_is_in_use(capfd, folder):
    """A cache that a process has open to fill stays, and counts towards the size; a dry run says so too."""
    store = HDF5Store.open(folder / "c4.h5")
    one = (folder / "c1.h5").stat().st_size
    for words in (["--dry-run"], []):
        status, out, _ = run(capfd, "clean", folder, "--max-bytes", f"{2.5 * one / 1000}kB", *words)
        assert status == 0
        assert "kept c4.h5: a process has it open" in out
    assert caches(folder) == ["c1.h5", "c4.h5", "notes.h5"]
    status, _, err = run(capfd, "clean", folder / "c4.h5")
    assert status == 2
    assert "is in use by another process" in err
    store.write(rows_of(0), values(store.spec, rows_of(0)))
    assert torch.equal(store.present(rows_of(0)), torch.tensor([True]))
    store.close()
    assert run(capfd, "clean", folder / "c4.h5")[0] == 0


def test_clean_removes_damaged_caches(capfd, folder):
    """What begins like a cache file is one, although it does not open."""
    with (folder / "c1.h5").open("r+b") as file:
        file.truncate(100)
    assert run(capfd, "clean", folder)[0] == 0
    assert caches(folder) == ["notes.h5"]


def test_clean_refuses_to_remove_another_file(capfd, folder):
    status, _, err = run(capfd, "clean", folder / "notes.h5")
    assert status == 2
    assert "is no cache file" in err
    assert (folder / "notes.h5").exists()


@pytest.mark.parametrize("words", [("--max-bytes", "much"), ("--max-bytes", "-1GB"), ("--older-than", "0")])
def test_clean_names_what_it_cannot_read(capfd, folder, words):
    before = sorted(folder.iterdir())
    status, _, err = run(capfd, "clean", folder, *words)
    assert status == 2
    assert words[0] in err
    assert sorted(folder.iterdir()) == before


def test_verify_names_rows(capfd, tmp_path):
    """A damaged row is named, with the datasets that may hold the damage; exit status 1."""
    store = HDF5Store.create(tmp_path / "rows.h5", one_field(), fingerprint={})
    store.write(torch.arange(12), values(store.spec, torch.arange(12)))
    store.close()
    assert run(capfd, "verify", tmp_path)[0] == 0
    raw = bytearray((tmp_path / "rows.h5").read_bytes())
    at = raw.index(values(store.spec, rows_of(5))["activation.0"].numpy().tobytes())
    raw[at] ^= 1
    (tmp_path / "rows.h5").write_bytes(raw)
    status, out, _ = run(capfd, "verify", tmp_path)
    assert status == 1
    assert "dataset activation.0, row 5" in out
