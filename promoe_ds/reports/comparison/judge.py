"""What follows a training: convert, sample, judge.

`python -m promoe_ds.reports.comparison.judge RUN_DIR SAMPLES SAMPLE_SEED [FILE.py ...]`, a process
of its own, as the training was: a crash or a lack of memory costs one run, and ends with it.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from promoe_ds.config.extensions import import_extension
from promoe_ds.errors import PromoeError
from promoe_ds.files import write_json
from promoe_ds.reports.comparison.results import JUDGEMENT_FILE

#: What is routed to learn what experts are chosen by, and shufflings that say what chance is.
_ROUTED_IMAGES, _ROUNDS = 128, 20


def judge_run(run_dir: Path, *, samples: int, sample_seed: int) -> dict[str, Any]:
    """Convert a run's newest checkpoint; if its data set has a judge, also judge samples drawn from
    it, its loss on what was held out, and what its experts are chosen by.

    Image i starts from the noise of (sample_seed, i), whatever model draws it.
    Raises: PromoeError of the part that failed.
    """
    # Conversion needs no device; sampling asks torch for one.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    from promoe_ds.checkpoint.conversion import Request, convert
    from promoe_ds.data import build_dataset
    from promoe_ds.evaluation.judges.judge import heldout_loss
    from promoe_ds.evaluation.judges.table import JUDGES
    from promoe_ds.evaluation.sample_job import draw_samples
    from promoe_ds.evaluation.sample_request import SampleRequest
    from promoe_ds.model.export import load_model
    from promoe_ds.reports.specialisation.analysis import (
        Settings,
        draw_images,
        expert_information,
    )

    export, drawn = run_dir / "export", run_dir / "samples"
    # Of an attempt that was interrupted: one that ended has left a result.
    for leftover in (export, drawn):
        shutil.rmtree(leftover, ignore_errors=True)
    conversion = convert(run_dir, Request(destination=export, to="single"))
    model, images, loss, information = load_model(export), None, None, None
    if (dataset := model.config.data.dataset) in JUDGES:
        judge = JUDGES[dataset]
        # In batches: several times faster for networks as small as these, and the last digit
        # decides nothing here.
        wanted = judge.wanted(samples)
        draw_samples(
            SampleRequest(model=export, out=drawn, seed=sample_seed, exact=False, **wanted)
        )
        images = judge.judge(drawn, model.config.data.heldout_fraction)
        loss = heldout_loss(model, *judge.heldout(model.config))
        if model.moe_layers():
            batch = draw_images(build_dataset(model.config), _ROUTED_IMAGES, sample_seed)
            information = expert_information(model, batch, Settings(rounds=_ROUNDS))
    return {
        "checkpoint_step": conversion.step,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "images": images,
        "heldout_loss": loss,
        "information": information,
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        for name in sys.argv[4:]:
            import_extension(name)
        judgement = judge_run(folder, samples=int(sys.argv[2]), sample_seed=int(sys.argv[3]))
        write_json(folder / JUDGEMENT_FILE, judgement)
    except PromoeError as problem:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(problem.exit_code)
