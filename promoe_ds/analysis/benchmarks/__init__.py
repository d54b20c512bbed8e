"""Timings of the package's parts beside their contenders; `tools/benchmark.py` runs them."""

from promoe_ds.analysis.benchmarks.layers import (
    benchmark_moe_layer,
    benchmark_router,
    mixture_recipe,
    training_module,
    training_pass,
)
from promoe_ds.analysis.benchmarks.timing import BenchmarkResult, Timing, interleave, machine_description

__all__ = ["BenchmarkResult", "Timing", "benchmark_moe_layer", "benchmark_router", "interleave", "machine_description",
           "mixture_recipe", "training_module", "training_pass"]
