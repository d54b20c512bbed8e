"""Sample from an export: `python -m promoe_ds.cli.sample --model EXPORT_DIR --out DIR`. Needs no deepspeed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from promoe_ds.cli.entry import run_entry
from promoe_ds.config.diffusion import SOLVERS
from promoe_ds.errors import ConfigError
from promoe_ds.logs import configure_logging, get_logger


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="promoe_ds.cli.sample", description="Draw samples from an exported model.")
    parser.add_argument("--model", type=Path, required=True, help="export folder (tools/convert_checkpoint.py --to single)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--classes", help="comma-separated labels; all classes if left out")
    parser.add_argument("--num", type=int, help="samples in all, spread evenly over the classes; 10 a class if left out")
    parser.add_argument("--steps", type=int, help="solver steps; the recipe's default if left out")
    parser.add_argument("--cfg-scale", type=float, help="guidance scale; the recipe's default if left out")
    parser.add_argument("--solver", choices=["auto", *(name for names in SOLVERS.values() for name in names)],
                        help="must fit the model's objective; the recipe's default if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--grid", action="store_true", help="also write grid.png, one row a class")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Arguments to request to files."""
    options = parse_arguments(arguments)
    configure_logging(0)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: sampling runs in one process for now; start it with python -m")

    from promoe_ds.evaluation.sampling import SampleRequest, draw_samples

    request = SampleRequest(
        model=options.model, out=options.out, classes=_parse_classes(options.classes), num=options.num, steps=options.steps,
        cfg_scale=options.cfg_scale, solver=options.solver, seed=options.seed, batch_size=options.batch_size,
        device=options.device, grid=options.grid)
    for path in draw_samples(request):
        get_logger("sample").info("wrote %s", path)


def _parse_classes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--classes {text}: expected comma-separated integers, e.g. 1,2,3") from None


if __name__ == "__main__":
    run_entry(main)
