"""The self-test of `tools/benchmark.py gpu`, judged: parity, agreement of training, speed. One run
for all tests.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu import benchmark_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

#: Largest relative error against float64, by what the name of a comparison holds.
TOLERANCES = {"fp32": 1e-2, "fp8": 0.15, "": 0.05}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return benchmark_gpu().figures


def _needs_large_device() -> None:
    if not any(name in torch.cuda.get_device_name() for name in ("H100", "H200", "B200")):
        pytest.skip(
            f"the claim is about one H100 or larger, this is {torch.cuda.get_device_name()}"
        )


def test_self_test_no_part_fails(found: dict[str, Any]) -> None:
    assert found["failed"] == {}


def test_self_test_of_every_backend_is_near_float64(found: dict[str, Any]) -> None:
    for name, error in found["parity"].items():
        tolerance = next(value for part, value in TOLERANCES.items() if part in name)
        assert error < tolerance, name


def test_self_test_trains_alike_in_every_precision(found: dict[str, Any]) -> None:
    for precision, loss in found["losses"].items():
        assert loss == pytest.approx(found["losses"]["fp32"], rel=0.05), precision


def test_self_test_takes_under_eight_minutes(found: dict[str, Any]) -> None:
    assert found["seconds"] < 480


def test_step_of_promoe_xl_uses_the_device(found: dict[str, Any]) -> None:
    _needs_large_device()
    assert found["steps"]["promoe_xl, bf16"]["mfu"] >= 0.40


def test_step_in_fp8_is_faster(found: dict[str, Any]) -> None:
    _needs_large_device()
    if "promoe_xl, fp8" in found["not_available"]:
        pytest.skip(found["not_available"]["promoe_xl, fp8"])
    fp8, bf16 = (found["steps"][f"promoe_xl, {precision}"] for precision in ("fp8", "bf16"))
    assert fp8["images"] == bf16["images"]
    assert bf16["milliseconds"] >= 1.15 * fp8["milliseconds"]


def test_layer_is_nearly_as_fast_as_a_dense_one_and_faster_than_a_loop(
    found: dict[str, Any],
) -> None:
    _needs_large_device()
    dense, moe, loop = (
        found["layer"][name]["wall_ms"] for name in ("dense", "moe", "per_expert_loop")
    )
    assert moe <= dense / 0.85
    assert loop >= 2 * moe
