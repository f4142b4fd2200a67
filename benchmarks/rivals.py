"""Against what people use: total time with the fill, and time of a cached epoch, for one cut of a MobileNetV2.

Each contender of each round runs in a process of its own, in turns. Lines are appended to a file as they come, so that
a round can be made of several short calls. The method is in benchmarks/README.md. The last line printed is one JSON
object.

    python benchmarks/rivals.py --data DIR --weights FILE.safetensors --lines LINES.jsonl --rounds 3 --budget 150
    python benchmarks/rivals.py --lines LINES.jsonl --report --out benchmarks/results/NAME.json --plot NAME.png
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import finish
from contenders.job import Clock, Job, accuracy
from contenders.table import CONTENDERS

from cachefreeze.cli.data import load_data
from cachefreeze.machine import hardware, load_average, versions

SCHEMA = 1
BASELINE = "hand-written"
_PACKAGES = ("lightning", "datasets", "keras", "scikit-learn")
_WITHOUT_CACHE_EPOCHS = 3


def run_one(job: Job, name: str) -> dict[str, Any]:
    """One contender in this process, which is fresh."""
    contender = CONTENDERS[name]
    run, _ = contender.run, (job.train, job.val)  # imports and the list of files are not on the clock
    with tempfile.TemporaryDirectory(prefix="cachefreeze-rivals-") as folder:
        job = replace(job, folder=Path(folder))
        clock = Clock(job, _WITHOUT_CACHE_EPOCHS if contender.every_epoch else job.epochs)
        classify = run(job, clock, **contender.options)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"name": name, **clock.result(), "peak_bytes": peak, "val_accuracy": accuracy(job, classify)}


def in_process(job: Job, name: str) -> dict[str, Any]:
    """One contender in a process of its own: no other's heap, threads or caches of kernels."""
    # forked from one that has imported what all share and run nothing: a fresh heap without seconds of imports
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "cachefreeze", "contenders.table", "contenders.job"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, name, sender))
    before = load_average()
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = None
    process.join()  # its status is known only then
    if found is None:
        found = {"name": name, "error": f"the process died (status {process.exitcode})"}
    return {**found, "load": before}


def _child(job: Job, name: str, sender: Connection) -> None:
    try:
        sender.send(run_one(job, name))
    except Exception as error:  # whatever a rival raises is a line of the results, and the others go on
        sender.send({"name": name, "error": f"{type(error).__name__}: {error}"})


def take_turns(job: Job, names: list[str], rounds: int, lines: Path, budget_seconds: float) -> None:
    """Run what is missing of ``rounds`` rounds, each beginning with the next contender, until the budget is spent."""
    began = time.perf_counter()
    done = {(line["round"], line["name"]) for line in read(lines)}
    for round_ in range(rounds):
        turn = round_ * len(names) // rounds
        for name in (*names[turn:], *names[:turn]):
            if (round_, name) in done:
                continue
            if time.perf_counter() - began > budget_seconds:
                print("the budget is spent; call again to go on", file=sys.stderr)
                return
            print(f"round {round_ + 1}/{rounds}: {name}", file=sys.stderr, flush=True)
            line = {"round": round_, "config": described(job), **in_process(job, name)}
            with lines.open("a") as file:
                file.write(json.dumps(line) + "\n")


def described(job: Job) -> dict[str, Any]:
    """The configuration, without the places that say something about this machine alone."""
    weights = Path(job.weights).name if job.weights else None
    kept = {key: value for key, value in asdict(job).items() if key != "folder"}
    return {**kept, "data": load_data(job.data).name, "weights": weights, "train_from": job.train_from}


