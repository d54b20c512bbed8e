"""How even loads are, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from promoe_ds.load_stats import entropy, load_summary, max_over_mean, shares, variation


def test_measures_by_hand() -> None:
    tokens = np.array([[5, 5, 5, 5], [0, 12, 0, 0], [6, 6, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(shares(tokens)[2:], [[0.5, 0.5, 0, 0], [np.nan] * 4])
    np.testing.assert_allclose(max_over_mean(tokens), [1, 4, 2, np.nan])
    np.testing.assert_allclose(variation(tokens), [0, np.sqrt(3), 1, np.nan])
    np.testing.assert_allclose(entropy(tokens), [1, 0, 0.5, np.nan], atol=1e-12)
    assert f"{entropy(tokens)[1]:.3f}" == "0.000"
    assert entropy(np.array([[7], [0]])).tolist() == [1.0, pytest.approx(np.nan, nan_ok=True)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 5], (1.875, 0.819449, 0, 0.637377)),
        ([5, 1, 2], (1.875, 0.819449, 0, 0.637377)),
        ([2**40, 2**40], (1.0, 1.0, 0, 0.0)),
        ([4, 0], (2.0, 0.0, 1, 1.0)),
        ([3], (1.0, 1.0, 0, 0.0)),
    ],
)
def test_load_summary_by_hand(tokens, expected) -> None:
    names = ("load_max_over_mean", "load_entropy", "dead_experts", "load_cv")
    assert load_summary(tokens) == pytest.approx(dict(zip(names, expected, strict=True)), rel=1e-5)
    assert load_summary([0] * len(tokens)) == dict.fromkeys(names)
