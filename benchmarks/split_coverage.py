"""How many models of three libraries does ``cf.split`` cut, is every cut right, and how near are the rows to the least?

The method is in benchmarks/README.md. Prints a line per cut that is not fine, a summary by library, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from covering.case import Case
from covering.catalogue import LIBRARIES, cases_of, prepare
from covering.run import PLACES, package_digest, run_case

from cachefreeze.machine import load_average, made_on

SCHEMA = 1
_SMOKE = {
    "transformers": ("bert", "gpt2", "vit-mae"), "masks": (), "timm": ("vision_transformer",),
    "torchvision": ("squeezenet1_1",),
}  # fmt: skip
# What a cut ends as, from good to bad.
STATUSES = ("n/a", "ok", "refused", "work", "state", "crash", "silent")


def in_process(case: Case, places: tuple[str, ...], timeout_seconds: float, memory_bytes: int) -> dict[str, Any]:
    """Run one model in a process of its own: neither a crash nor a hang nor its memory reaches the others."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, places, memory_bytes, sender))
    process.start()
    sender.close()
    found: dict[str, Any] | None = None
    try:
        if receiver.poll(timeout_seconds):
            found = receiver.recv()
    except EOFError:
        pass  # it died; its exit code says how
    if found is None and process.is_alive():
        process.kill()
    process.join()
    if found is not None:
        return found
    died = (
        f"the process ended with {process.exitcode}" if process.exitcode != -9 else f"no end in {timeout_seconds:.0f} s"
    )
    cut = {"place": "all", "boundary": "", "status": "crash", "reason": died}
    return {"library": case.library, "name": case.name, "note": case.note, "package": package_digest(), "cuts": [cut]}


def _child(case: Case, places: tuple[str, ...], memory_bytes: int, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    torch.set_num_threads(1)
    sender.send(run_case(case, places))
    sender.close()


def chosen(libraries: list[str], only: str | None, *, smoke: bool) -> Iterator[Case]:
    """The models to run."""
    for library in libraries:
        for case in cases_of(library):
            wanted = case.name in _SMOKE[library] if smoke else True
            if wanted and (only is None or re.search(only, f"{library}/{case.name}")):
                yield case


def status_of(row: dict[str, Any]) -> str:
    """A model's status is that of its worst cut."""
    return max((cut["status"] for cut in row["cuts"]), key=STATUSES.index, default="n/a")


def report(row: dict[str, Any]) -> None:
    """One line per model, and one per cut that is not fine."""
    executors = ",".join(sorted({cut["executor"] for cut in row["cuts"] if "executor" in cut}))
    ratios = [cut["ratio"] for cut in row["cuts"] if cut.get("ratio") is not None]
    worst = f"{max(ratios):.2f}" if ratios else "-"
    fine = sum(cut["status"] == "ok" for cut in row["cuts"])
    line = (
        f"{row['library']:12} {row['name']:40} {status_of(row):8} {fine}/{len(row['cuts'])} {executors:10} {worst:>6}"
    )
    print(line, f"{row.get('seconds', 0):6.1f} s", flush=True)
    for cut in row["cuts"]:
        if cut["status"] != "ok":
            print(
                f"    {cut['place']:6} {cut['boundary']}: {cut['status']}: {cut.get('why') or cut['reason']}",
                flush=True,
            )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by library, and the distribution of bytes against the minimum."""
    found: dict[str, Any] = {}
    for library in LIBRARIES:
        own = [row for row in rows if row["library"] == library]
        if not own:
            continue
        cuts = [cut for row in own for cut in row["cuts"]]
        ratios = sorted(cut["ratio"] for cut in cuts if cut["status"] == "ok" and cut.get("ratio") is not None)
        models = Counter(status_of(row) for row in own)
        counted = len(own) - models["n/a"]
        found[library] = {
            "models": len(own), "models_by_status": dict(models),
            "split_share": round(models["ok"] / counted, 4) if counted else None,
            "cuts": len(cuts), "cuts_by_status": dict(Counter(cut["status"] for cut in cuts)),
            "cuts_with_live_frozen_layers": sum("live" in cut for cut in cuts),
            "executors": dict(Counter(cut["executor"] for cut in cuts if "executor" in cut)),
            "bytes_to_minimum": {
                "cuts": len(ratios), "median": statistics.median(ratios), "max": ratios[-1],
                "above_1.1": sum(ratio > 1.1 for ratio in ratios),
            } if ratios else None,
        }  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="default: all")
    parser.add_argument("--only", metavar="PATTERN", help="regular expression over LIBRARY/NAME")
    parser.add_argument("--cuts", metavar="PLACES", default=",".join(PLACES), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="models at a time, one thread each")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="for one model")
    parser.add_argument("--memory", type=float, default=6, metavar="GIB", help="for one model (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="five models, in seconds")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--resume", type=Path, metavar="FILE.jsonl", help="append each model here, skip those found")
    parser.add_argument("--report", action="store_true", help="run nothing: report what --resume holds so far")
    options = parser.parse_args(argv)
    began, load_before = time.perf_counter(), load_average()
    torch.set_num_threads(1)
    libraries = options.library or list(LIBRARIES)
    places = tuple(options.cuts.split(","))
    if unknown := set(places) - set(PLACES):
        parser.error(f"--cuts {options.cuts}: {sorted(unknown)} are none of {', '.join(PLACES)}")
    done = _resumed(options.resume)
    prepare(libraries)
    package_digest()  # before a process may see the sources change
    cases = list(chosen(libraries, options.only, smoke=options.smoke))
    rows = [done[key] for case in cases if (key := (case.library, case.name)) in done]
    left = [case for case in cases if (case.library, case.name) not in done]
    missing = len(left) if options.report else 0
    memory_bytes = int(options.memory * 2**30)
    left = [] if options.report else left
    with ThreadPoolExecutor(options.jobs) as pool:
        for future in as_completed(
            [pool.submit(in_process, case, places, options.timeout, memory_bytes) for case in left]
        ):
            row = future.result()
            rows.append(row)
            report(row)
            if options.resume:
                with options.resume.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    order = [(case.library, case.name) for case in cases]
    rows.sort(key=lambda row: order.index((row["library"], row["name"])))
    totals = summary(rows)
    print(f"\n{'library':12} {'models':>6} {'split':>7}  by status")
    for library, total in totals.items():
        share = "-" if total["split_share"] is None else f"{total['split_share']:.1%}"
        print(f"{library:12} {total['models']:6} {share:>7}  {total['models_by_status']}")
        print(f"{'':28}cuts {total['cuts_by_status']}, bytes/minimum {total['bytes_to_minimum']}")
    found = {
        "schema": SCHEMA,
        "benchmark": "split_coverage",
        "config": {
            "libraries": libraries,
            "only": options.only,
            "cuts": places,
            "jobs": options.jobs,
            "smoke": options.smoke,
        },
        **made_on(load_before, packages=("timm", "transformers", "networkx")),
        "seconds": round(time.perf_counter() - began, 1),
        "models_not_run": missing,
        "summary": totals,
        "models": [_without_traces(row) for row in rows],
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found) + "\n")
    print(json.dumps(found))
    return 0


def _resumed(path: Path | None) -> dict[tuple[str, str], dict[str, Any]]:
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["library"], row["name"]): row for row in rows}


def _without_traces(row: dict[str, Any]) -> dict[str, Any]:
    cuts = [{key: value for key, value in cut.items() if key != "trace"} for cut in row["cuts"]]
    return {**row, "cuts": cuts}


if __name__ == "__main__":
    sys.exit(main())
