"""Sample from an export: `python -m promoe_ds.cli.sample --model EXPORT_DIR --out DIR`, also under
torchrun or deepspeed.

Needs no deepspeed. The same command resumes after an interruption.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from promoe_ds.cli.entry import run_entry
from promoe_ds.config.diffusion import SOLVERS
from promoe_ds.errors import ConfigError
from promoe_ds.logs import configure_logging, get_logger, rank_from_environment


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="promoe_ds.cli.sample", description="Sample images from an exported model."
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help="export folder (tools/convert_checkpoint.py --to single)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--classes", help="comma-separated labels; all classes if left out")
    parser.add_argument(
        "--labels",
        choices=["balanced", "random"],
        default="balanced",
        help="the classes in turn, or at random",
    )
    # Launchers take --num for an abbreviation of their own options; the long name passes.
    parser.add_argument(
        "--num",
        "--num-samples",
        type=int,
        help=(
            "samples in all; 10 a class if left out; under torchrun and deepspeed write"
            " --num-samples"
        ),
    )
    parser.add_argument("--steps", type=int, help="solver steps; the recipe's default if left out")
    parser.add_argument(
        "--cfg-scale", type=float, help="guidance scale; the recipe's default if left out"
    )
    parser.add_argument(
        "--solver",
        choices=["auto", *(name for names in SOLVERS.values() for name in names)],
        help="must fit the model's objective; the recipe's default if left out",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="images a process samples at once, without --exact",
    )
    parser.add_argument(
        "--exact",
        action=argparse.BooleanOptionalAction,
        default=False,
        help=(
            "one image a pass, on one thread: every bit depends on seed, index and label alone; in"
            " batches images agree to rounding"
        ),
    )
    parser.add_argument(
        "--vae", metavar="DIR_OR_ID", help="AutoencoderKL that decodes latents into images"
    )
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of the network's weights"
    )
    parser.add_argument(
        "--ep-size",
        type=int,
        default=1,
        help="processes that share a set of experts: for models that fit no device",
    )
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--grid", action="store_true", help="also write grid.png, one row a class")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Arguments to request to files."""
    options = parse_arguments(arguments)
    configure_logging(rank_from_environment())
    fields = (
        "model",
        "out",
        "labels",
        "num",
        "steps",
        "cfg_scale",
        "solver",
        "seed",
        "batch_size",
        "device",
        "dtype",
        "vae",
        "exact",
        "ep_size",
        "grid",
    )
    classes = _parse_classes(options.classes)

    from promoe_ds.distributed.context import join_processes
    from promoe_ds.distributed.process_group import stop_distributed
    from promoe_ds.evaluation.sample_job import SampleRequest, draw_samples

    request = SampleRequest(classes=classes, **{name: getattr(options, name) for name in fields})
    for path in draw_samples(request, join_processes(options.device)):
        get_logger("sample").info("wrote %s", path)
    stop_distributed()


def _parse_classes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--classes {text}: expected comma-separated integers, e.g. 1,2,3"
        ) from None


run = partial(run_entry, main)

if __name__ == "__main__":
    run()
