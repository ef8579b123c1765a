"""Measurements: one script each, `python -m benchmarks.NAME --out FILE`; results in `benchmarks/results`."""
