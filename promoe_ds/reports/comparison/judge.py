"""What follows a training: convert, sample, judge.

`python -m promoe_ds.reports.comparison.judge RUN_DIR SAMPLES SAMPLE_SEED`, a process of its own, as
the training was: a crash or a lack of memory costs one run, and ends with it.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from promoe_ds.errors import PromoeError
from promoe_ds.files import write_json
from promoe_ds.reports.comparison.results import JUDGED_DATASETS, JUDGEMENT_FILE


def judge_run(run_dir: Path, *, samples: int, sample_seed: int) -> dict[str, Any]:
    """Convert a run's newest checkpoint; of digits, also judge samples drawn from it, and its loss
    on the held-out ones.

    Image i starts from the noise of (sample_seed, i), whatever model draws it.
    Raises: PromoeError of the part that failed.
    """
    # Conversion needs no device; sampling asks torch for one.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    from promoe_ds.checkpoint.conversion import Request, convert
    from promoe_ds.model.export import load_model

    export, drawn = run_dir / "export", run_dir / "samples"
    # Of an attempt that was interrupted: one that ended has left a result.
    for leftover in (export, drawn):
        shutil.rmtree(leftover, ignore_errors=True)
    conversion = convert(run_dir, Request(destination=export, to="single"))
    model, images, loss = load_model(export), None, None
    if model.config.data.dataset in JUDGED_DATASETS:
        from promoe_ds.evaluation.digits import heldout_loss, judge_samples
        from promoe_ds.evaluation.sample_job import SampleRequest, draw_samples

        # In batches: several times faster for networks as small as these, and the last digit
        # decides nothing here.
        draw_samples(
            SampleRequest(model=export, out=drawn, num=samples, seed=sample_seed, exact=False)
        )
        images = asdict(judge_samples(drawn, model.config.data.heldout_fraction))
        loss = heldout_loss(model)
    return {
        "checkpoint_step": conversion.step,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "images": images,
        "heldout_loss": loss,
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        judgement = judge_run(folder, samples=int(sys.argv[2]), sample_seed=int(sys.argv[3]))
        write_json(folder / JUDGEMENT_FILE, judgement)
    except PromoeError as problem:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(problem.exit_code)
