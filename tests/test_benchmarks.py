"""Each benchmark runs: its smoke mode ends, and its last line is what a script reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(script: str, *arguments: str, **environment: str) -> list[str]:
    # one thread: a smoke run is about whether, not how fast, and threads that wait for each other on a busy machine
    # take seconds where one takes milliseconds
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_epoch_timings(tmp_path):
    """Every variant is there, came from where it should, and computed what the frozen one computed."""
    out = tmp_path / "results" / "digits.json"
    lines = run("epoch_timings.py", "--smoke", "--device", "cpu", "--out", str(out))
    found = json.loads(lines[-1])
    assert found == json.loads(out.read_text())
    assert {"schema", "benchmark", "config", "hardware", "versions", "load_average", "variants"} <= set(found)
    assert {"cpu", "cores", "memory_bytes", "gpu"} <= set(found["hardware"])
    variants = found["variants"]
    assert list(variants) == ["live", "frozen", "host", "hdf5", "ceiling"]
    # the first epoch of a tier is its fill, every other one is cached
    assert [row["sources"] for row in variants.values()] == [
        ["live"], ["frozen"], ["cached", "fill"], ["cached", "fill"], ["ceiling"],
    ]  # fmt: skip
    for name, row in variants.items():
        assert len(row["seconds"]) == found["config"]["rounds"], name
        assert 0 < row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"], name
        assert (row["fill_seconds"] is not None) == (name in ("host", "hdf5")), name
        assert row["to_frozen"] > 0, name
        assert row["to_ceiling"] > 0, name
    assert variants["host"]["losses_equal_frozen"]
    assert variants["hdf5"]["losses_equal_frozen"]
    assert not variants["live"]["losses_equal_frozen"]
    header = next(line for line in lines if "epoch s" in line)
    assert "fill s" in header
    assert "break-even" in header


def test_split_coverage(tmp_path):
    """Five models of three libraries: none is silently wrong, and a model that is random in eval mode is no failure."""
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    out, lines_file = tmp_path / "coverage.json", tmp_path / "coverage.jsonl"
    lines = run("split_coverage.py", "--smoke", "--out", str(out), "--resume", str(lines_file))
    found = json.loads(lines[-1])
    assert found == json.loads(out.read_text())
    models = {(row["library"], row["name"]): row for row in found["models"]}
    assert len(models) == 5
    assert {library for library, _ in models} == {"torchvision", "timm", "transformers"}
    cuts = [cut for row in models.values() for cut in row["cuts"]]
    assert {cut["status"] for cut in cuts} == {"ok", "n/a"}
    assert {cut["status"] for cut in models["transformers", "vit-mae"]["cuts"]} == {"n/a"}
    assert "random" in models["transformers", "vit-mae"]["cuts"][0]["why"]
    assert {cut["executor"] for cut in cuts if cut["status"] == "ok"} == {"fx", "replay"}
    for cut in cuts:
        assert cut["status"] != "ok" or 0 < cut["minimum_bytes"] <= 1.1 * cut["bytes"], cut
    assert all(row["split_share"] in (1.0, None) for row in found["summary"].values())
    # what is done is not run again
    assert len(lines_file.read_text().splitlines()) == 5
    assert json.loads(run("split_coverage.py", "--smoke", "--resume", str(lines_file))[-1])["models"] == found["models"]


@pytest.mark.real_data
def test_freezeout(tmp_path, data_dir):
    """Every variant of every schedule is there, and the cached one trained what the one without a cache trained."""
    out = tmp_path / "freezeout.json"
    lines = run("freezeout.py", "--smoke", "--device", "cpu", "--out", str(out), CACHEFREEZE_DATA=str(data_dir))
    found = json.loads(lines[-1])
    assert found == json.loads(out.read_text())
    assert {"schema", "benchmark", "config", "hardware", "versions", "load_average", "summary", "runs"} <= set(found)
    rows = {row["variant"]: row for row in found["summary"]}
    assert list(rows) == ["baseline", "frozen", "cached", "ceiling"]
    assert rows["cached"]["losses_equal_frozen"]
    assert not rows["baseline"]["losses_equal_frozen"]
    for timed in found["runs"]:
        assert len(timed["seconds"]) == len(timed["test_error"]) == found["config"]["epochs"]
    assert "saved" in lines[0]


def test_replay_overhead(tmp_path):
    out = tmp_path / "overhead.json"
    found = json.loads(run("replay_overhead.py", "--smoke", "--out", str(out))[-1])
    assert found == json.loads(out.read_text())
    assert all(row[f"{kind}_ms"] > 0 for row in found["cases"] for kind in ("direct", "fx", "replay"))


def test_gpu_without_cuda():
    """Where there is no CUDA, the GPU script says so in one line and succeeds."""
    lines = run("gpu.py", CUDA_VISIBLE_DEVICES="")
    assert len(lines) == 1
    assert "CUDA is not available" in lines[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_smoke():
    """With CUDA it runs the marked tests and a timing table with the device tier."""
    # not this file, which would run itself
    found = json.loads(run("gpu.py", "--smoke", "--tests", "tests/test_gpu.py")[-1])
    assert found["tests"]["exit_status"] == 0, found["tests"]
    assert "device" in found["timings"][0]["variants"]


def test_store_torture(tmp_path):
    """Every trial of the table runs, and the results file says how often."""
    out = tmp_path / "torture.json"
    lines = run("store_torture.py", "--smoke", "--out", str(out))
    found = json.loads(lines[-1])
    assert found == json.loads(out.read_text())
    assert (found["broken"], found["rounds"], len(found["trials"])) == (0, 1, 8)
    for name, trial in found["trials"].items():
        assert trial[trial["unit"]] > 0, name
        assert name in lines[1 + list(found["trials"]).index(name)]


def test_store_speed(tmp_path):
    """Every way that is installed reads and fills rows of every size."""
    out = tmp_path / "speed.json"
    lines = run("store_speed.py", "--smoke", "--dir", str(tmp_path), "--out", str(out))
    found = json.loads(lines[-1])
    assert found == json.loads(out.read_text())
    for size in found["sizes"]:
        assert {"host store", "hdf5, verify=first", "numpy.memmap", "safetensors"} <= set(size["reading"])
        assert size["reading"]["host store"]["speed_to_host"] == 1
        assert all(way["median_us"] > 0 for way in size["reading"].values())
        assert all(order["speed_to_bare"] > 0 for order in size["filling"].values())
    assert not [path for path in tmp_path.iterdir() if path != out], "its files are gone"
