#!/usr/bin/env python
"""Time parts of the package: python tools/benchmark.py SUITE [--out FILE.json].

Ratios are medians over rounds in which every candidate ran once. On a shared machine the processor
time of one thread is the figure to trust; --threads 1 is therefore the default.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from promoe_ds.backends.devices import DEVICES
from promoe_ds.cli.entry import run_entry
from promoe_ds.config import load_config
from promoe_ds.errors import ConfigError
from promoe_ds.files import json_text

_ROOT = str(Path(__file__).resolve().parents[1])

#: Suites by name: the module of `benchmarks`, rounds and ranks if left out, and the call.
SUITES: dict[str, tuple[str, int | None, int | None, Callable[[Any, argparse.Namespace], Any]]] = {
    "moe-layer": ("layers", 50, None, lambda m, o: m.benchmark_moe_layer(**_size(o))),
    "router": ("layers", 10, None, lambda m, o: m.benchmark_router(**_size(o))),
    "stats": ("stats", 10, None, lambda m, o: m.benchmark_stats(**_size(o))),
    "step": ("step", 10, None, lambda m, o: m.benchmark_step(**_size(o))),
    "dispatch": ("dispatch", 20, 2, lambda m, o: m.benchmark_dispatch(**_size(o), ranks=o.ranks)),
    "memory": ("memory", None, 4, lambda m, o: m.benchmark_memory(recipe=o.recipe, ranks=o.ranks)),
    "checkpoint": (
        "checkpoint",
        None,
        8,
        lambda m, o: m.benchmark_checkpoint(
            load_config(o.recipe, [f"parallel.ep_size={o.ep_size}"]),
            o.folder,
            ranks=o.ranks,
            with_optimizer=o.with_optimizer,
        ),
    ),
    "data": ("data", 7, None, lambda m, o: m.benchmark_data(o.folder, rounds=o.rounds)),
    "report": ("stats", None, None, lambda m, o: m.benchmark_report(m.SyntheticRun(), o.folder)),
    "trace": (
        "trace",
        None,
        1,
        lambda m, o: m.benchmark_trace(
            o.recipe, o.set, ranks=o.ranks, deepspeed=o.deepspeed_config
        ),
    ),
    "gpu-predictions": ("claims", None, None, lambda m, o: m.benchmark_predictions(o.gpu)),
    "gpu": ("gpu", None, None, lambda m, o: m.benchmark_gpu(lambda line: print(line, flush=True))),
}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = [f"{name} {rounds}" for name, (_, rounds, *_) in SUITES.items() if rounds]
    ranks = [f"{name} {ranks}" for name, (_, _, ranks, _) in SUITES.items() if ranks]
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument(
        "--tokens", type=int, default=2048, help="conditional tokens of a pass, whole images"
    )
    parser.add_argument("--rounds", type=int, help=f"if left out: {', '.join(defaults)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", default="promoe_s")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="of the traced recipe"
    )
    parser.add_argument(
        "--deepspeed_config", type=Path, help="of the trace, ZeRO 2 in bf16 if left out"
    )
    parser.add_argument("--ranks", type=int, help=f"if left out: {', '.join(ranks)}")
    parser.add_argument("--ep-size", type=int, default=4, help="of the checkpoint")
    parser.add_argument(
        "--with-optimizer",
        action="store_true",
        help="convert the checkpoint's moments and raw weights as well",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the checkpoint is made, copied and converted (five times its "
        "weights' bytes, twice), the report's log (1 GB) or data (2 GB); a temporary "
        "folder if left out",
    )
    parser.add_argument("--gpu", default="h100", choices=DEVICES, help="that is predicted")
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    options = parser.parse_args(arguments)
    _, *defaults, _ = SUITES[options.suite]
    given = (options.rounds, options.ranks)
    options.rounds, options.ranks = (
        a if a is not None else b for a, b in zip(given, defaults, strict=True)
    )
    return options


def _size(options: argparse.Namespace) -> dict[str, Any]:
    return {"tokens": options.tokens, "rounds": options.rounds, "recipe": options.recipe}


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    for option, path, folder in (
        ("--out", options.out, options.out and options.out.parent),
        ("--folder", options.folder, options.folder),
    ):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{option} {path}: there is no folder {folder}: make it first")
    torch.set_num_threads(options.threads)
    sys.path.insert(0, _ROOT)
    module, _, _, run = SUITES[options.suite]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = Path(folder)
        result = run(import_module(f"benchmarks.{module}"), options)
    print("\n".join(result.lines()))
    if options.out is not None:
        options.out.write_text(json_text(result.as_json(), indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_entry(main)
