#!/usr/bin/env python
"""Time parts of the package: python tools/benchmark.py moe-layer|router [--out FILE.json].

Ratios are medians over rounds in which every contender ran once. On a shared machine the processor time of one thread is
the figure to trust; --threads 1 is therefore the default.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from promoe_ds.analysis.benchmarks import BenchmarkResult, benchmark_moe_layer, benchmark_router
from promoe_ds.cli.entry import run_entry

#: Suites by name.
SUITES: dict[str, Callable[[argparse.Namespace], BenchmarkResult]] = {
    "moe-layer": lambda o: benchmark_moe_layer(tokens=o.tokens, rounds=50 if o.rounds is None else o.rounds, recipe=o.recipe),
    "router": lambda o: benchmark_router(tokens=o.tokens, rounds=10 if o.rounds is None else o.rounds, recipe=o.recipe),
}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--tokens", type=int, default=2048, help="conditional tokens of a pass, whole images")
    parser.add_argument("--rounds", type=int, help="50 of a layer, 10 of a training step if left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", default="promoe_s")
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    result = SUITES[options.suite](options)
    print_result(result)
    if options.out is not None:
        options.out.write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")


def print_result(result: BenchmarkResult) -> None:
    print(f"{result.suite}: {result.settings}\n{result.machine}, {result.rounds} rounds, ratios to {result.baseline}")
    print(f"{'':30}{'wall ms (low - high)':>26}{'cpu ms':>10}{'wall ratio':>12}{'cpu ratio':>11}")
    for name, timing in result.timings.items():
        spread = f"{timing.wall_ms:.1f} ({timing.wall_ms_low:.1f} - {timing.wall_ms_high:.1f})"
        print(f"{name:30}{spread:>26}{timing.cpu_ms:>10.1f}{timing.wall_ratio:>12.3f}{timing.cpu_ratio:>11.3f}")


if __name__ == "__main__":
    run_entry(main)
