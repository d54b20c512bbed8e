"""The plan's trace against the engine's own step on CUDA tensors that do not exist: what planning
replays of DeepSpeed cannot drift from it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fake_cuda.step import Request
from benchmarks.trace import ZERO_2_BF16, trace
from promoe_ds.config import DS_CONFIGS_DIR
from promoe_ds.planning.cluster import layout_of
from promoe_ds.planning.replay import AFTER, BESIDE, UPDATE
from promoe_ds.planning.shapes import PassShapes, fake_world, trace_pass
from promoe_ds.planning.trace import PASS

_IMAGES = 4
_FP32 = DS_CONFIGS_DIR / "zero2_fp32.json"
#: Category of the traced step -> part of the plan's.
_PARTS = {
    **dict.fromkeys(("AdamW", "averages of the weights", "gradient norm"), UPDATE),
    "clip and casts of the update": UPDATE,
    "gradients: buckets and copies": BESIDE,
}
_CASES = {
    "one rank": (1, _IMAGES, ZERO_2_BF16, ()),
    "one rank, decay, two averages": (
        1,
        _IMAGES,
        ZERO_2_BF16,
        ("optimizer.weight_decay=0.1", "optimizer.ema_decays=[0.999,0.9999]"),
    ),
    "plain operations": (1, _IMAGES, ZERO_2_BF16, ("parallel.kernels=eager",)),
    "autocast": (1, _IMAGES, _FP32, ("precision.compute=bf16_autocast",)),
    "eight ranks, two passes": (8, 2 * _IMAGES, ZERO_2_BF16, ()),
    "four ranks share experts": (8, _IMAGES, ZERO_2_BF16, ("parallel.ep_size=4",)),
}


def _request(name: str) -> dict[str, Any]:
    ranks, images, deepspeed, overrides = _CASES[name]
    batch = [f"train.global_batch_size={ranks * images}", f"train.micro_batch_size={_IMAGES}"]
    # Plans have no null samples.
    batch += ["diffusion.label_dropout=0", *overrides]
    return {
        "recipe": "promoe_b",
        "overrides": batch,
        "world_size": ranks,
        "deepspeed": str(deepspeed),
        "depth": 2,
    }


@pytest.fixture(scope="module")
def stepped(guard: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = trace([_request(name) for name in _CASES], guard, tmp_path_factory.mktemp("trace"))
    return dict(zip(_CASES, found, strict=True))


def _planned(name: str) -> tuple[PassShapes, int]:
    config, batches, deepspeed = Request(**_request(name)).resolve()
    with fake_world(batches.world_size):
        shapes = trace_pass(config, layout_of(batches, deepspeed))
    return shapes, batches.accumulation


@pytest.mark.parametrize("name", _CASES)
def test_plan_has_the_bytes_flops_and_collectives_of_the_step(
    name: str, stepped: dict[str, Any]
) -> None:
    one, (shapes, passes) = stepped[name], _planned(name)
    assert "categories" in one, one
    moved: Counter[str] = Counter()
    for category, figures in one["categories"].items():
        moved[_PARTS.get(category, PASS)] += figures["bytes"]
    work: Counter[str] = Counter()
    for part, calls in shapes.trace.work.items():
        work[part] = sum(call.bytes for call in calls)
    planned = {
        UPDATE: work[UPDATE],
        BESIDE: passes * (work[BESIDE] + work[AFTER]),
        PASS: passes * work[PASS],
    }
    assert planned == pytest.approx(moved, rel=0.1)
    flops = sum(call.flops for call in shapes.trace.work[PASS])
    assert passes * flops == pytest.approx(one["totals"]["flops"], rel=0.01)
    assert _sent_in_plan(shapes, passes) == pytest.approx(_sent_in_step(one), rel=0.1)


def _sent_in_plan(shapes: PassShapes, passes: int) -> Counter[tuple[str, int]]:
    sent: Counter[tuple[str, int]] = Counter()
    for each in shapes.trace.sent:
        times = passes if each.part in (PASS, BESIDE, AFTER) else 1
        sent[each.name, len(each.members)] += each.bytes * times
    return sent


def _sent_in_step(one: dict[str, Any]) -> Counter[tuple[str, int]]:
    sent: Counter[tuple[str, int]] = Counter()
    for each in one["collectives"]:
        if each["ranks"] > 1:
            sent[each["name"], each["ranks"]] += each["bytes"] * each["count"]
    return sent
