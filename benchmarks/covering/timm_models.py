"""The smallest variant of every model family of timm, at the smallest image that it takes.

Which variant that is comes from ``timm_smallest.json``; ``python benchmarks/covering/timm_models.py`` writes it anew
for the installed timm: every variant is built on the meta device and counted, none is downloaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn

TABLE = Path(__file__).with_name("timm_smallest.json")
_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 288, 384)
# Of a family whose smallest variant is larger than this, four blocks are enough to cut between.
_LARGE, _SHALLOW = 40_000_000, 4
# Random in train mode wherever the family knows how: a cut must keep what is random before it out of the rows.
_RATES: tuple[dict[str, float], ...] = ({"drop_rate": 0.1, "drop_path_rate": 0.1}, {"drop_rate": 0.1}, {})


def build(model: str, settings: dict[str, Any]) -> nn.Module:
    """The variant with random weights."""
    import timm

    return timm.create_model(model, pretrained=False, num_classes=10, **settings)


def images(size: int, channels: int, batch: int, generator: Generator) -> torch.Tensor:
    """Square images."""
    return torch.randn(batch, channels, size, size, generator=generator)


def cases() -> Iterator[Any]:
    """One per family."""
    from covering.case import Case

    for family, row in json.loads(TABLE.read_text())["families"].items():
        make = partial(images, row["size"], row["channels"])
        yield Case("timm", family, partial(build, row["model"], row["settings"]), make, row["model"])


def smallest(family: str) -> dict[str, Any] | None:
    """The variant of fewest parameters, how it is built, and the smallest image that it trains on."""
    import timm

    counts: dict[str, int] = {}
    for model in timm.list_models(module=family):
        try:
            with torch.device("meta"):
                counts[model] = sum(p.numel() for p in build(model, {}).parameters())
        except Exception:  # some compute with weights while they are built, which meta tensors cannot
            counts[model] = sum(p.numel() for p in build(model, {}).parameters())
    for model in sorted(counts, key=counts.__getitem__):
        channels = int(timm.get_pretrained_cfg(model).input_size[0])
        shallow: tuple[dict[str, Any], ...] = ({"depth": _SHALLOW}, {}) if counts[model] > _LARGE else ({},)
        for size, depth, rates, given in product(_SIZES, shallow, _RATES, ("img_size", None)):
            settings = {**depth, **rates, **({given: size} if given else {})}
            if _trains(model, settings, size, channels):
                return {"model": model, "parameters": counts[model], "settings": settings, "size": size,
                        "channels": channels}  # fmt: skip
    return None


def _trains(model: str, settings: dict[str, Any], size: int, channels: int) -> bool:
    try:
        made = build(model, settings)
        output = made.train()(images(size, channels, 2, Generator().manual_seed(0)))
        tensors = output if isinstance(output, tuple | list) else (output,)
        sum(t.mean() for t in tensors).backward()
    except Exception:  # a size or an option that the family does not take
        return False
    return True


def main(only: list[str]) -> None:
    """Write the table; of the families given, or of all."""
    import timm

    families = json.loads(TABLE.read_text())["families"] if only else {}
    for family in only or timm.list_modules():
        found = smallest(family) if timm.list_models(module=family) else None
        print(family, found, flush=True)
        if found is not None:
            families[family] = found
    TABLE.write_text(
        json.dumps({"timm": timm.__version__, "families": dict(sorted(families.items()))}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
