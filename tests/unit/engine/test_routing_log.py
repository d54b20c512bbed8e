"""The summary of an expert load, as routing.jsonl holds it."""

from __future__ import annotations

import math

import pytest

from promoe_ds.engine.routing_log import load_summary


@pytest.mark.parametrize(("tokens", "expected"), [
    ([5, 5, 5, 5], (1.0, 1.0, 0)),
    ([0, 12, 0, 0], (4.0, 0.0, 3)),
    ([6, 6, 0, 0], (2.0, 0.5, 2)),
    ([7], (1.0, 1.0, 0)),
])
def test_load_summary_by_hand(tokens: list[int], expected: tuple[float, float, int]) -> None:
    keys = ("load_max_over_mean", "load_entropy", "dead_experts")
    assert load_summary(tokens) == pytest.approx(dict(zip(keys, expected, strict=True)), abs=1e-12)


def test_load_summary_uneven_load() -> None:
    summary = load_summary([1, 2, 5])
    entropy = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)) / math.log(3)
    assert summary == pytest.approx({"load_max_over_mean": 5 / (8 / 3), "load_entropy": entropy, "dead_experts": 0})


@pytest.mark.parametrize("tokens", [[0, 0, 0], [0]])
def test_load_summary_without_tokens_is_none(tokens: list[int]) -> None:
    assert load_summary(tokens) == {"load_max_over_mean": None, "load_entropy": None, "dead_experts": None}


def test_load_summary_does_not_depend_on_the_order_of_experts() -> None:
    first, second = load_summary([3, 0, 9, 4]), load_summary([9, 4, 3, 0])
    assert first == pytest.approx(second)


def test_load_summary_of_counts_beyond_32_bits() -> None:
    assert load_summary([2**40, 2**40]) == {"load_max_over_mean": 1.0, "load_entropy": pytest.approx(1.0), "dead_experts": 0}
