"""Report how a run uses its experts, from its routing.jsonl: a summary here, a page to open, files
to keep.

    promoe-load RUN_DIR                       summary, and RUN_DIR/expert_load.html
    promoe-load RUN_DIR --compare OTHER_RUN   both side by side
    promoe-load RUN_DIR --follow              a view that follows training
    promoe-load RUN_DIR --placement FILE      write an order of experts that evens out the ranks
"""

import argparse
import math
from pathlib import Path

from rich.console import Console

from promoe_ds.cli.entry import command
from promoe_ds.cli.options import Parser, number
from promoe_ds.reports.load.page import export, write_report
from promoe_ds.reports.load.placement import place
from promoe_ds.reports.load.run import open_runs
from promoe_ds.reports.load.terminal import follow, summarise

#: What --follow has nothing to do with.
_OF_A_REPORT = ("compare", "out", "export", "last_steps", "no_html", "placement", "ep_size")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__, "promoe-load")
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
        type=number(gt=0),
        metavar="N",
        help=(
            "steps that count as now, and that the table sums; if left out, the page's last tenth,"
            " the table's all"
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
        "--ep-size",
        type=number(gt=0),
        metavar="N",
        help="ranks to place on; as the run has if left out",
    )
    parser.add_argument(
        "--follow", action="store_true", help="show the newest log step until Ctrl-C"
    )
    parser.add_argument(
        "--every",
        type=number(float, gt=0, lt=math.inf),
        default=2.0,
        metavar="SECONDS",
        help="between looks with --follow (default 2)",
    )
    parser.add_import()
    options = parser.parse_args(arguments)
    if options.follow:
        parser.without_effect(options, *_OF_A_REPORT, reason="with --follow")
    else:
        parser.without_effect(options, "every", reason="without --follow")
    if options.placement is None:
        parser.without_effect(options, "ep_size", reason="without --placement")
    if options.no_html:
        parser.without_effect(options, "out", reason="with --no-html")
    return options


def main(arguments: list[str]) -> None:
    """Arguments to the summary, the page and the files.

    Raises: DataError for a log that cannot be read.
    """
    options = parse_arguments(arguments)
    console = Console(markup=False, emoji=False, highlight=False)  # names stay as they are
    if options.follow:
        follow(options.run_dir, console, every=options.every)
        return
    views = open_runs(
        [folder for folder in (options.run_dir, options.compare) if folder is not None],
        options.last_steps,
    )
    for view in views:
        summarise(view, console, everything=options.last_steps is None, is_named=len(views) > 1)
    if options.placement is not None:
        first = views[0]
        placed = place(first.log, first.window, options.placement, options.ep_size)
        console.print(placed, soft_wrap=True)
    if not options.no_html:
        out = options.out or views[0].log.path.with_name("expert_load.html")
        size = write_report(out, views)
        console.print(
            f"report: {out} ({size / 1e6:.2f} MB, one file, opens offline)", soft_wrap=True
        )
    if options.export is not None:
        console.print(
            f"exported {export(options.export, views)} figures as PNG and CSV to {options.export}",
            soft_wrap=True,
        )


run = command(main)

if __name__ == "__main__":
    run()
