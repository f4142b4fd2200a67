"""The command line as a user meets it: real runs, exit statuses, one readable line for every mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import h5py
import pytest
import torch
from safetensors.torch import load_file, save_file

from cachefreeze.cli import main

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.usefixtures("pretrained_once")


def run(capfd, *words):
    """Exit status, stdout and stderr of one command in this process."""
    try:
        status = main([str(word) for word in words])
    except SystemExit as error:
        status = error.code
    out, err = capfd.readouterr()
    return status, out, err


def losses(report):
    return [(e["train_loss"], e["val_loss"], e["val_accuracy"]) for e in report["epochs"]]


def read(path):
    return json.loads(path.read_text())


def test_train_without_arguments(capfd, tmp_path, monkeypatch):
    """The first README command: digits, fill then cached, above 95 %."""
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capfd, "train")
    assert (status, err) == (0, "")
    report = read(tmp_path / "runs" / "digits-digits_cnn" / "report.json")
    assert [e["source"] for e in report["epochs"]] == ["fill"] + ["cached"] * 9
    assert report["epochs"][-1]["val_accuracy"] > 0.95
    assert report["data"] == "digits"
    assert report["total_seconds"] > sum(e["seconds"] for e in report["epochs"])
    assert out.count("cached") >= 18
    assert "validation accuracy 9" in out


def test_every_cache_gives_the_same_figures(capfd, tmp_path):
    reports, states = [], []
    for cache in ("off", "host", "hdf5", "auto"):
        out = tmp_path / cache
        assert run(capfd, "train", "--epochs", 3, "--cache", cache, "--out", out)[0] == 0
        reports.append(read(out / "report.json"))
        states.append(load_file(out / "model.safetensors"))
    assert all(losses(report) == losses(reports[0]) for report in reports)
    for state in states:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())
    assert [report["store"] for report in reports[:3]] == ["off", "host", "hdf5"]
    assert reports[3]["store"] in ("host", "off"), "in three epochs of a tiny model it is measured which is faster"
    assert [e["source"] for e in reports[0]["epochs"]] == ["frozen"] * 3


def test_variants(capfd, tmp_path):
    """Two draws of every digit, each filled in the epoch that needs it first; a fill makes all of them."""
    words = ("--variants", 2, "--cache", "hdf5", "--cache-dir", tmp_path / "cache", "--out", tmp_path / "out")
    status, _, err = run(capfd, "train", "--epochs", 4, *words)
    assert (status, err) == (0, "")
    report = read(tmp_path / "out" / "report.json")
    assert [e["source"] for e in report["epochs"]] == ["fill", "fill", "cached", "cached"]
    assert [e["rows_computed"] for e in report["epochs"]] == [717, 717, 0, 0]
    assert "train: 0 of 1434 rows computed" in run(capfd, "fill", *words)[1]
    again = tmp_path / "again"
    assert run(capfd, "train", "--epochs", 2, *words[:-2], "--out", again)[0] == 0
    assert run(capfd, "train", "--epochs", 4, *words[:-2], "--out", again, "--resume")[0] == 0
    assert losses(read(again / "report.json")) == losses(report), "a resumed run goes on with the same draws"
    status, _, err = run(capfd, "train", "--epochs", 4, *words[:-2], "--variants", 3, "--out", again, "--resume")
    assert status == 2
    assert "variants: 2 -> 3" in err


def test_a_second_run_reuses_the_file_and_any_change_of_weights_does_not(capfd, tmp_path, caplog):
    words = ("train", "--epochs", 2, "--cache", "hdf5", "--cache-dir", tmp_path / "cache", "--out", tmp_path / "out")
    run(capfd, *words)
    first = read(tmp_path / "out" / "report.json")
    run(capfd, *words)
    second = read(tmp_path / "out" / "report.json")
    assert [e["source"] for e in second["epochs"]] == ["cached", "cached"]
    assert [e["rows_computed"] for e in second["epochs"]] == [0, 0]
    assert losses(first) == losses(second)
    run(capfd, *words, "--seed", 1)
    assert read(tmp_path / "out" / "report.json")["epochs"][0]["source"] == "fill"
    assert "weights" in caplog.text
    assert "not reused" in caplog.text


def test_fill_then_train(capfd, tmp_path):
    place = ("--cache-dir", tmp_path / "cache", "--out", tmp_path / "out")
    status, out, err = run(capfd, "fill", *place)
    assert (status, err) == (0, "")
    assert "717 of 717 rows" in out or "718 of 718 rows" in out
    assert "0 of 7" in run(capfd, "fill", *place)[1]
    run(capfd, "train", "--epochs", 1, "--cache", "hdf5", *place)
    assert read(tmp_path / "out" / "report.json")["epochs"][0]["source"] == "cached"


def test_info_verify_clean(capfd, tmp_path):
    folder = tmp_path / "cache"
    run(capfd, "fill", "--cache-dir", folder, "--out", tmp_path / "out")
    status, out, _ = run(capfd, "info", folder)
    assert status == 0
    assert "DigitsCNN at classifier" in out
    assert run(capfd, "verify", folder)[0] == 0
    path = next(folder.glob("train-*.h5"))
    assert "fingerprint" in out or "weights:" in run(capfd, "info", path)[1]
    with h5py.File(path) as file:
        values = file["activation.0"][:]
        position = file["activation.0"].id.get_offset() + 5 * values[0].nbytes + 3
        assert len(values) == len(file["commit"]) == len(file["field.0"])
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))
    status, out, _ = run(capfd, "verify", folder)
    assert status == 1
    assert "activation.0" in out
    assert "row 5" in out
    (folder / "other.h5").write_text("not ours")
    status, out, _ = run(capfd, "clean", folder)
    assert status == 0
    assert sorted(p.name for p in folder.iterdir()) == ["other.h5"]
    assert run(capfd, "clean", folder / "other.h5")[0] == 2


@pytest.mark.parametrize("cut", [("--train-last", 2), ("--train-from", "features.1")])
def test_resume_continues(capfd, tmp_path, cut):
    whole = ("train", *cut, "--cache", "host", "--out", tmp_path / "whole")
    parts = ("train", *cut, "--cache", "host", "--out", tmp_path / "parts")
    run(capfd, *whole, "--epochs", 4)
    run(capfd, *parts, "--epochs", 2)
    assert run(capfd, *parts, "--epochs", 4, "--resume")[0] == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert losses(read(tmp_path / "whole" / "report.json")) == losses(read(tmp_path / "parts" / "report.json"))
    status, _, err = run(capfd, *parts, "--epochs", 4, "--resume", "--lr", 0.5)
    assert status == 2
    assert "lr" in err


def make_folder(tmp_path, size=40, count=3, classes=("a", "b")):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for name in classes:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 255, (size, size, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return tmp_path


def small(folder, *more):
    return ("--data", folder, "--model", "squeezenet1_1", "--image-size", 32, "--out", folder / "out", *more)


def test_an_image_folder(capfd, tmp_path):
    data = make_folder(tmp_path / "data")
    status, out, err = run(
        capfd, "train", *small(data, "--epochs", 2, "--cache", "host", "--report", tmp_path / "r.json")
    )
    assert (status, err) == (0, "")
    assert read(tmp_path / "r.json")["epochs"][1]["source"] == "cached"
    assert "classifier" in out


def test_a_run_is_drawn(capfd, tmp_path, monkeypatch):
    """Beside the report; without anything to draw with that is said before anything is trained."""
    pytest.importorskip("matplotlib")
    data, picture = make_folder(tmp_path / "data"), tmp_path / "made" / "run.png"
    words = ("train", *small(data, "--epochs", 2, "--cache", "host", "--plot", picture))
    assert run(capfd, *words)[::2] == (0, "")
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = run(capfd, *words)
    assert (status, out) == (2, "")
    assert "matplotlib" in err


def test_a_folder_in_which_single_images_change(capfd, tmp_path, caplog):
    """One that moved to another class is not computed again, an edited one alone is; the figures are a new cache's."""
    data, cache = make_folder(tmp_path / "data", count=12), tmp_path / "cache"
    report = tmp_path / "r.json"
    words = ("train", *small(data, "--epochs", 1, "--cache", "hdf5", "--cache-dir", cache, "--report", report))

    def first_epoch():
        caplog.clear()
        assert run(capfd, *words)[0] == 0
        assert len(list(cache.glob("train-*.h5"))) == 1
        epoch = read(report)["epochs"][0]
        return epoch["source"], epoch["rows_computed"], epoch["rows_repaired"], epoch["rows_rewritten"]

    assert first_epoch() == ("fill", 24, 0, 0)
    (data / "train" / "a" / "7.png").rename(data / "train" / "b" / "7moved.png")
    source, computed, repaired, rewritten = first_epoch()
    assert (source, computed, repaired) == ("cached", 0, 0)
    assert rewritten > 1  # that image, and all that follow it in the order of the folder
    assert "rows moved, 0 to be computed again" in caplog.text
    (data / "train" / "b" / "3.png").write_bytes((data / "val" / "a" / "1.png").read_bytes())
    assert first_epoch() == ("fill", 1, 1, 0)
    assert "1 to be computed again" in caplog.text
    found = losses(read(report))
    assert run(capfd, *words, "--cache-dir", tmp_path / "fresh")[0] == 0
    for (loss, *_), (fresh, *_) in zip(found, losses(read(report)), strict=True):
        assert loss == pytest.approx(fresh, rel=1e-5)  # the row computed anew was in another batch


