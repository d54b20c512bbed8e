#!/usr/bin/env python
"""Summarise expert load from a run's routing.jsonl: python tools/expert_load.py RUN_DIR [--last-steps N]."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from promoe_ds.analysis.expert_load import LayerLoad, read_routing_log, summarise_load
from promoe_ds.cli.entry import run_entry


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--last-steps", type=int, help="only the last so many training steps; all if left out")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    loads = summarise_load(read_routing_log(options.run_dir), last_steps=options.last_steps)
    table = make_table(loads)
    # Never wrapped: a narrow terminal or a pipe gets the whole line.
    Console(width=max(Console().width, Console(width=1000).measure(table).maximum)).print(table)


def make_table(loads: list[LayerLoad]) -> Table:
    """Return one row a layer: each expert's share, evenness, split by condition, prototypes, traffic."""
    table = Table(title="Expert load (share of routed tokens; max/mean 1.00 = even)", title_justify="left", box=SIMPLE)
    experts = [f"e{expert}" for expert in range(len(loads[0].tokens_per_expert))]
    for name in ("layer", *experts, "max/mean", "CV", "dead", "conditional", "null", "prototype cos", "exchanged"):
        table.add_column(name, justify="right", no_wrap=True)
    for load in loads:
        table.add_row(str(load.layer), *(f"{share:.1%}" for share in load.shares), f"{load.max_over_mean:.2f}",
                      f"{load.coefficient_of_variation:.2f}", str(load.tokens_per_expert.count(0)),
                      f"{load.conditional_tokens:,}", f"{load.unconditional_tokens:,}", f"{load.prototype_similarity:+.2f}",
                      f"{load.bytes_exchanged / 1e6:,.1f} MB")
    return table


if __name__ == "__main__":
    run_entry(main)
