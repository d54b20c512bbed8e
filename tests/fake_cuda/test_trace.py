"""A whole step of every recipe on CUDA tensors that do not exist, through DeepSpeed's engine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trace import benchmark_trace, trace

from .cases import CASES, COUNTS, LAYOUTS, MEGATRON, METHODS, Case, installed

_EVERY_RUN = {*METHODS, *LAYOUTS, *MEGATRON}
#: How often the host reads, waits or copies, by place: once a step, a pass. Whatever is added here
#: makes the host wait for the device: think first.
_A_STEP = {"device to host: promoe_ds/training/trainer.py:Trainer._decide_on_device": 1}
_BATCH = "pinned host to device: promoe_ds/diffusion/objective.py:DiffusionBatch.to"

_REDUCTION = "reduction_private.py:GradientReducer"

_needs_megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="no Megatron-core")
_each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            name,
            marks=[_needs_megatron] * (name in MEGATRON)
            + [pytest.mark.combinations] * (name not in _EVERY_RUN),
        )
        for name in CASES
    ],
)


@pytest.fixture(scope="module")
def found(asked: Callable[..., set], guard: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return what was traced, by case, of those that were selected: one process for all."""
    names = [name for name in CASES if name in asked("case") and _is_possible(name)]
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
    # Of 4 images one is null and stays; one row a token of the others, bf16.
    rows = [e["bytes"] for e in one["collectives"] if e["name"] == "alltoall_base"]
    assert max(rows) == 3 * 256 * 768 * 2
    # Gradients of experts are summed over 2 ranks, of all else over 8.
    reduced = Counter()
    for each in one["collectives"]:
        if _REDUCTION in each["place"]:
            reduced[each["ranks"]] += each["bytes"] * each["count"]
    assert sum(reduced.values()) == 2 * one["parameters"]
    assert set(reduced) == {2, 8}


def test_a_step_has_one_shape_whatever_number_of_samples_is_null(
    guard: Path, tmp_path: Path
) -> None:
    """So a pass fits one CUDA graph: the host reads nothing in it, and nothing changes its size."""
    full, swiglu = "parallel.activation_checkpointing=full", "routing.expert_type=swiglu"
    apart = ("promoe_b", "parallel.kernels=eager")
    recipes = [("promoe_b",), ("promoe_b", full), ("promoe_ec_s",), ("kmeans_b", swiglu), apart]
    requests = [
        Case(recipe=name, overrides=(*overrides, f"diffusion.label_dropout={dropout}")).request()
        for name, *overrides in recipes
        for dropout in (0.0, 0.5, 1.0)  # of four images: none is null, some, all
    ]
    found = trace(requests, guard, tmp_path)
    assert all(not one["host_reads"] for one in found)
    each = [{one["sequence"] for one in found[i : i + 3]} for i in range(0, len(found), 3)]
    shapes = {recipe: len(sequences) for recipe, sequences in zip(recipes, each, strict=True)}
    assert shapes == {**dict.fromkeys(recipes, 1), apart: 3}


def test_gradients_are_summed_in_several_parts_while_the_backward_pass_continues(
    guard: Path, tmp_path: Path
) -> None:
    (one,) = trace([{"recipe": "promoe_b", "world_size": 8}], guard, tmp_path)
    sums = [each for each in one["collectives"] if _REDUCTION in each["place"]]
    assert sum(each["count"] for each in sums) >= 4
    assert sum(each["count"] * each["bytes"] for each in sums) == 2 * one["parameters"]
    assert max(each["bytes"] for each in sums) <= 2 * 50_000_000
    copied = sum(each["bytes"] for each in one["operations"] if "gradient_sums.py" in each["place"])
    # Joined, if not large; an eighth copied; two norms: of all, and of an eighth of the sums.
    assert copied < (2 + 2 + 4 / 8 + 2 / 8) * one["parameters"]


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


def _is_possible(name: str) -> bool:
    return name not in MEGATRON or find_spec("megatron") is not None


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
    listed: Counter[str] = Counter(_A_STEP)
    a_pass = {_BATCH: case.copies}
    for places, times in ((a_pass, case.passes), (case.layer_reads, moe_layers * case.passes)):
        listed.update({place: count * times for place, count in places.items()})
    return listed


def _skip_other_versions() -> None:
    held = json.loads(COUNTS.read_text(encoding="utf-8"))["versions"]
    if installed() != held:
        pytest.skip(f"counted with {held}, installed is {installed()}")
