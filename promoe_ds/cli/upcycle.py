"""Make a mixture of experts of a dense model: promoe-upcycle SOURCE DESTINATION --recipe promoe_b

SOURCE is a dense checkpoint of any format that promoe-convert reads; DESTINATION is then trained
with `--resume DESTINATION`. The shared experts take the first hidden units of every dense
feed-forward, all other experts the rest; prototypes start at the k-means centroids of real tokens.
docs/guides/finetune.md says what of the dense function is kept.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from promoe_ds.cli.entry import command
from promoe_ds.cli.options import Parser, number


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument(
        "destination",
        type=Path,
        metavar="DESTINATION",
        help="folder to write; must not exist, or be empty",
    )
    parser.add_argument(
        "--recipe", required=True, metavar="NAME_OR_PATH", help="of the mixture of experts"
    )
    parser.add_overrides("change a value of --recipe")
    parser.add_argument(
        "--to", choices=["deepspeed", "single"], default="deepspeed", help="target format"
    )
    parser.add_argument(
        "--weights",
        choices=["ema", "raw"],
        help="of the dense model; ema where it has one, if left out",
    )
    parser.add_argument(
        "--prototypes",
        choices=["kmeans", "random"],
        default="kmeans",
        help="where routers start; random needs no data, and leaves outputs unscaled",
    )
    parser.add_argument(
        "--images",
        type=number(ge=1),
        default=64,
        help="of the recipe's data, whose tokens are clustered",
    )
    parser.add_argument(
        "--noise",
        type=number(float, ge=0, lt=math.inf),
        default=0.0,
        help="on routed experts' incoming weights, relative to their spread",
    )
    parser.add_argument(
        "--source-recipe",
        metavar="NAME_OR_PATH",
        help="architecture of a .pth file of the published code",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Arguments to request to the mixture of experts."""
    options = parse_arguments(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from promoe_ds.checkpoint.conversion import UpcycleRequest, upcycle
    from promoe_ds.config import load_config

    request = UpcycleRequest(
        destination=options.destination,
        to=options.to,
        weights=options.weights,
        images=options.images,
        prototypes=options.prototypes,
        noise=options.noise,
    )
    source_config = load_config(options.source_recipe) if options.source_recipe else None
    report, differences = upcycle(
        options.source, load_config(options.recipe, options.overrides), request, source_config
    )
    sys.stdout.write(
        f"{options.destination.absolute()}: {report.parameters:,} parameters from"
        f" {report.values:,}\n{report.note}\n"
    )
    if differences:
        measured = ", ".join(f"{name} {value:.2e}" for name, value in differences.items())
        sys.stdout.write(
            f"difference of predictions on {options.images} training images, relative: {measured}\n"
        )


run = command(main)

if __name__ == "__main__":
    run()
