"""Judge samples of a digits model: what share of them a classifier recognises, digit by digit.

    promoe-evaluate-digits samples
    promoe-evaluate-digits samples --out report.json --require 0.85

Needs scikit-learn (promoe_ds[report]).
"""

import argparse
from pathlib import Path

from promoe_ds.cli.entry import command
from promoe_ds.cli.evaluate import judge
from promoe_ds.cli.options import Parser, number
from promoe_ds.errors import DataError


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__, "promoe-evaluate-digits")
    parser.add_argument("samples", type=Path, help="samples.npz or the folder that holds it")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument(
        "--require",
        type=number(float, ge=0, le=1),
        default=0.0,
        metavar="SHARE",
        help="fail if a smaller share of the samples is recognised",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Arguments to figures on standard output.

    Raises: DataError if fewer samples are recognised than required.
    """
    options = parse_arguments(arguments)
    report = judge("digits", options.samples, options.out)
    if report["accuracy"] < options.require:
        raise DataError(
            f"only {report['accuracy']:.1%} of the samples were recognised, {options.require:.1%}"
            " are required"
        )


run = command(main)

if __name__ == "__main__":
    run()
