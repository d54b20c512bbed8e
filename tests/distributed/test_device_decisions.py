"""Updates about which the device decides, as on a GPU, here on CPUs: skipped, clipped and averaged
as those about which the host does, with the same names and codes, read a step later.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .jobs import Job, assert_same_state, metrics, run_jobs

#: Two passes a step of four tokens an image: Triton's interpreter is slow.
SHORT = (
    "model.depth=2",
    "model.patch_size=4",
    "parallel.ep_size=2",
    "train.max_steps=4",
    "train.log_every=2",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
)
KINDS = ("weights", "ema", "exp_avg", "exp_avg_sq")
CLIPPED = ("optimizer.max_grad_norm=0.5", "optimizer.ema_sigma_rels=[0.1]")
FUSED = "parallel.kernels=triton"
THREE = "train.stop_after_steps=3"
#: Several buckets a pass, some under way while others are filled.
SMALL = {"overlap_comm": True, "reduce_bucket_size": 20_000}
#: What is compared with the run in which the host decides -> its ZeRO section and settings.
ALIKE = {
    "device": ({"stage": 2}, ()),
    "device, ZeRO 1": ({"stage": 1}, ()),
    "device, small buckets": ({"stage": 2, **SMALL}, ()),
    "fused": ({"stage": 2}, (FUSED,)),
    "fused, ZeRO 1": ({"stage": 1, **SMALL}, (FUSED,)),
}


#: Runs whose last step is not finite -> their recipe and settings; DiffMoE's routers have a state.
SKIPPED = {
    "skipped": ("digits_promoe", ()),
    "skipped, fused": ("digits_promoe", (FUSED,)),
    "skipped, thresholds": ("digits_diffmoe", ()),
}


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

    bad = {"kind": "gradient", "rank": 1, "calls": [6]}
    jobs = [
        job("host", *CLIPPED, on_device=False),
        *(
            job(name, *CLIPPED, *more, deepspeed={"zero_optimization": zero})
            for name, (zero, more) in ALIKE.items()
        ),
        job("host, bf16", on_device=False, bf16=True),
        job("fused, bf16", FUSED, bf16=True),
        job("in two", *CLIPPED, FUSED, "train.stop_after_steps=2"),
        job("in two", *CLIPPED, FUSED),
        *(job(f"three {name}", THREE, *more, recipe=r) for name, (r, more) in SKIPPED.items()),
        *(job(name, *more, recipe=r, fault=bad) for name, (r, more) in SKIPPED.items()),
        job(
            "stopped",
            "train.max_nonfinite_steps=2",
            fault={"kind": "gradient", "rank": 1, "calls": [2, 4]},
        ),
    ]
    errors = run_jobs(2, jobs, folder)
    return {job.run_dir.name: (job.run_dir, error) for job, error in zip(jobs, errors, strict=True)}


@pytest.mark.parametrize("name", ALIKE)
def test_device_and_host_train_alike_with_clipping_and_both_kinds_of_averages(runs, name) -> None:
    """They differ by the norm, which the device takes in fp32."""
    found, expected = metrics(runs[name][0]), metrics(runs["host"][0])
    assert [line["step"] for line in found] == [2, 4]
    for one, host in zip(found, expected, strict=True):
        assert one["grad_norm"] == pytest.approx(host["grad_norm"], rel=1e-5)
        assert one["grad_norm"] > 0.5, "clipping was never active"
        assert one["loss"] == pytest.approx(host["loss"], rel=1e-5)
    states = [*KINDS, "ema_power_0.1"]
    assert_same_state(runs["host"][0], runs[name][0], *states, rtol=1e-4, atol=1e-5)


def test_fused_update_of_bf16_weights_is_near_the_plain_one(runs) -> None:
    found, expected = metrics(runs["fused, bf16"][0]), metrics(runs["host, bf16"][0])
    for one, host in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(host["loss"], rel=0.02)


def test_fused_update_resumes_exactly(runs) -> None:
    assert_same_state(runs["fused"][0], runs["in two"][0], *KINDS, "ema_power_0.1")
    assert metrics(runs["in two"][0])[-1]["loss"] == metrics(runs["fused"][0])[-1]["loss"]


@pytest.mark.parametrize("name", SKIPPED)
def test_step_that_is_not_finite_changes_nothing_anywhere(runs, name) -> None:
    folder, error = runs[name]
    assert error == "" and metrics(folder)[-1]["grad_norm"] is None
    assert_same_state(runs[f"three {name}"][0], folder, *KINDS)
    pattern = r"step 3: rank 1: the gradient of denoiser.final_layer.linear.(weight|bias) is not"
    assert re.search(pattern, (folder / "train.log").read_text())


def test_steps_in_a_row_that_are_not_finite_stop_the_run(runs) -> None:
    _, error = runs["stopped"]
    assert error.startswith("2 updates in a row were not finite (train.max_nonfinite_steps=2); ")
    assert "; step 2: rank 1: the gradient of" in error
