#!/usr/bin/env python
"""Convert a sharded training checkpoint to one file for one GPU: one process, no GPU needed, no engine started.

    python tools/convert_checkpoint.py runs/digits_promoe exports/digits --to single
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from promoe_ds.cli.entry import run_entry


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkpoint folder, or a run directory (its newest complete checkpoint)")
    parser.add_argument("destination", type=Path, help="folder to write; must not hold an export yet")
    parser.add_argument("--to", required=True, choices=["single"], help="target format")
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema", help="moving average (default) or trained weights")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from promoe_ds.engine.convert import convert_to_single

    report = convert_to_single(options.source, options.destination, weights=options.weights)
    sys.stdout.write(f"{options.destination}: {report.parameters:,} parameters ({options.weights}, step {report.step}) from "
                     f"{report.source}, checked against its manifest and read back\n")


if __name__ == "__main__":
    run_entry(main)
