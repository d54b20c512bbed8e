#!/usr/bin/env python
"""Time parts of the package: python tools/benchmark.py SUITE [--out FILE.json].

Ratios are medians over rounds in which every contender ran once. On a shared machine the processor time of one thread is
the figure to trust; --threads 1 is therefore the default.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from promoe_ds.analysis.benchmarks import BenchmarkResult, benchmark_moe_layer, benchmark_router
from promoe_ds.analysis.benchmarks.dispatch import benchmark_dispatch
from promoe_ds.analysis.benchmarks.gpu import benchmark_gpu
from promoe_ds.analysis.benchmarks.memory import benchmark_memory
from promoe_ds.analysis.benchmarks.stats import MadeUpRun, ReportBenchmark, benchmark_report, benchmark_stats
from promoe_ds.analysis.benchmarks.step import benchmark_step
from promoe_ds.cli.entry import run_entry
from promoe_ds.config import load_config
from promoe_ds.errors import ConfigError
from promoe_ds.files import json_text

if TYPE_CHECKING:
    from promoe_ds.analysis.benchmarks.checkpoint import CheckpointBenchmark
    from promoe_ds.analysis.benchmarks.data import DataBenchmark

#: Suites by name.
SUITES: dict[str, Callable[[argparse.Namespace], BenchmarkResult]] = {
    "moe-layer": lambda o: benchmark_moe_layer(tokens=o.tokens, rounds=50 if o.rounds is None else o.rounds, recipe=o.recipe),
    "router": lambda o: benchmark_router(tokens=o.tokens, rounds=10 if o.rounds is None else o.rounds, recipe=o.recipe),
    "stats": lambda o: benchmark_stats(tokens=o.tokens, rounds=10 if o.rounds is None else o.rounds, recipe=o.recipe),
    "step": lambda o: benchmark_step(tokens=o.tokens, rounds=10 if o.rounds is None else o.rounds, recipe=o.recipe),
    "dispatch": lambda o: benchmark_dispatch(tokens=o.tokens, rounds=20 if o.rounds is None else o.rounds, recipe=o.recipe,
                                             ranks=2 if o.ranks is None else o.ranks),
}

#: Suites whose result is no contest of timings: it has `lines()`.
REPORTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "memory": lambda o: benchmark_memory(recipe=o.recipe, ranks=4 if o.ranks is None else o.ranks),
    "checkpoint": lambda o: benchmark_conversion(o),
    "report": lambda o: time_report(o),
    "data": lambda o: benchmark_loaders(o),
    "gpu": lambda o: benchmark_gpu(tell=lambda line: print(line, flush=True)),
}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, *REPORTS])
    parser.add_argument("--tokens", type=int, default=2048, help="conditional tokens of a pass, whole images")
    parser.add_argument("--rounds", type=int, help="50 of a layer, 10 of a training step, 7 of data if left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", default="promoe_s")
    parser.add_argument("--ranks", type=int, help="2 of the exchange, 4 of memory, 8 of the checkpoint if left out")
    parser.add_argument("--ep-size", type=int, default=4, help="of the checkpoint")
    parser.add_argument("--with-optimizer", action="store_true", help="convert the checkpoint's moments and raw weights as well")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made, copied and converted (five times its "
                        "weights' bytes, twice), the report's log (1 GB) or data (2 GB); a temporary folder if left out")
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    for option, path, folder in (("--out", options.out, options.out and options.out.parent),
                                 ("--folder", options.folder, options.folder)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{option} {path}: there is no folder {folder}: make it first")
    torch.set_num_threads(options.threads)
    if options.suite in REPORTS:
        result = REPORTS[options.suite](options)
        print("\n".join(result.lines()))
    else:
        result = SUITES[options.suite](options)
        print_result(result)
    if options.out is not None:
        options.out.write_text(json_text(asdict(result), indent=1), encoding="utf-8")


def benchmark_conversion(options: argparse.Namespace) -> CheckpointBenchmark:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from promoe_ds.analysis.benchmarks.checkpoint import benchmark_checkpoint

    config = load_config(options.recipe, [f"parallel.ep_size={options.ep_size}"])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return benchmark_checkpoint(config, Path(folder), ranks=8 if options.ranks is None else options.ranks,
                                    with_optimizer=options.with_optimizer)


def time_report(options: argparse.Namespace) -> ReportBenchmark:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return benchmark_report(MadeUpRun(), Path(folder))


def benchmark_loaders(options: argparse.Namespace) -> DataBenchmark:
    from promoe_ds.analysis.benchmarks.data import benchmark_data

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return benchmark_data(Path(folder), rounds=7 if options.rounds is None else options.rounds)


def print_result(result: BenchmarkResult) -> None:
    print(f"{result.suite}: {result.settings}\n{result.machine}, {result.rounds} rounds, ratios to {result.baseline}")
    print(f"{'':30}{'wall ms (low - high)':>26}{'cpu ms':>10}{'wall ratio':>12}{'cpu ratio':>11}")
    for name, timing in result.timings.items():
        spread = f"{timing.wall_ms:.1f} ({timing.wall_ms_low:.1f} - {timing.wall_ms_high:.1f})"
        print(f"{name:30}{spread:>26}{timing.cpu_ms:>10.1f}{timing.wall_ratio:>12.3f}{timing.cpu_ratio:>11.3f}")
    for name, reason in result.not_available.items():
        print(f"{name:30}not available: {reason}")


if __name__ == "__main__":
    run_entry(main)
