"""Compare every stored row with its checksum."""

from __future__ import annotations

import argparse

from cachefreeze.cli.files import add_place, cache_files, printable
from cachefreeze.errors import CorruptStoreError, StoreError
from cachefreeze.stores import HDF5Store

_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``verify``."""
    add_place(parser)


def run(args: argparse.Namespace) -> int:
    """Exit status 1 when anything is damaged, naming file, dataset and row."""
    found = cache_files(args.place)
    damaged = 0
    for path in found:
        try:
            store = HDF5Store.open(path, writable=False)
        except CorruptStoreError as error:
            print(f"{path}: {printable(str(error))}")
            damaged += 1
            continue
        except StoreError as error:
            print(f"{path}: cannot be read: {printable(str(error))}")
            damaged += 1
            continue
        try:
            bad = store.verify()
            total = f"{store.count}/{store.spec.rows}"
        finally:
            store.close()
        if not bad:
            print(f"{path}: {total} rows, all good")
            continue
        damaged += 1
        print(f"{path}: {len(bad)} of {total} rows are damaged; they are computed again when they are next read")
        # one checksum covers a row in all datasets, so all of them are named unless there is only one
        datasets = "+".join(field.name for field in store.spec.fields)
        for row in bad[:_SHOWN]:
            print(f"  dataset {row.field or datasets}, row {row.row}: {row.reason}")
        if len(bad) > _SHOWN:
            print(f"  … and {len(bad) - _SHOWN} more")
    if not found:
        print(f"no caches in {args.place}")
    return 1 if damaged else 0
