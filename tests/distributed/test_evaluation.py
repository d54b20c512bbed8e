"""Judging while training: the averaged weights are judged, and training goes on as if nobody had
looked.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from promoe_ds.checkpoint.conversion import Request, convert
from promoe_ds.cli.train import main
from promoe_ds.data import build_dataset
from promoe_ds.data.digits import load_digits_split
from promoe_ds.diffusion.sampler import SamplingPlan
from promoe_ds.distributed.context import single_process
from promoe_ds.evaluation.images import to_uint8
from promoe_ds.evaluation.metrics import EvaluateRequest, evaluate
from promoe_ds.evaluation.sample_job import draw_samples
from promoe_ds.evaluation.sample_request import SampleRequest
from promoe_ds.evaluation.sampling import LatentSampler
from promoe_ds.model.export import load_model

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


#: Random captions of six tokens or fewer, in place of digits.
OF_TEXT = (
    "data.dataset=synthetic",
    "data.synthetic_samples=70",
    "model.condition=text",
    "model.num_classes=1000",
    "model.text_width=12",
    "model.text_length=6",
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
    np.savez(reference, arr_0=to_uint8(load_digits_split(0.2, heldout=True)[0]))
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


def test_evaluation_of_texts_draws_captions_spread_over_the_training_data(tmp_path: Path) -> None:
    reference = tmp_path / "reference.npz"
    np.savez(reference, arr_0=to_uint8(load_digits_split(0.2, heldout=True)[0]))
    given = [*EVALUATION, *OF_TEXT, "evaluation.cfg_scale=2.0", f"evaluation.reference={reference}"]
    train(tmp_path / "judged", 2, *given)
    train(tmp_path / "plain", 2, *OF_TEXT, "train.max_steps=4")
    assert losses(tmp_path / "judged") == losses(tmp_path / "plain")

    convert(tmp_path / "judged", Request(destination=tmp_path / "export", to="single"))
    network = load_model(tmp_path / "export")
    plan = SamplingPlan.of(network.config, steps=4, cfg_scale=2.0)
    sampler = LatentSampler(network, network.config, plan, seed=0, device=torch.device("cpu"))
    captions = build_dataset(network.config).take(np.arange(50) * 70 // 50)[1]
    pixels = to_uint8(sampler.sample(range(50), captions).numpy())
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    request = EvaluateRequest(
        samples=tmp_path / "samples.npz",
        reference=reference,
        metrics=("fid",),
        extractor="pixels",
    )
    expected = evaluate(request, single_process())["metrics"]["fid"]
    assert metrics(tmp_path / "judged")[-1]["frechet_distance"] == pytest.approx(expected, rel=1e-3)
