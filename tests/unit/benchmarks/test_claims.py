"""Predictions of the GPU self-test, and how they are set beside what it measures."""

from __future__ import annotations

import pytest

from benchmarks import claims
from benchmarks.claims import Claim, predictions, table
from benchmarks.gpu import StepSpeed
from promoe_ds.config import load_config


def test_every_traced_figure_has_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    small = load_config("digits_promoe", ["parallel.ep_size=1"])
    monkeypatch.setattr(claims, "STEPS", {"digits_promoe": 4})
    monkeypatch.setattr(claims, "load_config", lambda recipe: small)
    fast, slow = (predictions({"digits_promoe": 4}, small, 4, gpu) for gpu in ("h200", "a100"))
    traced = [name for name in claims.VARIANTS if name not in claims.UNTRACED]
    for name in traced:
        for figure in ("ms", "MFU %", "GB", "kernels"):
            assert fast[f"digits_promoe, {name}: {figure}"] > 0
    kernels = [fast[f"digits_promoe, {name}: kernels"] for name in ("bf16", "plain operations")]
    assert kernels[0] < kernels[1]
    for name in ("layer, moe: ms", f"{small.name}, sampling: ms a step"):
        assert slow[name] > fast[name] > 0
    assert "compiled" not in " ".join(fast)


def test_goals_are_stated_as_goals_and_judged_by_what_is_known() -> None:
    wanted = {"goal": 40.0, "at_least": True}
    assert Claim(**wanted).goal_text().endswith("a goal")
    assert "not reached by prediction" in Claim(predicted=34.0, **wanted).goal_text()
    assert "40, reached as measured" in Claim(predicted=34.0, measured=41.0, **wanted).goal_text()
    assert Claim(goal=2.0, measured=1.0).reaches(1.0)


def test_claims_take_the_figures_that_were_measured() -> None:
    step = {"images": 64, "mfu": 0.35, "memory_gb": 50.0}
    found = {
        "steps": {
            "promoe_xl, bf16": StepSpeed(milliseconds=138.0, **step),
            "promoe_xl, fp8": StepSpeed(milliseconds=120.0, **step),
        },
        "counts": {"promoe_xl, bf16: kernels": 5900},
    }
    every = claims.claims({"promoe_xl, bf16: ms": 135.4}, found)
    assert every["promoe_xl, bf16: ms"].measured == 138.0
    assert every["promoe_xl, bf16: MFU %"].measured == pytest.approx(35)
    assert every["promoe_xl: bf16 / fp8 ms"].measured == pytest.approx(1.15)
    row = next(line for line in table(every) if line.startswith("| promoe_xl, bf16: ms"))
    assert row == "| promoe_xl, bf16: ms | 135.4 | 138 | 1.02 | ≤ 120, not reached as measured |"
