"""When this package was first imported: before torch is, so that a run's total includes that import.

Not the start of the process as the system knows it: a shell that replaces itself by its last command hands on its own.
"""

from time import perf_counter

STARTED = perf_counter()
