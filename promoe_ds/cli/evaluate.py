"""Evaluate samples: FID, sFID, IS, precision and recall; or by a data set's own judge.

    promoe-evaluate --samples samples --reference VIRTUAL_imagenet256_labeled.npz --out metrics.json
    promoe-evaluate --samples samples --dataset emoji

Also under torchrun or deepspeed. Needs no deepspeed. Samples of the data sets digits and emoji are
judged without a reference or a download, by one process.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from promoe_ds.cli.entry import command, joined_processes
from promoe_ds.cli.options import Parser, check_target, number, size, write_figures
from promoe_ds.errors import ConfigError

#: As many held-out captions of emoji as there are, and as many known ones.
_PROMPTS = 254


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__, "promoe-evaluate")
    parser.add_argument(
        "--samples",
        type=Path,
        help="folder of samples, or npz with arr_0 (N, H, W, C) uint8, or with mu and sigma",
    )
    parser.add_argument(
        "--image-size",
        type=size,
        metavar="PIXELS",
        help="crop and resize a folder's images to this side, or to HxW",
    )
    parser.add_argument("--num", type=number(ge=1), help="evaluate the first so many samples")
    parser.add_argument(
        "--reference",
        type=Path,
        help="npz with mu, sigma, mu_s, sigma_s and arr_0 as ADM's, or folder of images",
    )
    _add_metrics(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("metrics.json"),
        help="JSON with the figures and what they depend on",
    )
    parser.add_argument(
        "--save-reference", type=Path, metavar="NPZ", help="also write the reference's statistics"
    )
    parser.add_process()
    _add_judge(parser)
    options = parser.parse_args(arguments)
    is_judged = options.dataset is not None
    parser.require(
        options.samples or options.write_prompts,
        "--samples is needed: the folder of samples, or an npz",
    )
    if is_judged:
        other = ["reference", "metrics", "extractor", "clip", "batch_size", "save_reference"]
        other += ["half_precision_manifold", "image_size"]
        other += [] if options.write_prompts else ["num"]
        parser.without_effect(options, *other, reason="on a data set's own judge")
    else:
        parser.without_effect(options, "write_prompts", reason="without --dataset")
    return options


def _add_metrics(parser: Parser) -> None:
    """Add what is computed, and of which features."""
    parser.add_argument(
        "--metrics",
        help=(
            "comma-separated, of fid, sfid, is, precision, recall and clip_score; all but the last"
            " if left out"
        ),
    )
    parser.add_argument(
        "--extractor",
        default="inception",
        help=(
            "inception, inception:WEIGHTS, pixels, FILE.pt (TorchScript), or "
            "FILE.py:NAME (a module)"
        ),
    )
    parser.add_argument(
        "--clip",
        metavar="DIR_OR_HUB_ID",
        help="CLIP of transformers, for clip_score: how near samples are to their prompts",
    )
    parser.add_argument(
        "--batch-size", type=number(ge=1), default=64, help="images that a process takes at once"
    )
    parser.add_argument(
        "--half-precision-manifold",
        action="store_true",
        help=(
            "distances for precision and recall in half "
            "precision, as ADM's script computes them: other digits than fp64's"
        ),
    )


def _add_judge(parser: Parser) -> None:
    """Add the judges of data sets that a package brings."""
    parser.add_argument(
        "--dataset",
        help="digits or emoji: judge samples by that data set's own judge instead",
    )
    parser.add_argument(
        "--write-prompts",
        type=Path,
        metavar="FILE",
        help="with --dataset emoji: write --num captions (254 if left out) to sample, and exit",
    )


def main(arguments: list[str]) -> None:
    """Arguments to request to metrics.json."""
    options = parse_arguments(arguments)
    if options.write_prompts is not None:
        write_prompts(options.dataset, options.num or _PROMPTS, options.write_prompts)
    elif options.dataset is not None:
        judge(options.dataset, options.samples, options.out)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Compare samples with a reference; show the figures and write them."""
    from promoe_ds.evaluation.metrics import METRICS, EvaluateRequest, evaluate

    request = EvaluateRequest(
        samples=options.samples,
        reference=options.reference,
        metrics=tuple(METRICS if options.metrics is None else options.metrics.split(",")),
        extractor=options.extractor,
        batch_size=options.batch_size,
        save_reference=options.save_reference,
        half_precision_manifold=options.half_precision_manifold,
        image_size=options.image_size,
        num=options.num,
        clip=options.clip,
    )
    with joined_processes(options.device) as team:
        team.on_main(lambda: check_target(options.out, "--out"))
        if options.save_reference is not None:
            team.on_main(lambda: check_target(options.save_reference, "--save-reference"))
        figures = evaluate(request, team)
        if team.is_main:
            # Shown before they are written: the disk may be full by now.
            for name, value in figures["metrics"].items():
                sys.stdout.write(f"{name:10}{value:12.6f}\n")
            write_figures(options.out, figures)


def judge(dataset: str, samples: Path, out: Path | None) -> dict[str, Any]:
    """Judge samples by their data set's judge; show, write and return the figures."""
    from promoe_ds.evaluation.judges.table import judge_of

    own = judge_of(dataset)
    if out is not None:
        check_target(out, "--out")
    report = own.judge(samples)
    sys.stdout.write(own.words(report))
    if out is not None:
        write_figures(out, {"dataset": dataset, **report})
    return report


def write_prompts(dataset: str, num: int, path: Path) -> None:
    """Write what a data set's judge wants to be drawn, one prompt a line."""
    from promoe_ds.evaluation.judges.table import judge_of

    prompts = judge_of(dataset).wanted(num).get("prompts", ())
    check_target(path, "--write-prompts")
    if not prompts:
        raise ConfigError(
            f"--write-prompts {path}: this data set has classes, no prompts: leave it out"
        )
    path.write_text("".join(f"{each}\n" for each in prompts), encoding="utf-8")


run = command(main)

if __name__ == "__main__":
    run()
