"""Compare recipes at equal activated parameters, data order and seeds; a table and plots as one
HTML and one JSON.

    promoe-compare --recipes digits_promoe --variant no_rcl=digits_promoe,routing.rcl_weight=0 \\
        --steps 900 --seeds 0,1,2 --out runs/comparison
    promoe-compare --methods digits --steps 900 --seeds 0,1,2 --out runs/methods

The first candidate is the one that the others are compared with. The same command continues what is
unfinished; with candidates or seeds added, only those are trained.
"""

import argparse
import signal
import sys
from pathlib import Path

from promoe_ds.cli.entry import command
from promoe_ds.cli.options import Parser, listed, number
from promoe_ds.errors import Interrupted
from promoe_ds.evaluation.judges.table import JUDGES
from promoe_ds.reports.comparison.candidates import ComparisonRequest, methods_of
from promoe_ds.reports.comparison.experiment import compare


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__, "promoe-compare")
    parser.add_argument(
        "--methods",
        choices=JUDGES,
        help="all methods' recipes of this data set, and ProMoE without each of its parts",
    )
    parser.add_argument(
        "--recipes",
        type=_names,
        default=(),
        help="comma-separated names of packaged recipes, or paths of .yaml files",
    )
    parser.add_argument(
        "--variant",
        dest="variants",
        action="append",
        default=[],
        metavar="NAME=RECIPE,SECTION.FIELD=VALUE,...",
        help="a recipe with overrides, under a name of its own; may be repeated",
    )
    parser.add_overrides("overrides for all candidates")
    parser.add_argument(
        "--steps", type=number(ge=1), required=True, help="optimizer steps of every run"
    )
    parser.add_argument("--seeds", type=_seeds, default=(0,), help="comma-separated, e.g. 0,1,2")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the experiment: report and runs"
    )
    parser.add_argument(
        "--jobs",
        type=number(ge=1),
        default=2,
        help="runs at a time; 1 where one GPU serves them all",
    )
    parser.add_argument("--ranks", type=number(ge=1), default=1, help="processes of each run")
    parser.add_deepspeed_config(ComparisonRequest.deepspeed_config)
    parser.add_argument(
        "--samples",
        type=number(ge=2),
        default=500,
        help="drawn from every run, where its data set has a judge",
    )
    parser.add_argument(
        "--sample-seed",
        type=number(ge=0, lt=2**63),
        default=0,
        help="of the initial noise, equal for all",
    )
    parser.add_argument(
        "--tolerance",
        type=number(float, ge=0),
        default=0.05,
        help="how far activated parameters may be apart, 0.05 = 5%%",
    )
    return parser.parse_args(arguments)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _seeds(text: str) -> tuple[int, ...]:
    seeds = listed(number(ge=0, lt=2**63))(text)
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text}: expected different integers, e.g. 0,1,2")
    return seeds


def main(arguments: list[str]) -> None:
    """Arguments to request to the report of all runs.

    Raises: ConfigError for what cannot be compared; TrainingError if runs failed; Interrupted.
    """
    options = parse_arguments(arguments)
    # Also where a shell or a batch system starts us with interrupts ignored, or ends us with
    # SIGTERM: children end with us.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if methods := vars(options).pop("methods"):
        recipes, variants = methods_of(methods)
        options.recipes = (*recipes, *options.recipes)
        options.variants = [*variants, *options.variants]
    request = ComparisonRequest(**vars(options))
    try:
        for path in compare(request):
            sys.stdout.write(f"wrote {path}\n")
    except KeyboardInterrupt:
        raise Interrupted("the same command resumes from the newest checkpoints") from None


run = command(main)

if __name__ == "__main__":
    run()
