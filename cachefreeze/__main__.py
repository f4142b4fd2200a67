"""``python -m cachefreeze``: the same as the ``cachefreeze`` command."""

import sys

from cachefreeze.cli import main

sys.exit(main())
