"""Judge samples of a digits model: promoe-evaluate-digits SAMPLES_DIR [--out report.json]
[--require 0.85].
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from promoe_ds.cli.entry import command
from promoe_ds.cli.options import Parser
from promoe_ds.errors import DataError
from promoe_ds.files import json_text


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("samples", type=Path, help="samples.npz or the folder that holds it")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument(
        "--require", type=float, default=0.0, help="fail if fewer samples are recognised"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Arguments to figures on standard output.

    Raises: DataError if fewer samples are recognised than required.
    """
    options = parse_arguments(arguments)
    from promoe_ds.evaluation.digits import judge_samples

    report = judge_samples(options.samples)
    by_class = "  ".join(
        f"{label}: {share:.0%}" for label, share in report.accuracy_by_class.items()
    )
    sys.stdout.write(f"""{report.samples} samples
  recognised as their label by a classifier trained on real digits: {report.accuracy:.1%}
    (the same classifier on real digits it has not seen: {report.accuracy_on_real:.1%})
    {by_class}
  Frechet distance of the pixels to real digits never trained on: {report.frechet:.3f}
    (0 = same mean and covariance; the training digits: {report.frechet_of_training_digits:.3f}, \
uniform noise: {report.frechet_of_noise:.3f})
""")
    if options.out is not None:
        options.out.write_text(json_text(asdict(report), indent=1), encoding="utf-8")
    if report.accuracy < options.require:
        raise DataError(
            f"only {report.accuracy:.1%} of the samples were recognised, {options.require:.1%} are"
            " required"
        )


run = command(main)

if __name__ == "__main__":
    run()