def test_kill_in_the_middle_of_a_fill(tmp_path):
    """The same command again goes on with the rows that are there and ends in the same weights."""
    data = make_folder(tmp_path / "data", count=60)
    words = ("train", "--data", data, "--model", "squeezenet1_1", "--image-size", 64, "--train-from", "features.9")
    words += ("--epochs", "2", "--batch-size", "8", "--cache", "hdf5")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name):
        command = [sys.executable, "-m", "cachefreeze.cli", *map(str, words), "--out", str(tmp_path / name)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    whole = start("whole")
    whole.communicate()
    assert whole.returncode == 0
    killed = start("killed")
    cache = tmp_path / "killed" / "cache"
    deadline = time.monotonic() + 200  # to import, on a machine that does much else
    while time.monotonic() < deadline and killed.poll() is None:
        found = list(cache.glob("train-*.h5")) if cache.is_dir() else []
        if found and rows_in(found[0]) >= 16:
            break
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "it ended before it could be killed"
    again = start("killed")
    _, err = again.communicate()
    assert again.returncode == 0, err
    first = read(tmp_path / "killed" / "report.json")["epochs"][0]
    assert first["source"] == "fill"
    assert first["rows_cached"] > 0
    assert first["rows_cached"] + first["rows_computed"] == 120
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not [path for path in cache.iterdir() if path.suffix == ".tmp"]


def rows_in(path):
    from cachefreeze.errors import CacheFreezeError
    from cachefreeze.stores import read_header

    try:
        return read_header(path).count
    except CacheFreezeError:
        return 0


def truncated(folder):
    path = folder / "train" / "b" / "1.png"
    path.write_bytes(path.read_bytes()[:200])


def no_val(folder):
    (folder / "val").rename(folder / "validation")


def other_classes(folder):
    (folder / "val" / "b").rename(folder / "val" / "c")


@pytest.mark.parametrize(
    ("damage", "words"),
    [(truncated, "1.png"), (no_val, "val"), (other_classes, "classes")],
)
def test_bad_image_folders(capfd, tmp_path, damage, words):
    data = make_folder(tmp_path / "data")
    damage(data)
    for cache in ("host", "off", "hdf5"):
        status, _, err = run(capfd, "train", *small(data, "--epochs", 1, "--cache", cache))
        assert status == 2
        assert words in err
        assert len(err.strip().splitlines()) <= 2
        assert "Traceback" not in err
    assert not list(data.rglob("*.tmp"))


def misfit(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"features.0.weight": torch.zeros(1), "what.is.this": torch.zeros(2)}, path)
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (lambda _: ("train", "--model", "resnet19"), "resnet18"),
        (lambda t: ("train", "--data", t / "nowhere"), "nowhere"),
        (lambda t: ("train", "--data", t), "train/"),
        (lambda _: ("train", "--image-size", "-3"), "--image-size"),
        (lambda _: ("train", "--batch-size", "0"), "--batch-size"),
        (lambda _: ("train", "--epochs", "-1"), "--epochs"),
        (lambda _: ("train", "--epochs", "many"), "--epochs"),
        (lambda _: ("train", "--lr", "-1"), "--lr"),
        (lambda _: ("train", "--lr", "nan"), "--lr"),
        (lambda _: ("train", "--lr", "1e300"), "--lr"),
        (lambda _: ("train", "--model", "squeezenet1_1", "--image-size", "8"), "--image-size"),
        (lambda _: ("train", "--image-size", "100000000"), "--image-size"),
        (lambda _: ("train", "--seed", "-1"), "--seed"),
        (lambda _: ("train", "--train-from", "layer9"), "Blocks, in order: features.0"),
        (lambda _: ("train", "--train-last", "99"), "blocks"),
        (lambda _: ("train", "--train-last", "1", "--train-from", "classifier"), "not allowed with"),
        (lambda t: ("train", "--weights", misfit(t), "--model", "squeezenet1_1"), "what.is.this"),
        (lambda t: ("train", "--weights", t / "no.safetensors"), "no.safetensors"),
        (lambda t: ("train", "--cache", "hdf5", "--cache-dir", "/dev/null/below"), "/dev/null"),
        (lambda t: ("train", "--out", "/dev/null/below"), "/dev/null"),
        (lambda t: ("train", "--report", t), "folder"),
        (lambda t: ("train", "--plot", t), "folder"),
        (lambda _: ("train", "--cache", "device", "--device", "cpu"), "--cache host"),
        (lambda _: ("train", "--cache", "host", "--cache-dir", "x"), "--cache-dir"),
        (lambda _: ("train", "--device", "tpu9"), "--device"),
        (lambda _: ("train", "--cache", "tape"), "--cache"),
        (lambda t: ("train", "--schedule", t / "no.yaml"), "no.yaml"),
        (lambda _: ("train", "--variants", "1"), "2 or more"),
        (lambda _: ("train", "--variants", "4", "--cache", "off"), "--cache is off"),
        (lambda _: ("plan", "--plot", "x.png"), "--schedule"),
        (lambda _: ("plan", "--t0", "0.5"), "--schedule"),
        (lambda t: ("info", t / "nothing.h5"), "nothing.h5"),
        (lambda t: ("verify", t / "nothing.h5"), "nothing.h5"),
        (lambda t: ("clean", t / "nothing.h5"), "nothing.h5"),
    ],
)
def test_mistakes_are_one_readable_line(capfd, tmp_path, monkeypatch, words, expected):
    """Exit status 2, what was wrong and what to do, no traceback, nothing left behind."""
    monkeypatch.chdir(tmp_path)
    command = words(tmp_path)
    before = set(tmp_path.rglob("*"))
    status, out, err = run(capfd, *command)
    assert status == 2, out
    assert expected in err
    assert err.startswith("cachefreeze")
    assert len(err.strip().splitlines()) <= 2
    left = {p for p in set(tmp_path.rglob("*")) - before if p.is_file()}
    assert not left


