"""Fill the caches of a job without training, for sweeps that share them."""

from __future__ import annotations

import argparse
import time

from tqdm import tqdm

from cachefreeze.cli import job
from cachefreeze.errors import UsageError
from cachefreeze.loader import CachedLoader
from cachefreeze.manager import CacheManager
from cachefreeze.reporting import prefix_line, short_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``fill``: those of a job; only a cache on disk outlives the command."""
    job.add_arguments(parser, caches=("hdf5",), cache="hdf5")


def run(args: argparse.Namespace) -> int:
    """Fill the training and the validation cache."""
    made = job.make_job(args)
    engine = made.engine
    try:
        cache = engine.cache
        if cache is None:
            raise UsageError("nothing is frozen before the first trainable block, so there is nothing to fill")
        for name, loader in (("train", made.train), ("val", made.val)):
            if isinstance(loader, CachedLoader):
                _fill(cache, name, loader)
        if args.prefix != "exact":
            print(prefix_line(cache.made_by))
    finally:
        engine.close()
    return 0


def _fill(cache: CacheManager, name: str, loader: CachedLoader) -> None:
    began = time.perf_counter()
    with tqdm(total=cache.info()[name]["rows"], desc=f"fill {name}", leave=False, disable=None) as bar:

        def advance(rows: int) -> None:
            bar.update(rows)
            bar.set_description_str(f"fill {name} {loader.rows.progress()}".rstrip(), refresh=False)

        done = cache.fill(loader, advance)
    seconds = time.perf_counter() - began
    path = cache.info()[name]["path"]
    print(
        f"{name}: {done.computed_rows} of {done.rows} rows computed in {seconds:.2f} s, "
        f"{short_bytes(done.nbytes)} in {path}"
    )
