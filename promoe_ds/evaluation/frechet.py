"""The Fréchet distance between Gaussians fitted to two sets of features (Heusel et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promoe_ds.data.reading import warn_once


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance (d, d), float64."""

    mean: np.ndarray
    covariance: np.ndarray


def fit_gaussian(features_Nd: np.ndarray) -> Gaussian:
    """Fit to features (N, d), N >= 2, in float64 with the unbiased covariance."""
    features = np.asarray(features_Nd, dtype=np.float64)
    return Gaussian(features.mean(axis=0), np.cov(features, rowvar=False))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), at least 0; 0 for equal Gaussians,
    NaN if one is not finite.

    Source: Heusel et al. (2017), Eq. 6; ADM: a matrix root of A B. Differs: the trace of that root
    is the sum of the singular values of A^(1/2) B^(1/2), exact where the root of a product is not:
    for covariances of fewer images than features, which are singular. No offset is ever added.
    """
    if not all(
        np.isfinite(values).all() for one in (a, b) for values in (one.mean, one.covariance)
    ):
        return float("nan")
    cross = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    # Rounding may leave it below 0; NaN stays NaN, where Python's max would make it 0.
    return float(np.maximum(distance, 0.0))


def warn_of_few(where: Path, count: int, features: int) -> None:
    """Warn of a Gaussian of no more images than features: its covariance is singular, its distance
    depends on their number.
    """
    if count <= features:
        warn_once(
            "%s: %d images for %d features: the Fréchet distance of so few images is biased,"
            " compare it only with distances of as many",
            where,
            count,
            features,
        )


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
