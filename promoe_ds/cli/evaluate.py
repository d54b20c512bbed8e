"""Evaluate samples: `python -m promoe_ds.cli.evaluate --samples DIR_OR_NPZ --reference NPZ_OR_DIR
--out metrics.json`.

Also under torchrun or deepspeed. Needs no deepspeed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from promoe_ds.cli.entry import run_entry
from promoe_ds.errors import ConfigError
from promoe_ds.logs import configure_logging, get_logger, rank_from_environment


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="promoe_ds.cli.evaluate", description="FID, sFID, IS, precision and recall of samples."
    )
    parser.add_argument(
        "--samples",
        type=Path,
        required=True,
        help="folder of samples, or npz with arr_0 (N, H, W, C) uint8",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        help="npz with mu, sigma, mu_s, sigma_s and arr_0 as ADM's, or folder of images",
    )
    parser.add_argument(
        "--metrics", help="comma-separated, of fid, sfid, is, precision and recall; all if left out"
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
        "--batch-size", type=int, default=64, help="images a process looks at at once"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("metrics.json"),
        help="JSON with the figures and what they depend on",
    )
    parser.add_argument(
        "--save-reference", type=Path, metavar="NPZ", help="also write the reference's statistics"
    )
    parser.add_argument(
        "--half-precision-manifold",
        action="store_true",
        help=(
            "distances for precision and recall in half "
            "precision, as ADM's script computes them: other digits than fp64's"
        ),
    )
    parser.add_argument("--device", help="this process's GPU where there is one, else cpu")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Arguments to request to metrics.json."""
    options = parse_arguments(arguments)
    configure_logging(rank_from_environment())
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: must be at least 1")

    from promoe_ds.distributed.context import join_processes
    from promoe_ds.distributed.process_group import stop_distributed
    from promoe_ds.evaluation.metrics import (
        METRICS,
        EvaluateRequest,
        check_target,
        evaluate,
        write_metrics,
    )

    team = join_processes(options.device)
    team.on_main(lambda: check_target(options.out, "--out"))
    metrics = tuple(METRICS if options.metrics is None else options.metrics.split(","))
    request = EvaluateRequest(
        samples=options.samples,
        reference=options.reference,
        metrics=metrics,
        extractor=options.extractor,
        batch_size=options.batch_size,
        save_reference=options.save_reference,
        half_precision_manifold=options.half_precision_manifold,
    )
    figures = evaluate(request, team)
    if team.is_main:
        # Shown before they are written: the disk may be full by now.
        sys.stdout.write(
            "".join(f"{name:10}{value:12.6f}\n" for name, value in figures["metrics"].items())
        )
        sys.stdout.flush()
        write_metrics(options.out, figures)
        get_logger("evaluate").info("wrote %s", options.out)
    stop_distributed()


run = partial(run_entry, main)

if __name__ == "__main__":
    run()
