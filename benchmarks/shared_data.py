"""The shared data of the benchmarks: where it is, and the movie reviews."""

from __future__ import annotations

import os
from pathlib import Path

# photos, weights and sentences; beside the repository where nothing else is said
DATA = Path(os.environ.get("CACHEFREEZE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def reviews(first: int, count: int) -> list[tuple[str, int]]:
    """Sentences of movie reviews and whether they are positive, which every other one is."""
    folder = DATA / "text_rt_polarity"
    lines = [(folder / f"rt-polarity.{kind}").read_text(encoding="latin-1").splitlines() for kind in ("neg", "pos")]
    return [(lines[index % 2][index // 2].strip(), index % 2) for index in range(first, first + count)]
