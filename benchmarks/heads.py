"""Sixteen heads from one pass over the rows: what does an epoch of all cost beside an epoch of one?

Beside them, as what the arithmetic alone costs: one matrix of all heads' weights in one group of an optimizer, written
by hand, which gives no head a learning rate of its own.

The method is in benchmarks/README.md. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import finish, interleaved, ratio
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze.machine import load_average, made_on

SCHEMA = 1
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "sgd, fused": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True),
    "adamw, fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
}
_WIDTHS = {64: 10, 512: 10, 1280: 10}  # of a row -> classes


class _Rows(nn.Module):
    """A frozen layer that is next to nothing, so that a row is as wide as asked for, and a linear head."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x))


def _epochs(width: int, count: int, kind: str, args: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    """An epoch of one head as a user writes it, of one after the other, and of all at once."""
    rates = [10 ** (-3 * i / max(count - 1, 1)) for i in range(count)]
    data = TensorDataset(torch.randn(args.rows, width), torch.randint(_WIDTHS[width], (args.rows,)))

    def prepared() -> tuple[cf.Engine, Any]:
        torch.manual_seed(0)
        model = _Rows(width, _WIDTHS[width]).to(args.device)
        cf.freeze(model, train_from="head")
        engine = cf.Engine(model, "device" if args.device == "cuda" else "host")
        batches = engine.loader(
            DataLoader(data, args.batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
        )
        engine.cache.fill(batches)
        return engine, batches

    def one() -> Callable[[], torch.Tensor]:
        engine, batches = prepared()
        optimizer = _OPTIMIZERS[kind](engine.model.head.parameters())

        def epoch() -> torch.Tensor:
            for x, y in batches:
                optimizer.zero_grad()
                loss = functional.cross_entropy(engine(x), y)
                loss.backward()
                optimizer.step()
            return loss.detach()

        return epoch

    def several(compiled: bool = False, attached: bool = False) -> Callable[[], torch.Tensor]:
        engine, batches = prepared()
        heads = engine.heads(count)
        groups = [{"params": heads.parameters(i), "lr": 0.1 * rate} for i, rate in enumerate(rates)]
        optimizer = _OPTIMIZERS[kind](groups)
        if attached:
            heads.attach(optimizer)
        step = heads.compile_step(functional.cross_entropy, optimizer)

        def epoch() -> torch.Tensor:
            for x, y in batches:
                if compiled:
                    loss = step(x, y)
                    continue
                optimizer.zero_grad()
                loss = heads.losses(functional.cross_entropy, x, y)
                loss.sum().backward()
                optimizer.step()
            return loss.detach()

        return epoch

    def joined() -> Callable[[], torch.Tensor]:
        _, batches = prepared()
        head = nn.Linear(width, count * _WIDTHS[width], device=args.device)
        optimizer = _OPTIMIZERS[kind](head.parameters())

        def epoch() -> torch.Tensor:
            for x, y in batches:
                optimizer.zero_grad()
                outputs = head(x.tensors[0]).view(len(y), count, -1).movedim(1, 2)
                each = functional.cross_entropy(outputs, y[:, None].expand(-1, count), reduction="none")
                loss = each.mean(0).sum()
                loss.backward()
                optimizer.step()
            return loss.detach()

        return epoch

    found = {"one": one(), "heads": several(), "attached": several(attached=True), "joined by hand": joined()}
    if args.device == "cuda":  # needs CUDA
        found["heads, compiled"] = several(compiled=True)
        found["attached, compiled"] = several(compiled=True, attached=True)
    return found


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    cases = []
    for width in _WIDTHS:
        for kind in _OPTIMIZERS:
            epochs = _epochs(width, args.heads, kind, args)
            seconds = interleaved(epochs, args.rounds, torch.device(args.device))
            ratios = {name: ratio(seconds, name, "one") for name in epochs if name != "one"}
            cases.append(
                {"row_width": width, "optimizer": kind, "heads": args.heads, "seconds": seconds, "to_one": ratios}
            )
            shown = ", ".join(f"{name} {found:.2f}x" for name, found in ratios.items())
            one_ms = 1000 * statistics.median(seconds["one"])
            print(f"rows of {width:5}, {kind:13} one head {one_ms:8.2f} ms an epoch; {args.heads} {shown}", flush=True)
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="seconds; its numbers say nothing")
    parser.add_argument("--out", type=Path, help="results file")
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.rounds, args.heads = 256, 2, 3
    before = load_average()
    cases = measure(args)
    result = {
        "schema": SCHEMA,
        "benchmark": "heads",
        "config": {key: value for key, value in vars(args).items() if key != "out"},
        **made_on(before, args.device),
        "cases": cases,
    }
    finish(result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
