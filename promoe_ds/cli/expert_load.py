"""Report how a run uses its experts, from its routing.jsonl: a summary here, a page to open, files
to keep.

promoe-load RUN_DIR                       summary, and RUN_DIR/expert_load.html
promoe-load RUN_DIR --compare OTHER_RUN   both side by side
promoe-load RUN_DIR --follow              a view that follows training
promoe-load RUN_DIR --placement FILE      write an order of experts that evens out the ranks
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from promoe_ds.cli.entry import run_entry
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.reports.expert_load.page import export, write_report
from promoe_ds.reports.expert_load.placement import advise, unevenness, write_placement
from promoe_ds.reports.expert_load.run import RunView, open_runs
from promoe_ds.reports.expert_load.terminal import (
    findings_text,
    follow,
    load_table,
    placement_table,
)

#: What --follow has nothing to do with.
_OF_A_REPORT = ("compare", "out", "export", "last_steps", "no_html", "placement", "ep_size")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="directory of a run, or its routing.jsonl")
    parser.add_argument(
        "--compare", type=Path, metavar="RUN_DIR", help="a second run, side by side"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page; RUN_DIR/expert_load.html if left out"
    )
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="also every figure as PNG and its numbers as CSV"
    )
    parser.add_argument(
        "--last-steps",
        type=int,
        metavar="N",
        help=(
            "what counts as now, and what the table sums: the last so many "
            "training steps; if left out, the table sums all and the page shows the last tenth"
        ),
    )
    parser.add_argument("--no-html", action="store_true", help="the summary alone")
    parser.add_argument(
        "--placement",
        type=Path,
        metavar="FILE",
        help="write a placement for parallel.expert_placement",
    )
    parser.add_argument(
        "--ep-size", type=int, metavar="N", help="ranks to place on; as the run has if left out"
    )
    parser.add_argument(
        "--follow", action="store_true", help="show the newest log step until Ctrl-C"
    )
    parser.add_argument(
        "--every", type=float, metavar="SECONDS", help="between looks with --follow; 2 if left out"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Arguments to the summary, the page and the files.

    Raises: ConfigError for flags without effect; DataError for a log that cannot be read.
    """
    options = parse_arguments(arguments)
    check(options)
    console = Console()
    if options.follow:
        follow(options.run_dir, console, every=2.0 if options.every is None else options.every)
        return
    views = open_runs(
        [folder for folder in (options.run_dir, options.compare) if folder is not None],
        options.last_steps,
    )
    for view in views:
        summarise(view, console, everything=options.last_steps is None, is_named=len(views) > 1)
    if options.placement is not None:
        place(views[0], console, options.placement, options.ep_size)
    if not options.no_html:
        out = options.out or views[0].log.path.with_name("expert_load.html")
        size = write_report(out, views)
        console.print(
            f"report: {out} ({size / 1e6:.2f} MB, one file, opens offline)",
            highlight=False,
            soft_wrap=True,
        )
    if options.export is not None:
        console.print(
            f"exported {export(options.export, views)} figures as PNG and CSV to {options.export}",
            soft_wrap=True,
        )


def check(options: argparse.Namespace) -> None:
    """Refuse numbers that cannot be and flags that would have no effect.

    Raises: ConfigError naming the flag.
    """
    for name, value in (
        ("--last-steps", options.last_steps),
        ("--ep-size", options.ep_size),
        ("--every", options.every),
    ):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} {value}: must be above 0, and finite")
    given = [name for name in _OF_A_REPORT if getattr(options, name)]
    if options.follow and given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} is of the report and has no effect with --follow:"
            " leave one of them out"
        )
    for name, other in (("every", "follow"), ("ep_size", "placement")):
        if getattr(options, name) is not None and not getattr(options, other):
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect without --{other}: add that, or leave"
                " it out"
            )
    if options.no_html and options.out is not None:
        raise ConfigError("--out has no effect with --no-html: leave one of them out")


def summarise(view: RunView, console: Console, *, everything: bool, is_named: bool) -> None:
    """Print a run's table, findings and placements."""
    if is_named:
        console.rule(view.name)
    table = load_table(
        view,
        slice(None) if everything else view.window,
        covered="all steps" if everything else f"last {view.window_steps:,} steps",
    )
    # Never wrapped: a narrow terminal or a pipe gets the whole line.
    Console(width=max(console.width, Console(width=1000).measure(table).maximum)).print(table)
    console.print(findings_text(view), soft_wrap=True)
    console.print(placement_table(view))


def place(view: RunView, console: Console, path: Path, ep_size: int | None) -> None:
    """Write the advised placement and say what it is expected to give.

    Raises: DataError if the window has no tokens to judge by.
    """
    size = ep_size or view.log.ep_size
    if not view.tokens_LE.any():
        raise DataError(
            f"--placement {path}: no token was routed in the last {view.window_steps:,} steps, so"
            " there is nothing to judge by: take a longer window with --last-steps"
        )
    order = advise(view.log, view.window, size)
    tokens = view.log.tokens_TLE[view.window]
    before, after = (
        np.nanmean(unevenness(tokens, each, size)) for each in (view.log.order_LE, order)
    )
    write_placement(path, view.log, order, size)
    moved = int((order != view.log.order_LE).sum())
    what = (
        f"{moved} of {order.size} experts move"
        if moved
        else "no expert moves, nothing better was found"
    )
    change = f"{before:.3f} -> {after:.3f}" if moved else f"{before:.3f}"
    apply = (
        f" Apply it at the next resume: --set parallel.expert_placement={path}"
        if moved or size != view.log.ep_size
        else ""
    )
    console.print(
        f"placement: {path}: {what}; fullest of {size} ranks over the mean {change}.{apply}",
        highlight=False,
        soft_wrap=True,
    )


run = partial(run_entry, main)

if __name__ == "__main__":
    run()
