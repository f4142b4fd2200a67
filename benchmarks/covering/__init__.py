"""What ``benchmarks/split_coverage.py`` is made of: the models, the independent checks, and how they are run."""
