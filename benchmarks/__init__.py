"""Benchmarks of the attention operations: run them as modules, ``python -m benchmarks.attention --help``."""
