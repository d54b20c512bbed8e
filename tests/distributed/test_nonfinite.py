"""A loss or gradient that is not finite on one rank: all skip together, the cause is named, the run
stops in time.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .jobs import Job, assert_same_state, metrics, run_jobs

SHORT = ("parallel.ep_size=2", "train.max_steps=4", "train.stop_after_steps=3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, str]]:
    folder = tmp_path_factory.mktemp("nonfinite")
    jobs = {}
    for stage in (0, 2):
        for kind in ("loss", "gradient"):
            jobs[f"{kind}_{stage}"] = Job(
                run_dir=folder / f"{kind}_{stage}",
                zero_stage=stage,
                overrides=SHORT,
                fault={"kind": kind, "rank": 1, "calls": [2]},
            )
        jobs[f"two_{stage}"] = Job(
            run_dir=folder / f"two_{stage}",
            zero_stage=stage,
            overrides=(*SHORT, "train.stop_after_steps=2"),
        )
        jobs[f"stop_{stage}"] = Job(
            run_dir=folder / f"stop_{stage}",
            zero_stage=stage,
            overrides=(*SHORT, "train.max_nonfinite_steps=2"),
            fault={"kind": "gradient", "rank": 0, "calls": [0, 1]},
        )
    errors = run_jobs(2, list(jobs.values()), folder)
    return {name: job.run_dir for name, job in jobs.items()}, dict(zip(jobs, errors, strict=True))


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nonfinite_step_on_one_rank_changes_nothing_anywhere(runs, kind, stage) -> None:
    folders, errors = runs
    assert errors[f"{kind}_{stage}"] == ""
    # The third of three steps was skipped: what is left is the state after two.
    kinds = ("weights", "ema", "exp_avg", "exp_avg_sq")
    assert_same_state(folders[f"two_{stage}"], folders[f"{kind}_{stage}"], *kinds)
    assert metrics(folders[f"{kind}_{stage}"])[-1]["grad_norm"] is None


@pytest.mark.parametrize("stage", [0, 2])
def test_nonfinite_step_is_named_by_step_rank_and_parameter(runs, stage) -> None:
    folders, _ = runs
    log = (folders[f"gradient_{stage}"] / "train.log").read_text()
    # The poisoned gradient enters at the prediction: the output layer is the first that it reaches,
    # and the exchange carries it to the experts of the other rank.
    pattern = (
        r"step 2: rank 1: the gradient of denoiser.final_layer.linear.(weight|bias) is not finite,"
        r" later also on rank 0"
    )
    assert re.search(pattern, log)
    assert (
        "rank 1: the loss and the gradient of"
        in (folders[f"loss_{stage}"] / "train.log").read_text()
    )


@pytest.mark.parametrize("stage", [0, 2])
def test_nonfinite_steps_in_a_row_stop_the_run(runs, stage) -> None:
    _, errors = runs
    assert errors[f"stop_{stage}"].startswith(
        "2 updates in a row were not finite (train.max_nonfinite_steps=2); step 1: rank 0"
    )
