"""Judging while training: the averaged weights are judged, and training goes on as if nobody had
looked.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from promoe_ds.checkpoint.conversion import Request, convert
from promoe_ds.cli.train import main
from promoe_ds.data.digits import load_digits_split
from promoe_ds.distributed.context import single_process
from promoe_ds.evaluation.images import to_uint8
from promoe_ds.evaluation.metrics import EvaluateRequest, evaluate
from promoe_ds.evaluation.sample_job import SampleRequest, draw_samples

from ..processes import run_ranks
from .jobs import TINY, losses, metrics

EVALUATION = (
    "evaluation.every=2",
    "evaluation.extractor=pixels",
    "evaluation.samples=50",
    "evaluation.steps=4",
    "evaluation.batch_size=16",
    "train.max_steps=4",
)


def train(run_dir: Path, zero_stage: int, *overrides: str) -> None:
    """Train on two ranks through the command line, four experts cut over them."""
    config = run_dir.parent / f"zero{zero_stage}.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": zero_stage}}))
    run_ranks(
        2,
        main,
        [
            "--recipe",
            "digits_promoe",
            "--deepspeed_config",
            str(config),
            "--run-dir",
            str(run_dir),
            "--set",
            *TINY,
            "parallel.ep_size=2",
            *overrides,
        ],
    )


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_evaluation_while_training_judges_the_average_and_changes_nothing(
    tmp_path: Path, zero_stage: int
) -> None:
    reference = tmp_path / "reference.npz"
    np.savez(reference, arr_0=to_uint8(load_digits_split(0.2, heldout=True).images))
    train(tmp_path / "judged", zero_stage, *EVALUATION, f"evaluation.reference={reference}")
    train(tmp_path / "plain", zero_stage, "train.max_steps=4")
    judged = metrics(tmp_path / "judged")
    assert losses(tmp_path / "judged") == losses(tmp_path / "plain")
    assert ["frechet_distance" in line for line in judged] == [False, True, False, True]
    manifests = [
        tmp_path / run / "checkpoints/step_0000004/manifest.json" for run in ("judged", "plain")
    ]
    files = [json.loads(manifest.read_text())["files"] for manifest in manifests]
    assert files[0] == files[1]  # every byte of weights, moments and averages

    convert(tmp_path / "judged", Request(destination=tmp_path / "export", to="single"))
    draw_samples(
        SampleRequest(
            model=tmp_path / "export", out=tmp_path / "samples", num=50, steps=4, cfg_scale=1.0
        )
    )
    request = EvaluateRequest(
        samples=tmp_path / "samples", reference=reference, metrics=("fid",), extractor="pixels"
    )
    found = evaluate(request, single_process())
    assert judged[-1]["frechet_distance"] == pytest.approx(
        found["metrics"]["fid"], rel=1e-3
    )  # a pixel may round otherwise
