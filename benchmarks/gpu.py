"""What needs CUDA, in under eight minutes: the tests marked ``gpu`` and the GPU table. Without CUDA it says so.

``--smoke --device cpu`` is a dry run of every line but those that only CUDA can run.

The last line printed is one JSON object, also kept as benchmarks/results/gpu-<name>.json.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import gpu_parts
import torch
from common import finish

from cachefreeze.machine import hardware, load_average, versions

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
# A head on pooled rows, where the loader is what is measured, and a cut in the middle, where the suffix is.
_JOBS = (
    ("--model", "digits_cnn"),
    ("--model", "resnet18", "--image-size", "64", "--train-from", "fc"),
    ("--model", "resnet18", "--image-size", "64", "--train-from", "layer4"),
)
_SAMPLES = 1000  # more than there are


def run_tests(selected: str) -> dict[str, object]:
    """``pytest -m gpu`` in a process of its own, its output shown as it comes."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rfE", selected]
    began = time.perf_counter()
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            lines.append(line.strip())
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = next((line for line in reversed(lines) if line), "")
    seconds = time.perf_counter() - began
    return {"exit_status": process.returncode, "summary": summary, "failed": failed, "seconds": seconds}


def parts(device: torch.device, rounds: int, smoke: bool) -> dict[str, Any]:
    """What is timed here, each with the seconds it took."""
    from torchvision.models import resnet18, resnet50

    steps: dict[str, Any] = {"width": 2048, "steps": 300}
    head: dict[str, Any] = {"rows": 1_280_000, "width": 2048, "classes": 1000, "batch": 1024}
    cut: dict[str, Any] = {"model": resnet50, "image": 224, "samples": 768, "batch": 64}
    if smoke:
        steps = {"width": 64, "steps": 3}
        head = {"rows": 2048, "width": 64, "classes": 10, "batch": 256}
        cut = {"model": resnet18, "image": 32, "samples": 16, "batch": 8}
    cut["train_from"] = "layer3"
    todo = {
        "short_steps": partial(gpu_parts.short_steps, **steps),
        "million_rows": partial(gpu_parts.million_rows, **head),
        "middle_cut": partial(gpu_parts.middle_cut, autocast=None, **cut),
        "middle_cut_bf16": partial(gpu_parts.middle_cut, autocast=torch.bfloat16, **cut),
    }
    found: dict[str, Any] = {}
    for name, run in todo.items():
        began = time.perf_counter()
        found[name] = run(device, rounds=rounds)
        found[name]["part_seconds"] = time.perf_counter() - began
        print(f"{name}: {found[name]['part_seconds']:.1f} s", file=sys.stderr, flush=True)
    return found


def targets(found: dict[str, Any]) -> list[tuple[str, float, str, float, bool]]:
    """What was aimed at: name, found, relation, aim, and whether it holds."""
    steps = [found["short_steps"][head] for head in ("linear", "two-layer")]
    cut = found["middle_cut"]
    epoch_seconds = found["million_rows"]["median_seconds"]["compiled"]
    aims = [
        ("device tier over the ceiling, middle cut", cut["to_ceiling"]["device"], "<=", 1.05),
        ("eager over compiled, linear head", steps[0]["eager_to_compiled"], ">=", 3.0),
        ("eager over compiled, two-layer head", steps[1]["eager_to_compiled"], ">=", 3.0),
        ("16 linear heads over one, compiled", steps[0]["heads_to_one"], "<=", 2.0),
        ("seconds an epoch over a million rows, compiled", epoch_seconds, "<=", 0.5),
        ("share of the transfer hidden, host", cut["hidden"]["host"], ">=", 0.9),
    ]
    return [(*aim, aim[1] <= aim[3] if aim[2] == "<=" else aim[1] >= aim[3]) for aim in aims]


def results_file(name: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"gpu-{slug}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", help="of the results file: gpu-<name>.json; default the GPU's own name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tests", default="tests", help="which tests; default all that are marked gpu")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: with --smoke, a dry run")
    parser.add_argument("--smoke", action="store_true", help="few samples, no results file; its numbers say nothing")
    args = parser.parse_args()
    if args.device == "cpu" and not args.smoke:
        parser.error("--device cpu is a dry run of this script: add --smoke")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: CUDA is not available here, so there is nothing to run")
        return 0
    import epoch_timings  # here: torchvision and scikit-learn are not needed to say that there is no CUDA

    began = time.perf_counter()
    device = torch.device(args.device)
    tests = run_tests(args.tests)
    found = parts(device, 2 if args.smoke else args.rounds, args.smoke)
    timings = []
    for job in _JOBS[:1] if args.smoke else _JOBS:
        words = ["--device", args.device, "--samples", str(_SAMPLES), "--rounds", str(args.rounds)]
        timed = epoch_timings.timed(epoch_timings.parse([*job, *words, *(["--smoke"] if args.smoke else [])]))
        print(epoch_timings.table(timed), end="\n\n", flush=True)
        timings.append(timed)
    aims = targets(found)
    for name, value, relation, aim, holds in aims:
        print(f"{name:50} {value:8.3f}  aim {relation} {aim}  {'holds' if holds else 'DOES NOT HOLD'}")
    result = {
        "schema": SCHEMA,
        "benchmark": "gpu",
        "hardware": hardware(device),
        "versions": versions(),
        "load_average": load_average(),
        "total_seconds": time.perf_counter() - began,
        "tests": tests,
        "targets": [dict(zip(("name", "found", "relation", "aim", "holds"), aim, strict=True)) for aim in aims],
        **found,
        "timings": timings,
    }
    print(f"in all {result['total_seconds']:.0f} s (aim: under 480)")
    finish(result, None if args.smoke else results_file(args.name or torch.cuda.get_device_name()))
    return 1 if tests["exit_status"] else 0


if __name__ == "__main__":
    sys.exit(main())