def read(lines: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []


def results(lines: list[dict[str, Any]], left_out: dict[str, str]) -> dict[str, Any]:
    """Everything that a results file holds; ratios are medians over rounds of the ratio within a round."""
    by_name: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for line in lines:
        if "error" in line:
            left_out[line["name"]] = line["error"]
        else:
            by_name[line["name"]].append(line)
    baseline = {line["round"]: line for line in by_name[BASELINE]}
    return {
        "schema": SCHEMA,
        "benchmark": "rivals",
        "config": lines[0]["config"],
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(_PACKAGES),
        "left_out": left_out,
        "contenders": {name: _row(own, baseline) for name, own in by_name.items() if own and name not in left_out},
        "lines": [{key: value for key, value in line.items() if key != "config"} for line in lines],
    }


def _row(own: list[dict[str, Any]], baseline: dict[int, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"rounds": len(own)}
    for kind in ("setup", "epoch", "total"):
        times = [line[f"{kind}_seconds"] for line in own]
        found |= {f"{kind}_seconds": statistics.median(times), f"{kind}_spread": [min(times), max(times)]}
    for kind in ("epoch", "total"):
        pairs = [(line[f"{kind}_seconds"], baseline[line["round"]]) for line in own if line["round"] in baseline]
        ratios = [seconds / other[f"{kind}_seconds"] for seconds, other in pairs]
        found[f"{kind}_to_baseline"] = statistics.median(ratios) if ratios else None
    last = own[-1]
    return {
        **found,
        "losses": last["losses"],
        "val_accuracy": last["val_accuracy"],
        "peak_bytes": max(line["peak_bytes"] for line in own),
    }


def table(found: dict[str, Any]) -> str:
    """The results, readable: seconds, ratios to the hand-written cache, losses of the first, third and last epoch."""
    config = found["config"]
    job = (
        f"MobileNetV2 on {config['data']}, {config['image_size']} px, trained from {config['train_from']}: "
        f"{config['samples']} samples, batch {config['batch_size']}, {config['epochs']} epochs"
    )
    columns = (
        f"{'':34}{'total s':>9}{'min':>8}{'max':>8}{'/hand':>7}{'setup s':>9}{'epoch ms':>10}{'/hand':>8}"
        f"{'loss 1':>9}{'3':>8}{'last':>8}{'val acc':>9}{'peak GB':>9}"
    )
    lines = [job, "", columns]
    for name, row in found["contenders"].items():
        losses = row["losses"]
        shown = [f"{losses[i]:.4f}" if len(losses) > i else "-" for i in (0, 2, config["epochs"] - 1)]
        low, high = row["total_spread"]
        # of a few epochs, it would stand beside that of all
        val_accuracy = f"{row['val_accuracy']:.1%}" if len(losses) in (0, config["epochs"]) else "-"
        lines.append(
            f"{name:34}{row['total_seconds']:9.2f}{low:8.2f}{high:8.2f}{_text(row['total_to_baseline']):>7}"
            f"{row['setup_seconds']:9.2f}{1e3 * row['epoch_seconds']:10.2f}{_text(row['epoch_to_baseline']):>8}"
            f"{shown[0]:>9}{shown[1]:>8}{shown[2]:>8}{val_accuracy:>9}{row['peak_bytes'] / 1e9:9.2f}"
        )
    return "\n".join([*lines, *(f"left out: {name} ({why})" for name, why in found["left_out"].items())])


def _text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def draw(found: dict[str, Any], path: Path) -> None:
    """Totals with their spread, and a later epoch on a logarithmic axis; this package's own bars in another colour."""
    from matplotlib.figure import Figure

    rows, config = found["contenders"], found["config"]
    figure = Figure(figsize=(11, 0.34 * len(rows) + 1.4), layout="constrained")
    figure.suptitle(
        f"MobileNetV2 on {config['data']} at {config['image_size']} px, trained from {config['train_from']}: "
        f"{config['samples']} samples, batch {config['batch_size']}",
        fontsize=10,
    )
    totals, epochs = figure.subplots(1, 2, sharey=True)
    _bars(totals, rows, "total", f"{config['epochs']} epochs, with everything before them")
    _bars(epochs, rows, "epoch", "a later epoch")
    epochs.set_xscale("log")
    epochs.invert_yaxis()
    figure.savefig(path, dpi=120)


def _bars(axes: Any, rows: dict[str, Any], kind: str, title: str) -> None:
    medians = [row[f"{kind}_seconds"] for row in rows.values()]
    ends = zip(*(row[f"{kind}_spread"] for row in rows.values()), strict=True)
    spread = [[abs(end - median) for end, median in zip(side, medians, strict=True)] for side in ends]
    colours = ["#1f77b4" if name.startswith("cachefreeze") else "#bbbbbb" for name in rows]
    axes.barh(list(rows), medians, xerr=spread, color=colours, error_kw={"ecolor": "0.3", "capsize": 2})
    for place, (row, median) in enumerate(zip(rows.values(), medians, strict=True)):
        end = (row[f"{kind}_spread"][1], place)
        axes.annotate(f"{median:.3g}", end, (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set(title=title, xlabel="seconds (median, fastest and slowest)")
    axes.margins(x=0.15)
    axes.tick_params(axis="y", labelsize=8)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="an image folder with train/ and val/")
    parser.add_argument("--weights", help="FILE.safetensors of MobileNetV2; default random")
    parser.add_argument("--cut", choices=("head", "middle"), default="head")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders; default all that can take part")
    parser.add_argument("--skip", nargs="+", metavar="NAME", default=(), help="all but these")
    parser.add_argument(
        "--lines", type=Path, required=True, help="every run is appended here; what is there is not run again"
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="start nothing after that"
    )
    parser.add_argument("--report", action="store_true", help="run nothing more")
    parser.add_argument("--out", type=Path, help="results file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    unknown = sorted({*(args.only or ()), *args.skip} - set(CONTENDERS))
    if unknown:
        parser.error(f"no contender {unknown[0]!r}: expected some of {', '.join(CONTENDERS)}")
    if args.data is None and not args.report:
        parser.error("--data: expected an image folder with train/ and val/")
    return args


def main() -> int:
    args = parse()
    chosen = set(args.only or CONTENDERS) - set(args.skip)
    able = {name: c for name, c in CONTENDERS.items() if args.cut in c.cuts and name in chosen}
    left_out = {name: why for name, contender in able.items() if (why := contender.lacks()) is not None}
    if not args.report:
        options = ("data", "weights", "cut", "image_size", "samples", "batch_size", "epochs")
        job = Job(**{name: getattr(args, name) for name in options})
        take_turns(job, [name for name in able if name not in left_out], args.rounds, args.lines, args.budget)
    lines = read(args.lines)
    if not lines:
        print(f"rivals.py: error: {args.lines} holds no run yet; run without --report first", file=sys.stderr)
        return 2
    found = results(lines, left_out)
    print(table(found))
    finish(found, args.out)
    if args.plot is not None:
        draw(found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
