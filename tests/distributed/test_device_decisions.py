"""Updates about which the device decides, as on a GPU, here on CPUs: skipped, clipped and averaged
as those about which the host does, with the same names and codes, read a step later.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .jobs import Job, assert_same_state, metrics, run_jobs

SHORT = ("parallel.ep_size=2", "train.max_steps=6", "train.log_every=3")
KINDS = ("weights", "ema", "exp_avg", "exp_avg_sq")
CLIPPED = ("optimizer.max_grad_norm=0.5", "optimizer.ema_sigma_rels=[0.1]")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("device")

    def job(name: str, *overrides: str, on_device: bool = True, **options) -> Job:
        return Job(
            run_dir=folder / name,
            overrides=(*SHORT, *overrides),
            decides_on_device=on_device,
            **options,
        )

    poisoned = {"kind": "gradient", "rank": 1}
    jobs = [
        job("device", *CLIPPED),
        job("host", *CLIPPED, on_device=False),
        job("fused", *CLIPPED, "parallel.kernels=triton"),
        job("thresholds", recipe="digits_diffmoe", fault={**poisoned, "calls": [5]}),
        job("five_thresholds", "train.stop_after_steps=5", recipe="digits_diffmoe"),
        job("skipped", fault={**poisoned, "calls": [5]}),
        job("five", "train.stop_after_steps=5"),
        job("stopped", "train.max_nonfinite_steps=2", fault={**poisoned, "calls": [1, 2]}),
    ]
    errors = run_jobs(2, jobs, folder)
    return {job.run_dir.name: (job.run_dir, error) for job, error in zip(jobs, errors, strict=True)}


def test_device_and_host_train_alike_with_clipping_and_both_kinds_of_averages(runs) -> None:
    """They differ by the norm, which the device takes in fp32."""
    lines = [metrics(runs[name][0]) for name in ("device", "fused", "host")]
    assert [len(each) for each in lines] == [2, 2, 2]
    for *on_device, host in zip(*lines, strict=True):
        for one in on_device:
            assert one["grad_norm"] == pytest.approx(host["grad_norm"], rel=1e-5)
            assert one["grad_norm"] > 0.5, "clipping was never active"
            assert one["loss"] == pytest.approx(host["loss"], rel=1e-5)
    states = [*KINDS, "ema_power_0.1"]
    for name in ("device", "fused"):
        assert_same_state(runs["host"][0], runs[name][0], *states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("skipped", "before"), [("skipped", "five"), ("thresholds", "five_thresholds")]
)
def test_step_that_is_not_finite_changes_nothing_anywhere(runs, skipped, before) -> None:
    folder, error = runs[skipped]
    assert error == "" and metrics(folder)[-1]["grad_norm"] is None
    assert_same_state(runs[before][0], folder, *KINDS)
    pattern = r"step 5: rank 1: the gradient of denoiser.final_layer.linear.(weight|bias) is not"
    assert re.search(pattern, (folder / "train.log").read_text())


def test_steps_in_a_row_that_are_not_finite_stop_the_run(runs) -> None:
    _, error = runs["stopped"]
    assert error.startswith("2 updates in a row were not finite (train.max_nonfinite_steps=2); ")
    assert "; step 2: rank 1: the gradient of" in error
