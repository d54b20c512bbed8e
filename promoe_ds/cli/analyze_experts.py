"""Analyse what a model's experts specialise in, from an export and a batch of its data.

    promoe-experts exports/digits            writes exports/digits/experts.html and .json
    promoe-experts exports/digits --images 256 --out experts.html --export figures

Needs scikit-learn and vl-convert (promoe_ds[report]).
"""

import argparse
import sys
from pathlib import Path

from promoe_ds.cli.entry import command
from promoe_ds.cli.options import Parser, number
from promoe_ds.config import change_config
from promoe_ds.data import build_dataset
from promoe_ds.distributed.process_group import check_device
from promoe_ds.model.export import load_model
from promoe_ds.reports.page import write_charts
from promoe_ds.reports.specialisation.analysis import Settings, analyse, draw_images
from promoe_ds.reports.specialisation.page import (
    check_place,
    layer_charts,
    overview_charts,
    write_report,
)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    defaults = Settings()
    parser = Parser(__doc__, "promoe-experts")
    parser.add_argument("export_dir", type=Path, help="folder of promoe-convert --to single")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page; its numbers go beside it as .json"
    )
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="also every figure as PNG and its numbers as CSV"
    )
    parser.add_argument("--images", type=number(ge=2), default=64, help="images of the batch")
    parser.add_argument(
        "--data-path", metavar="DIR", help="folder of latents, if not where training had it"
    )
    parser.add_argument(
        "--sigmas",
        type=number(float, ge=0, le=1),
        nargs="+",
        default=list(defaults.sigmas),
        help="noise levels",
    )
    parser.add_argument(
        "--tokens",
        type=number(ge=20),
        default=defaults.tokens,
        help="tokens of a level for t-SNE and k-means",
    )
    parser.add_argument(
        "--singular-vectors", type=int, default=defaults.singular_vectors, metavar="K"
    )
    parser.add_argument(
        "--rounds",
        type=number(ge=1),
        default=defaults.rounds,
        help="shufflings that say what chance is",
    )
    parser.add_argument("--seed", type=number(ge=0, lt=2**32), default=defaults.seed)
    parser.add_argument("--device", default="cpu")
    parser.add_import()
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Arguments to the page and its numbers.

    Raises: ConfigError for values that cannot be; DataError for data or an export that cannot be
    read.
    """
    options = parse_arguments(arguments)
    out = options.out or options.export_dir / "experts.html"
    check_device(options.device)
    network = load_model(options.export_dir, device=options.device)
    check_place(out)
    if options.export is not None:
        write_charts(options.export, ())  # before a long analysis, whether it can be written
    config = network.config
    if options.data_path is not None:
        config = change_config(config, data={"path": options.data_path})
    batch = draw_images(build_dataset(config), options.images, options.seed)
    settings = Settings(
        sigmas=tuple(options.sigmas),
        tokens=options.tokens,
        singular_vectors=options.singular_vectors,
        rounds=options.rounds,
        seed=options.seed,
    )
    analysis = analyse(network, batch, settings, name=options.export_dir.resolve().name)
    for layer in analysis.layers:
        found = ", ".join(
            f"{kind} {each.score:+.3f} (p {each.p_value:.3f})"
            for kind, each in layer.information.items()
        )
        sys.stdout.write(f"layer {layer.layer}: the expert depends, beyond chance, on: {found}\n")
    write_report(analysis, out)
    sys.stdout.write(
        f"report: {out} (one file, opens offline); numbers: {out.with_suffix('.json')}\n"
    )
    if options.export is not None:
        charts = [
            *overview_charts(analysis),
            *(chart for layer in analysis.layers for chart in layer_charts(analysis, layer)),
        ]
        sys.stdout.write(
            f"exported {write_charts(options.export, charts)} figures as PNG and CSV to"
            f" {options.export}\n"
        )


run = command(main)

if __name__ == "__main__":
    run()
