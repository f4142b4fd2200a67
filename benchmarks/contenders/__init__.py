"""What people use in place of this package, each as its users would write it, and the package itself.

A contender is a function ``run(job, clock)`` in a module of its own, named in ``table.py``.
"""
