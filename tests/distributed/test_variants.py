"""Activation checkpointing, gradient accumulation, expert backends and the RCL's scope under expert
parallelism.
"""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from .jobs import (
    Job,
    assert_near_state,
    assert_same_state,
    losses,
    metrics,
    routing,
    run_jobs,
    state,
    without_times,
)

EP2 = ("parallel.ep_size=2", "train.max_steps=8")
#: RCL is taken over the samples of one pass: accumulation cuts them, so it is off where
# accumulation is compared.
NO_RCL = ("routing.rcl_weight=0", "routing.balance_weight=0")
VARIANTS = {
    "plain": (),
    "recompute": ("parallel.activation_checkpointing=full",),
    "loop": ("parallel.expert_backend=loop",),
    "rank_scope": ("routing.rcl_scope=rank",),
    "balance": ("routing.balance_weight=0.01", "routing.top_k=2"),
    "once": NO_RCL,
    "accumulated": (*NO_RCL, "train.micro_batch_size=2"),
    "no_clip": ("optimizer.max_grad_norm=0",),
}


#: What the DeepSpeed JSON lets through and changes no number, each as it is not by default.
EVERY_KEY = {
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 1e3,
        "allgather_partitions": False,
        "allgather_bucket_size": 2,
        "parameter_alignment": True,
        "use_multi_rank_bucket_allreduce": False,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": None,
    },
    "communication_data_type": "fp32",
    "comms_logger": {"enabled": True, "verbose": True, "debug": True},
    "flops_profiler": {"enabled": False, "profile_step": 2},
    "memory_breakdown": True,
    "dump_state": True,
    "steps_per_print": 1,
    "use_data_before_expert_parallelism": True,
    "zero_allow_untested_optimizer": False,
    "fp16": {"enabled": False},
    "wall_clock_breakdown": False,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "train_batch_size": "auto",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("variants")
    jobs = {
        name: Job(run_dir=folder / name, overrides=(*EP2, *overrides))
        for name, overrides in VARIANTS.items()
    }
    jobs["every_key"] = Job(run_dir=folder / "every_key", overrides=EP2, deepspeed=EVERY_KEY)
    assert run_jobs(2, list(jobs.values()), folder) == [""] * len(jobs)
    return {name: job.run_dir for name, job in jobs.items()}


def test_recompute_changes_neither_losses_nor_weights_nor_counts(runs) -> None:
    assert losses(runs["recompute"]) == losses(runs["plain"])
    assert without_times(routing(runs["recompute"])) == without_times(routing(runs["plain"]))
    assert_same_state(runs["plain"], runs["recompute"], "weights")


@pytest.mark.parametrize("name", ["every_key", "loop"])
def test_keys_let_through_and_the_loop_of_experts_change_no_number(runs, name) -> None:
    assert losses(runs[name]) == pytest.approx(losses(runs["plain"]), rel=1e-5)


def test_accumulation_equals_one_pass(runs) -> None:
    assert losses(runs["accumulated"]) == pytest.approx(losses(runs["once"]), rel=1e-5)
    assert_near_state(runs["once"], runs["accumulated"], "weights")
    # Counts of all passes of a step add up, each once.
    for before, after in zip(routing(runs["once"]), routing(runs["accumulated"]), strict=True):
        assert after["conditional_tokens"] == before["conditional_tokens"]


def test_rcl_scope_rank_differs_from_global(runs) -> None:
    """Centroids of eight samples are not those of sixteen: the option does something."""
    first = [metrics(runs[name])[0]["loss_rcl"] for name in ("plain", "rank_scope")]
    assert abs(first[0] - first[1]) > 1e-4


def test_loss_terms_add_up_and_balance_counts_twice_for_two_choices(runs) -> None:
    for line in metrics(runs["balance"]):
        assert line["loss"] == pytest.approx(
            line["loss_diffusion"] + line["loss_rcl"] + line["loss_balance"], rel=1e-9
        )
        assert line["loss_balance"] >= 2 * 0.01 * 0.5  # two layers, each about its coefficient
    for line in routing(runs["balance"]):
        assert sum(line["tokens_per_expert"]) == 2 * line["conditional_tokens"]


def test_clipping_off_takes_other_steps(runs) -> None:
    assert losses(runs["no_clip"])[0] == losses(runs["plain"])[0]
    assert losses(runs["no_clip"])[-1] != losses(runs["plain"])[-1]


FROZEN = ("patch_embedding.*", "blocks.*.moe.routed.*_weight", "blocks.0.*")


@pytest.mark.parametrize(("zero_stage", "bf16"), [(2, True), (2, False), (0, False)])
def test_frozen_parameters_stay_through_training_and_resuming(tmp_path, zero_stage, bf16) -> None:
    """Two ranks share the frozen experts; two more steps follow on one."""
    start, run = tmp_path / "start", tmp_path / "run"
    freeze = f"train.freeze={json.dumps(FROZEN)}"

    def go(ranks: int, run_dir: Path, *overrides: str) -> None:
        values = (f"parallel.ep_size={ranks}", "train.max_steps=6", *overrides)
        job = Job(run_dir=run_dir, overrides=values, zero_stage=zero_stage, bf16=bf16)
        assert run_jobs(ranks, [job], tmp_path) == [""]

    go(2, start, "train.stop_after_steps=1", "optimizer.lr=1e-12")
    go(2, run, freeze, "train.stop_after_steps=3")
    after = {kind: state(run, kind) for kind in ("weights", "ema", "exp_avg")}
    initial = state(start)
    for name, value in initial.items():
        is_frozen = any(fnmatch(name, pattern) for pattern in FROZEN)
        kept = value.bfloat16().float() if bf16 else value
        is_same = torch.allclose(after["weights"][name], kept, rtol=0, atol=1e-9)
        assert is_same == is_frozen or not value.any(), name
        if is_frozen:
            assert torch.equal(after["ema"][name], after["weights"][name])
            assert not after["exp_avg"][name].any()
    go(1, run, freeze)
    resumed = state(run)
    for name in initial:
        if any(fnmatch(name, pattern) for pattern in FROZEN):
            assert torch.equal(resumed[name], after["weights"][name]), name
    assert [line["step"] for line in metrics(run)] == list(range(1, 7))
