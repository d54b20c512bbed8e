"""The Fréchet distance against closed forms and scipy's matrix root."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from promoe_ds.evaluation.frechet import Gaussian, fit_gaussian, frechet_distance


def _features(seed: int, shift: float = 0.0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.standard_normal((200, 6)) @ draw.standard_normal((6, 6)) + shift


def test_frechet_equal_sets_is_zero() -> None:
    gaussian = fit_gaussian(_features(0))
    assert frechet_distance(gaussian, gaussian) == pytest.approx(0.0, abs=1e-9)


def test_frechet_one_dimension_is_closed_form() -> None:
    a, b = (Gaussian(np.array([m]), np.array([[s * s]])) for m, s in ((1.0, 2.0), (4.0, 3.0)))
    assert frechet_distance(a, b) == pytest.approx(3.0**2 + 1.0**2)


def test_frechet_equals_matrix_root_definition_and_is_symmetric() -> None:
    a, b = fit_gaussian(_features(1)), fit_gaussian(_features(2, shift=0.5))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_singular_covariance_is_finite() -> None:
    """Corner pixels of digits never vary."""
    constant = np.hstack([_features(3), np.zeros((200, 2))])
    assert np.isfinite(frechet_distance(fit_gaussian(constant), fit_gaussian(constant[:150])))
