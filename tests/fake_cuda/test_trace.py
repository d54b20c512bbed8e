"""A whole step of every recipe on CUDA tensors that do not exist, through DeepSpeed's engine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trace import benchmark_trace, trace

from .cases import CASES, COUNTS, LAYOUTS, MEGATRON, METHODS, Case, installed

_EVERY_RUN = {*METHODS, *LAYOUTS, *MEGATRON}
_ZERO = "deepspeed/runtime/zero/stage_1_and_2.py:DeepSpeedZeroOptimizer"
_UTILS = "deepspeed/runtime/utils.py"
#: How often the host reads, waits or copies in every step, by place: once a step, a pass, a group
#: of ZeRO's. Whatever is added here makes the host wait for the device: think first.
_A_STEP = {
    "read of promoe_ds/train/health.py:agree": 1,
    "read of promoe_ds/train/trainer.py:Trainer.train_step": 2,
    f"read of {_UTILS}:is_invalid_grad_norm < {_ZERO}.step": 1,
    "pageable host to device: promoe_ds/train/health.py:agree": 1,
}
_A_PASS = {
    "read of promoe_ds/routing/partition.py:partition_samples": 1,
    "pinned host to device: promoe_ds/diffusion/objective.py:DiffusionBatch.to": 4,
    f"wait for device: {_ZERO}.independent_gradient_partition_epilogue"
    f" < {_ZERO}.overlapping_partition_gradients_reduce_epilogue": 1,
}
_A_GROUP = {
    f"read of {_UTILS}:is_invalid_grad_norm < {_ZERO}.unscale_and_clip_grads": 1,
    f"pageable host to device: {_UTILS}:mask_nan_or_inf_with_val_inplace"
    f" < {_ZERO}.get_grad_norm_direct": 1,
}

_each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=[] if name in _EVERY_RUN else pytest.mark.combinations)
        for name in CASES
    ],
)


@pytest.fixture(scope="module")
def found(asked: Callable[..., set], guard: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return what was traced, by case, of those that were selected: one process for all."""
    names = [name for name in CASES if name in asked("case")]
    requests = [CASES[name].request() for name in names]
    return dict(zip(names, trace(requests, guard, tmp_path_factory.mktemp("trace")), strict=True))


@_each_case
def test_a_step_runs_on_one_device_and_leaves_no_parameter_out(case: str, found: dict) -> None:
    one = found[case]
    assert "refused" not in one and "failed" not in one, one.get("failed", one)
    assert one["without_gradient"] == []
    assert one["totals"]["kernels"] > 100 and one["totals"]["flops"] > 0


@_each_case
def test_the_host_reads_what_is_listed_and_nothing_else(case: str, found: dict) -> None:
    _skip_other_versions()
    seen, expected = _asked_by_host(found[case]), _listed(CASES[case], found[case]["moe_layers"])
    if case in MEGATRON:
        seen = Counter({k: v for k, v in seen.items() if "megatron" not in k.partition(" < ")[0]})
    assert seen == expected


@_each_case
def test_kernels_and_bytes_do_not_grow(case: str, found: dict) -> None:
    _skip_other_versions()
    most = json.loads(COUNTS.read_text(encoding="utf-8"))["cases"][case]
    counts = {key: found[case]["totals"][key] for key in most}
    assert all(counts[key] <= most[key] for key in most), (
        f"{case}: {counts}, at most {most}: `python -m tests.fake_cuda.cases --raise`"
        " writes new counts if the change is worth it"
    )


def test_collectives_are_those_that_the_step_needs(guard: Path, tmp_path: Path) -> None:
    (one,) = trace([LAYOUTS["promoe_b, 8 ranks, ep 4"].request()], guard, tmp_path)
    sent = Counter()
    for each in one["collectives"]:
        sent[each["name"], each["ranks"]] += each["count"]
    # Counts, rows, rows back, and the gradients of both, in each of the MoE layers.
    assert sent["alltoall_base", 4] == 5 * one["moe_layers"]
    # 4 images, one row a token, and all but a rank's own 3 of 12 experts: bf16.
    rows = [e["bytes"] for e in one["collectives"] if e["name"] == "alltoall_base"]
    assert max(rows) == 4 * 256 * 768 * 2
    # ZeRO reduces gradients of experts over 2 ranks, of all else over 8.
    reduced = Counter()
    for each in one["collectives"]:
        if "DeepSpeedZeroOptimizer.allreduce_bucket" in each["place"]:
            reduced[each["ranks"]] += each["bytes"] * each["count"]
    assert sum(reduced.values()) == 2 * one["parameters"]
    assert set(reduced) == {2, 8}


def test_what_cannot_be_traced_is_refused_with_the_field(guard: Path, tmp_path: Path) -> None:
    answers = trace(
        [
            {"recipe": "promoe_s", "overrides": ["parallel.compile=true"]},
            {"recipe": "promoe_s", "overrides": ["parallel.ep_size=5"]},
        ],
        guard,
        tmp_path,
    )
    assert "parallel.compile" in answers[0]["refused"]
    assert "ep_size" in answers[1]["refused"]


def test_the_suite_prints_every_table(guard: Path) -> None:
    result = benchmark_trace("digits_promoe", ["parallel.ep_size=1"], ranks=1)
    text = "\n".join(result.lines())
    assert result.as_json()["totals"]["ms"] > 0
    for part in ("products in bf16", "host reads", "copies", "collectives", "events left unread"):
        assert part in text


def _asked_by_host(one: dict[str, Any]) -> Counter[str]:
    seen: Counter[str] = Counter()
    for each in one["host_reads"]:
        seen[f"read of {each['place']}"] += each["count"]
    for each in one["waits"]:
        seen[f"wait for {each['for']}: {each['place']}"] += each["count"]
    for each in one["copies"]:
        seen[f"{each['way']}: {each['place']}"] += each["count"]
    return seen


def _listed(case: Case, moe_layers: int) -> Counter[str]:
    groups = 2 if case.shards_experts else 1
    listed: Counter[str] = Counter(_A_STEP)
    for places, times in (
        (_A_PASS, case.passes),
        (_A_GROUP, groups),
        (case.layer_reads, moe_layers * case.passes),
    ):
        listed.update({place: count * times for place, count in places.items()})
    return listed


def _skip_other_versions() -> None:
    held = json.loads(COUNTS.read_text(encoding="utf-8"))["versions"]
    if installed() != held:
        pytest.skip(f"counted with {held}, installed is {installed()}")
