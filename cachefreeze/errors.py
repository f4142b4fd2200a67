"""Every exception class of the package, in one leaf module.

Each class pairs the package's base with the builtin that fits, so that both
``except CacheFreezeError`` and ``except ValueError`` work. Messages say what was
given, what was expected, why, and what to write instead.
"""

from __future__ import annotations

from collections.abc import Sequence


class CacheFreezeError(Exception):
    """Base of every error raised by this package."""


class FreezeError(CacheFreezeError, ValueError):
    """A freeze names no module, leaves nothing to train, or contradicts the model."""


class ScheduleError(CacheFreezeError, ValueError):
    """A freeze schedule contradicts itself, the model or the length of the run."""


class SplitError(CacheFreezeError, RuntimeError):
    """No executor could cut the model exactly; the message names what stands in the way."""


class LoaderError(CacheFreezeError, TypeError):
    """A DataLoader whose rows cannot be identified with samples (iterable, no batch sampler)."""


class FieldError(CacheFreezeError, TypeError):
    """A batch holds something that cannot be stored beside its rows, or lacks what the model needs."""


class RandomSampleError(CacheFreezeError, ValueError):
    """A dataset or collate function is random, so no single row stands for a sample."""


class BatchDependentError(CacheFreezeError, ValueError):
    """A row would depend on the batch it was computed in."""


class StaleCacheError(CacheFreezeError, RuntimeError):
    """Rows were made by another prefix, view or numeric mode than the one now asking for them."""


class StoreError(CacheFreezeError, OSError):
    """A store cannot be created, opened, read or written."""


class StoreSpaceError(StoreError):
    """The rows do not fit where they should be kept; raised before anything is computed."""


class CorruptStoreError(StoreError):
    """A cache file is damaged or is no cache file; the message names the part."""


class CorruptRowError(StoreError):
    """Rows failed their checksum. The store has marked them absent, so they can be written again.

    Attributes:
        rows: Indices of the damaged rows.
    """

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


class RowValueError(CacheFreezeError, ValueError):
    """A computed row holds NaN or infinity, or overflows the dtype it is stored in."""


class CheckpointError(CacheFreezeError, ValueError):
    """A checkpoint does not belong to this run, or cannot be read."""


class UsageError(CacheFreezeError, ValueError):
    """A wrong argument of a public function or of the command line."""


def first_line(error: BaseException) -> str:
    """What another library's error says first, for a message of ours; empty where it says nothing."""
    return "".join(str(error).strip().splitlines()[:1])
