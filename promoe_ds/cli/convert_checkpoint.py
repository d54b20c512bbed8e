"""Convert checkpoints between formats: one process, no GPU needed, no engine started, one tensor in
memory at a time.

    promoe-convert runs/digits_promoe exports/digits --to single
    promoe-convert ckpt_step_500000.pth start --to deepspeed --recipe promoe_b

SOURCE is a checkpoint folder, a run directory (its newest checkpoint), a single export, a diffusers
pipeline, or a `.pth` file of the published code, whose architecture --recipe names. Formats:

    single     a folder for one GPU: promoe_ds.load_model reads it without deepspeed
    official   ckpt_step_N.pth as the published code writes and reads it
    diffusers  a ProMoEPipeline's folder
    deepspeed  a folder to --resume from, on any number of ranks: with --with-optimizer at the
               same step, without it a new run from the weights
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
    parser = Parser(__doc__, "promoe-convert")
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE")
    add("destination", type=Path, metavar="DESTINATION", help="folder to write, new or empty")
    add(
        "--to",
        required=True,
        choices=["single", "official", "diffusers", "deepspeed"],
        help="target format",
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights",
        metavar="ema|raw|NAME",
        help=(
            "first moving average, trained weights, or an average by name; if left out, ema for"
            " single and diffusers, all of them for the others"
        ),
    )
    weights.add_argument(
        "--ema-sigma-rel",
        type=float,
        metavar="LENGTH",
        help=(
            "mix a moving average of another length from those of optimizer.ema_sigma_rels, e.g."
            " 0.08"
        ),
    )
    add(
        "--with-optimizer",
        action="store_true",
        help="AdamW's moments and all sets of weights as well",
    )
    add("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the weights written")
    add(
        "--max-shard-size",
        type=number(float, gt=0, lt=math.inf),
        default=2.0,
        metavar="GB",
        help="largest safetensors file (default 2)",
    )
    add("--vae", metavar="DIR_OR_ID", help="autoencoder of the latents, for --to diffusers")
    add("--text-encoder", metavar="DIR_OR_ID", help="of the model's prompts, for --to diffusers")
    add("--recipe", metavar="NAME_OR_PATH", help="architecture of a .pth file")
    parser.add_overrides("change a value of --recipe")
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the target back and compare every value (default)",
    )
    options = parser.parse_args(arguments)
    _check(parser, options)
    return options


def _check(parser: Parser, options: argparse.Namespace) -> None:
    """End with what does not go together."""
    to, moments, rounded = options.to, options.with_optimizer, options.dtype != "fp32"
    parser.require(
        not (moments and to == "diffusers"),
        "--with-optimizer: a diffusers pipeline has weights only; use --to single, official or"
        " deepspeed",
    )
    parser.require(
        not (moments and options.weights and to in ("official", "deepspeed")),
        "--weights --with-optimizer: the moments belong to the raw weights; leave one out",
    )
    parser.require(
        not (rounded and to == "deepspeed"),
        "--dtype: training keeps its weights in fp32; leave it out",
    )
    parser.require(
        not (rounded and moments),
        "--dtype --with-optimizer: no run continues exactly from rounded weights; leave one out",
    )
    parser.require(
        options.recipe or not options.overrides, "--set changes a value of --recipe: name one"
    )
    if options.ema_sigma_rel is not None:
        parser.without_effect(options, "recipe", reason="with --ema-sigma-rel, which takes a run")
    if to != "diffusers":
        parser.without_effect(options, "vae", "text_encoder", reason=f"with --to {to}")


def main(arguments: list[str]) -> None:
    """Arguments to request to the converted checkpoint."""
    options = parse_arguments(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from promoe_ds.checkpoint.conversion import Request, convert
    from promoe_ds.config import load_config

    config = load_config(options.recipe, options.overrides) if options.recipe else None
    request = Request(
        destination=options.destination,
        to=options.to,
        weights=options.weights,
        dtype=options.dtype,
        with_optimizer=options.with_optimizer,
        verify=options.verify,
        vae=options.vae,
        text_encoder=options.text_encoder,
        ema_sigma_rel=options.ema_sigma_rel,
        max_shard_bytes=int(options.max_shard_size * 10**9),
    )
    report = convert(options.source, request, config)
    kinds = ", ".join(
        kind if kind == source else f"{kind} (from {source})"
        for kind, source in report.kinds.items()
    )
    verdict = "read back and compared" if options.verify else "not read back"
    lines = (
        f"{options.destination.absolute()}: {report.parameters:,} parameters, step {report.step}:"
        f" {kinds}",
        report.note,
        f"from {report.source.path} ({report.source.format}): {report.values:,} values, each read"
        f" once; {report.bytes:,} bytes written, {verdict}",
    )
    sys.stdout.writelines(f"{line}\n" for line in lines if line)


run = command(main)

if __name__ == "__main__":
    run()
