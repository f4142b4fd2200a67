"""Train on cached activations of a frozen prefix."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from cachefreeze._started import STARTED
from cachefreeze.cli import job, plot, schedules
from cachefreeze.reporting import Report, prefix_line, short_bytes, table_header, table_row
from cachefreeze.training import Trainer

_OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``train``."""
    job.add_arguments(parser, caches=("auto", "device", "host", "hdf5", "off"), cache="auto", scheduled=True)
    parser.add_argument("--epochs", type=job.positive, default=10, metavar="N", help="default 10")
    parser.add_argument("--lr", type=job.positive_float, default=1e-3, metavar="X", help="default 1e-3, constant")
    parser.add_argument("--optimizer", choices=tuple(_OPTIMIZERS), default="adamw", help="default adamw")
    parser.add_argument("--resume", action="store_true", help="go on from the state in OUT, if there is one")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="also write the report here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw losses, accuracy and seconds here")


def run(args: argparse.Namespace) -> int:
    """Train, print a line per epoch, write checkpoints and the report."""
    for option, path in (("--report", args.report), ("--plot", args.plot)):
        job.check_file(option, path)
    if args.plot is not None:
        plot.check()  # before the minutes that training takes
    made = job.make_job(args)
    engine = made.engine
    try:
        _describe(made)
        print(table_header(), flush=True)
        trained = [p for p in made.model.parameters() if p.requires_grad]
        optimizer = _OPTIMIZERS[args.optimizer](trained, args.lr)
        if engine.schedule is not None:
            engine.attach(optimizer)
            schedules.warn(engine.schedule, engine.ladder, steps=len(made.train) * args.epochs, epochs=args.epochs)
        trainer = Trainer(
            engine,
            nn.functional.cross_entropy,
            optimizer,
            out=made.out,
            config=job.configuration(args, made),
            progress=True,
            on_epoch=lambda epoch: print(table_row(epoch), flush=True),
        )
        report = trainer.fit(made.train, made.val, epochs=args.epochs, resume=args.resume)
    finally:
        engine.close()
    report.data = made.data.name
    report.total_seconds = time.perf_counter() - STARTED
    for path in (made.out / "report.json", args.report):
        if path is not None:
            report.write(path)
    if args.plot is not None:
        plot.draw_report(report, args.plot)
    _conclude(report, made.out)
    return 0


def _describe(made: job.Job) -> None:
    trained = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in made.model.parameters())
    boundary = repr(made.engine.boundary or "the first block")
    samples = f"{len(made.train.dataset)} training and {len(made.val.dataset)} validation samples"
    print(
        f"{type(made.model).__name__} on {made.data.name}: {samples}, {len(made.data.classes)} classes, "
        f"{made.data.image_size} px; trains {trained:,} of {total:,} parameters from {boundary} on"
    )
    if made.engine.schedule is not None:
        print(f"the schedule decides what freezes when: {made.engine.schedule}")
        return
    parts, cache = made.engine.parts, made.engine.cache
    if parts is None or cache is None:
        if made.engine.boundary is None:
            print(
                "nothing runs before the first trainable block: nothing is frozen, nothing is cached, all of it trains"
            )
        else:
            print("no cache: the frozen part runs every epoch")
        return
    print(
        f"cache: {parts.cached_fraction:.1%} of the forward, {short_bytes(parts.boundary.bytes_per_sample)} a sample, "
        f"{short_bytes(cache.nbytes)} in all"
    )
    for name, facts in cache.info().items():
        where = facts["path"] or facts["tier"]
        note = "" if facts["writable"] else " (another process writes it: rows computed here are not kept)"
        print(f"  {name}: {facts['rows_present']}/{facts['rows']} rows in {where}{note}")


def _conclude(report: Report, out: Path) -> None:
    last = report.epochs[-1] if report.epochs else None
    if last is None:
        return
    cached = sorted(epoch.seconds for epoch in report.epochs if epoch.source == "cached")
    fills = [epoch for epoch in report.epochs if epoch.source == "fill"]
    if report.split is not None and "tolerance" in report.split["prefix"]:
        print(prefix_line(report.split["prefix"]))
    line = f"validation accuracy {last.val_accuracy:.1%}" if last.val_accuracy is not None else "done"
    if fills:
        line += f"; filling took {report.fill_seconds:.2f} s"
    if cached:
        line += f", a cached epoch {cached[len(cached) // 2]:.3f} s (median)"
    print(f"{line}; {report.total_seconds:.1f} s in all; model and report in {out}")
