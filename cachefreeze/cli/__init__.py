"""The command line: one module per verb; this one only picks the verb and turns errors into exit statuses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import cachefreeze
from cachefreeze.cli import bench, clean, fill, info, plan, train, verify
from cachefreeze.errors import CacheFreezeError

_VERBS = (train, plan, fill, info, verify, clean, bench)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(prog="cachefreeze", description=cachefreeze.__doc__, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"cachefreeze {cachefreeze.__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    for module in _VERBS:
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").splitlines()[0]
        verb = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done, 1 failure, 2 wrong use.
    """
    args = parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except CacheFreezeError as error:
        print(f"cachefreeze {args.verb}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cachefreeze {args.verb}: interrupted; what was cached is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output went away; nothing more to say, also not at interpreter exit
        sys.stderr.close()
        return 1
    return status
