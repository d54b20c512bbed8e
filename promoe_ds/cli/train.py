"""Train: `deepspeed --module promoe_ds.cli.train --recipe NAME --deepspeed_config FILE`, or
torchrun, srun, python -m.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from promoe_ds.cli.entry import run_entry
from promoe_ds.config import (
    field_lines,
    load_config,
    plan_batches,
    read_deepspeed_json,
    resolve_deepspeed,
)
from promoe_ds.launch.launchers import read_place
from promoe_ds.launch.shutdown import EarlySignals
from promoe_ds.logs import configure_logging, rank_from_environment


class _ShowFields(argparse.Action):
    """As --help: prints and exits, whatever else is missing."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        sys.stdout.write(field_lines(values))
        parser.exit()


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="promoe_ds.cli.train", description="Train a diffusion transformer."
    )
    parser.add_argument(
        "--recipe", required=True, help="name of a packaged recipe, or path of a .yaml file"
    )
    parser.add_argument(
        "--deepspeed_config", required=True, help="DeepSpeed JSON, e.g. ds_configs/zero2_bf16.json"
    )
    parser.add_argument("--run-dir", type=Path, help="default: runs/<recipe's name>")
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto (newest complete checkpoint of this run), none, or a path",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override the recipe, e.g. train.max_steps=100",
    )
    parser.add_argument(
        "--fields",
        action=_ShowFields,
        nargs="?",
        const="",
        metavar="SECTION",
        help="print what --set takes, with defaults and meaning (docs/recipes.md), and exit",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help=(
            "print config, sizes and memory plan, and exit; without a launcher for the fewest ranks"
            " possible"
        ),
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Arguments to config to engine."""
    options = parse_arguments(arguments)
    early = None if options.dry_run else EarlySignals()  # before the imports, which take seconds
    configure_logging(rank_from_environment())
    place = read_place(os.environ)
    config = load_config(options.recipe, options.overrides)
    values = read_deepspeed_json(options.deepspeed_config)

    from promoe_ds.versions import check_deepspeed

    check_deepspeed()
    # A dry run needs no launcher: it assumes the fewest ranks that the recipe runs on.
    world_size = (
        config.parallel.ep_size if options.dry_run and not place.launched else place.world_size
    )
    batches = plan_batches(config, world_size)
    plan = resolve_deepspeed(values, config, batches, source=options.deepspeed_config)
    if early is None:
        from promoe_ds.cli.dry_run import describe

        describe(config, plan, batches)
        return

    from promoe_ds.backends.process_group import start_distributed
    from promoe_ds.distributed.process_group import complete_environment, stop_distributed
    from promoe_ds.train.run import Run, train
    from promoe_ds.train.supervisor import supervised

    run_dir = options.run_dir or Path("runs") / config.name
    complete_environment()
    with supervised(
        config.supervision, run_dir, early, config.parallel.timeout_seconds
    ) as supervisor:
        ranks = start_distributed(config.parallel.timeout_seconds)
        evaluate = None
        if config.evaluation.every:
            from promoe_ds.evaluation.online import OnlineEvaluation

            evaluate = OnlineEvaluation(config, ranks)
        train(
            Run(
                config=config,
                deepspeed_plan=plan,
                run_dir=run_dir,
                resume=options.resume,
                evaluate=evaluate,
            ),
            ranks,
            supervisor,
        )
        stop_distributed()


run = partial(run_entry, main)

if __name__ == "__main__":
    run()
