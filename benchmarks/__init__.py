"""Timings of the package's parts beside other candidates; `tools/benchmark.py` runs them."""
