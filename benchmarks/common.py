"""What scripts share that measure different things: how they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def finish(found: dict[str, Any], out: Path | None) -> None:
    """Keep the results in the file of ``--out``, where one was asked for, and print them: one line, the last one."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
