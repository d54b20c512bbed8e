"""What follows a training: convert, sample, judge. `python -m promoe_ds.reports.comparison.judge
RUN_DIR ...`.

A process of its own, as the training was: a crash or a lack of memory costs one run, and ends with
it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from promoe_ds.errors import PromoeError
from promoe_ds.reports.comparison.results import JUDGED_DATASETS, JUDGEMENT_FILE, write_json


def judge_run(run_dir: Path, *, samples: int, sample_seed: int) -> dict[str, Any]:
    """Convert a run's newest checkpoint; of digits, also judge samples drawn from it, and its loss
    on the held-out ones.

    Image i starts from the noise of (sample_seed, i), whatever model draws it.
    Raises: PromoeError of the part that failed.
    """
    from promoe_ds.checkpoint.conversion import Request, convert
    from promoe_ds.model.export import load_model

    export, drawn = run_dir / "export", run_dir / "samples"
    for leftover in (
        export,
        drawn,
    ):  # of an attempt that was interrupted: whoever judged before would have left a result
        shutil.rmtree(leftover, ignore_errors=True)
    conversion = convert(run_dir, Request(destination=export, to="single"))
    judgement: dict[str, Any] = {
        "checkpoint_step": conversion.step,
        "device": _device_name(),
        "images": None,
        "heldout_loss": None,
    }
    model = load_model(export)
    if model.config.data.dataset in JUDGED_DATASETS:
        from promoe_ds.evaluation.digits import heldout_loss, judge_samples
        from promoe_ds.evaluation.sample_job import SampleRequest, draw_samples

        # In batches: several times faster for networks as small as these, and the last digit
        # decides nothing here.
        draw_samples(
            SampleRequest(model=export, out=drawn, num=samples, seed=sample_seed, exact=False)
        )
        judgement["images"] = asdict(judge_samples(drawn, model.config.data.heldout_fraction))
        judgement["heldout_loss"] = heldout_loss(model)
    return judgement


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def main(arguments: Sequence[str]) -> None:
    """Judge one run and write judgement.json into its directory."""
    parser = argparse.ArgumentParser(
        prog="promoe_ds.reports.comparison.judge", description="Convert, sample and judge a run."
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--sample-seed", type=int, required=True)
    options = parser.parse_args(arguments)
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # conversion wants no device; sampling asks torch for one
    judgement = judge_run(options.run_dir, samples=options.samples, sample_seed=options.sample_seed)
    write_json(options.run_dir / JUDGEMENT_FILE, judgement)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PromoeError as problem:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(problem.exit_code)
