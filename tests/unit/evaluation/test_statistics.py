"""The Fréchet distance, Inception Score, precision and recall against independent
implementations.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from prdc import compute_prdc

from promoe_ds.distributed.context import single_process
from promoe_ds.evaluation.frechet import Gaussian, fit_gaussian, frechet_distance
from promoe_ds.evaluation.precision_recall import share_in_manifold
from promoe_ds.evaluation.statistics import InceptionScore, RunningGaussian

from .made import features

TEAM = single_process()


def scipy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """ADM's formula with scipy's matrix root, from the features."""
    one, two = (np.cov(values, rowvar=False) for values in (a, b))
    root = scipy.linalg.sqrtm(one @ two).real
    return float(((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(one + two - 2 * root))


def scipy_inception_score(probabilities: np.ndarray, split: int) -> float:
    scores = []
    for start in range(0, len(probabilities), split):
        part = probabilities[start : start + split]
        divergences = scipy.special.rel_entr(part, part.mean(axis=0, keepdims=True)).sum(axis=1)
        scores.append(np.exp(divergences.mean()))
    return float(np.mean(scores))


def prdc(reference: np.ndarray, samples: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        found = compute_prdc(reference, samples, nearest_k=neighbours)
    return found["precision"], found["recall"]


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, **values: Any
) -> tuple[float, float]:
    pairs = (samples, reference), (reference, samples)
    precision, recall = (share_in_manifold(*pair, TEAM, **values) for pair in pairs)
    return precision, recall


@pytest.mark.parametrize(
    ("counts", "dimension"), [((101, 57), 13), ((257, 263), 31), ((999, 1001), 7)]
)
def test_frechet_distance_equals_scipys(counts: tuple[int, int], dimension: int) -> None:
    a, b = features(counts[0], dimension, 0), features(counts[1], dimension, 1)
    expected = pytest.approx(scipy_frechet(a, b), rel=1e-6)
    assert frechet_distance(fit_gaussian(a), fit_gaussian(b)) == expected
    assert frechet_distance(fit_gaussian(b), fit_gaussian(a)) == expected


@pytest.mark.parametrize("count", [5, 40, 400])
def test_frechet_distance_of_a_set_to_itself_is_zero(count: int) -> None:
    # Five and forty images of 101 features: singular covariances, where a matrix root of the
    # product is not exact.
    own = fit_gaussian(features(count, 101, 2))
    assert frechet_distance(own, own) == pytest.approx(0.0, abs=1e-9 * np.trace(own.covariance))


def test_frechet_distance_of_singular_gaussians_equals_the_closed_form() -> None:
    # Diagonal covariances commute: the distance is that of the deviations.
    a, b = np.array([4.0, 0.0, 1.0]), np.array([9.0, 2.0, 0.0])
    one = Gaussian(np.zeros(3), np.diag(a))
    other = Gaussian(np.array([1.0, 0.0, 2.0]), np.diag(b))
    expected = 5.0 + ((a**0.5 - b**0.5) ** 2).sum()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_frechet_distance_of_what_is_not_finite_is_no_figure(broken: float) -> None:
    own, running = fit_gaussian(features(40, 5, 2)), RunningGaussian(3, 5)
    bad = Gaussian(own.mean, np.where(np.eye(5), broken, own.covariance))
    assert np.isnan(frechet_distance(own, bad)) and np.isnan(frechet_distance(bad, own))
    # As the evaluation while training sums up the features of a diverged model.
    running.add(0, np.full((3, 5), broken))
    assert np.isnan(frechet_distance(running.result(TEAM), own))


def test_running_gaussian_in_uneven_batches_equals_numpys_far_from_zero() -> None:
    values = features(203, 11, 3) + 1e6
    running = RunningGaussian(203, 11)
    for part in np.split(values, [1, 2, 2, 60, 199]):
        running.add(0, part)
    found = running.result(TEAM)
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-12)
    # 1e6 away, sums of squares in fp64 would keep four digits.
    expected = np.cov(values - 1e6, rowvar=False)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("count", [17, 40, 41])
def test_inception_score_over_splits_equals_scipys(count: int, monkeypatch) -> None:
    monkeypatch.setattr(InceptionScore, "SPLIT", 20)
    probabilities = scipy.special.softmax(features(count, 9, 4), axis=1)
    probabilities[3] = np.eye(9)[2]  # a network that is certain: 0 log 0
    score = InceptionScore(count, 9)
    for start in range(0, count, 7):
        score.add(start, probabilities[start : start + 7])
    assert score.result(TEAM) == pytest.approx(scipy_inception_score(probabilities, 20), rel=1e-6)


@pytest.mark.parametrize(
    ("counts", "dimension", "neighbours"), [((101, 57), 13, 3), ((33, 77), 5, 1), ((64, 65), 9, 2)]
)
def test_precision_recall_equal_prdcs(
    counts: tuple[int, int], dimension: int, neighbours: int, monkeypatch
) -> None:
    monkeypatch.setattr("promoe_ds.evaluation.precision_recall._BLOCK_VALUES", 700)  # some blocks
    reference = features(counts[0], dimension, 5)
    samples = features(counts[1], dimension, 5) * 0.8 + 0.5
    found = precision_recall(reference, samples, neighbours=neighbours)
    assert found == pytest.approx(prdc(reference, samples, neighbours), abs=1e-6)
    assert all(0 < share < 1 for share in found)


def test_precision_recall_of_a_set_to_itself_are_one_and_far_away_zero() -> None:
    values = features(50, 4, 6)
    assert precision_recall(values, values) == (1.0, 1.0)
    assert precision_recall(values, values + 1e3) == (0.0, 0.0)


def half_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """ADM's formula in half precision, one value after another; sums of products in single
    precision, as GPUs have them.
    """
    a, b = a.astype(np.float16), b.astype(np.float16)
    norms = [np.square(x).astype(np.float32).sum(axis=1).astype(np.float16) for x in (a, b)]
    products = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float16)
    distances = norms[0][:, None] - np.float16(2) * products + norms[1][None]
    return np.maximum(distances, np.float16(0)).astype(np.float32)


def test_half_precision_manifold_equals_adms_and_differs_from_fp64() -> None:
    values = np.abs(np.random.default_rng(0).standard_normal((2, 300, 512))) + 1
    reference, samples = (values * [[[0.5]], [[0.49]]]).astype(np.float32)
    between = half_distances(samples, reference)
    expected = [
        (distances <= np.partition(half_distances(own, own), 3, axis=1)[:, 3]).any(axis=1).mean()
        for distances, own in ((between, reference), (between.T, samples))
    ]
    found = precision_recall(reference, samples, half=True)
    assert found == pytest.approx(expected, abs=1e-12)
    exact = precision_recall(reference, samples)
    assert found != exact
    # Where half precision overflows, ADM computes in single precision.
    assert precision_recall(reference * 1e3, samples * 1e3, half=True) == exact