def test_a_named_cache_file_of_another_model(capfd, tmp_path):
    path = tmp_path / "mine.h5"
    words = ("train", "--epochs", 1, "--cache", "hdf5", "--cache-dir", path, "--out", tmp_path / "out")
    assert run(capfd, *words)[0] == 0
    assert path.exists()
    assert run(capfd, *words)[0] == 0
    status, _, err = run(capfd, *words, "--seed", 3)
    assert status == 2
    assert "weights" in err
    assert "mine.h5" in err


def test_too_little_space(tmp_path):
    """The rows do not fit: said with both figures before anything is computed, and nothing is left."""
    data = make_folder(tmp_path / "data", count=40)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "from cachefreeze.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [str(w) for w in small(data, "--cache", "hdf5", "--train-from", "features.3", "--epochs", "1")]
    done = subprocess.run([sys.executable, "-c", code, "train", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "bytes" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert not [p for p in (data / "out" / "cache").iterdir() if p.is_file()]


def test_version_and_help(capfd):
    assert run(capfd, "--version")[0] == 0
    status, out, _ = run(capfd, "--help")
    assert status == 0
    for verb in ("train", "fill", "info", "verify", "clean"):
        assert verb in out


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.timeout(1200)  # 1,050 photos through the whole network for the run that keeps none
@pytest.mark.parametrize("boundary", ["classifier", "features.14"])
def test_flowers(capfd, tmp_path, data_dir, boundary):
    """Transfer learning on photos: above 82 %, and the same figures with every cache."""
    reports, states = [], []
    for cache in ("off", "host", "hdf5"):
        out = tmp_path / cache
        words = ("--model", "mobilenet_v2", "--weights", data_dir / "weights" / "mobilenet_v2_imagenet.safetensors")
        words += ("--train-from", boundary, "--epochs", 3, "--cache", cache, "--out", out)
        assert run(capfd, "train", "--data", data_dir / "flowers", *words)[0] == 0
        reports.append(read(out / "report.json"))
        states.append(load_file(out / "model.safetensors"))
    assert all(losses(report) == losses(reports[0]) for report in reports)
    for state in states:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())
    if boundary == "classifier":
        assert reports[0]["epochs"][-1]["val_accuracy"] > 0.8


def test_the_package_is_the_command():
    """``python -m cachefreeze`` is the command itself."""
    command = [sys.executable, "-m", "cachefreeze", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("cachefreeze ")
