"""What needs CUDA, in a few minutes: the tests marked ``gpu``, and small epoch timings. Without CUDA it says so.

The last line printed is one JSON object, also kept as benchmarks/results/gpu-<name>.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", help="of the results file: gpu-<name>.json; default the GPU's own name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tests", default="tests", help="which tests; default all that are marked gpu")
    parser.add_argument("--smoke", action="store_true", help="seconds: one job, few samples, no results file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: CUDA is not available here, so there is nothing to run")
        return 0
    import epoch_timings  # here: torchvision and scikit-learn are not needed to say that there is no CUDA

    tests = run_tests(args.tests)
    timings = []
    for job in _JOBS[:1] if args.smoke else _JOBS:
        words = ["--device", "cuda", "--samples", str(_SAMPLES), "--rounds", str(args.rounds)]
        found = epoch_timings.timed(epoch_timings.parse([*job, *words, *(["--smoke"] if args.smoke else [])]))
        print(epoch_timings.table(found), end="\n\n", flush=True)
        timings.append(found)
    result = {"schema": SCHEMA, "benchmark": "gpu", "tests": tests, "timings": timings}
    if not args.smoke:
        name = args.name or torch.cuda.get_device_name()
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        epoch_timings.write(result, ROOT / "benchmarks" / "results" / f"gpu-{slug}.json")
    print(json.dumps(result))
    return 1 if tests["exit_status"] else 0


if __name__ == "__main__":
    sys.exit(main())
