"""The Fréchet distance between Gaussians fitted to two sets of features (Heusel et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
    """Return |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)); 0 for equal Gaussians.

    The trace of the root is that of the symmetric (A^(1/2) B A^(1/2))^(1/2), so singular covariances need no offset.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ b.covariance @ root_a).clip(min=0)
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(cross).sum())
