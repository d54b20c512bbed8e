"""Figures of sets of features that are seen a batch at a time, on many ranks: float64 throughout.

Letters: N images, d features, c classes, S splits.
"""

from __future__ import annotations

import numpy as np

from promoe_ds.distributed.context import DistributedContext
from promoe_ds.evaluation.frechet import Gaussian


class RunningGaussian:
    """Mean and covariance of all that was added, without keeping it.

    Source: Chan, Golub & LeVeque (1979): sums of squares about the mean so far, merged exactly; no cancellation.
    """

    def __init__(self, dimension: int) -> None:
        """Start empty."""
        self.count = 0
        self.mean, self.scatter = np.zeros(dimension), np.zeros((dimension, dimension))

    def add(self, features_Nd: np.ndarray) -> None:
        """Add a batch."""
        features = np.asarray(features_Nd, dtype=np.float64)
        if not len(features):
            return
        mean = features.mean(axis=0)
        centred = features - mean
        total, shift = self.count + len(features), mean - self.mean
        self.scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * len(features) / total)
        self.mean += shift * (len(features) / total)
        self.count = total

    def gaussian(self, team: DistributedContext) -> Gaussian:
        """Return mean and unbiased covariance over all ranks; all call this together.

        Raises: ValueError for fewer than two images.
        """
        total = team.sum(np.array([self.count], dtype=np.float64))[0]
        if total < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {int(total)}")
        mean = team.sum(self.mean * self.count) / total
        shift = self.mean - mean
        scatter = team.sum(self.scatter + self.count * np.outer(shift, shift))
        return Gaussian(mean, scatter / (total - 1))


class InceptionScore:
    """exp(E KL(p(y|x) || p(y))), the mean over splits of consecutive images.

    Source: Salimans et al. (2016); ADM: splits of 5,000 images, the last one smaller, all of equal weight.
    """

    SPLIT = 5000

    def __init__(self, num_images: int, num_classes: int) -> None:
        """Expect the images 0 ... num_images - 1."""
        splits = -(-num_images // self.SPLIT)
        self._counts = np.zeros(splits)
        self._sums = np.zeros((splits, num_classes))
        self._negative_entropies = np.zeros(splits)

    def add(self, first: int, probabilities_Nc: np.ndarray) -> None:
        """Add consecutive images from `first` on."""
        p = np.asarray(probabilities_Nc, dtype=np.float64)
        # 0 log 0 = 0, of classes that a network rules out.
        terms = (p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1)
        splits = (first + np.arange(len(p))) // self.SPLIT
        for split in np.unique(splits):
            members = splits == split
            self._counts[split] += members.sum()
            self._sums[split] += p[members].sum(axis=0)
            self._negative_entropies[split] += terms[members].sum()

    def score(self, team: DistributedContext) -> float:
        """Return the score over all ranks; all call this together."""
        counts, sums, entropies = (team.sum(values) for values in (self._counts, self._sums, self._negative_entropies))
        marginal = sums / counts[:, None]
        cross = (marginal * np.log(np.where(marginal > 0, marginal, 1.0))).sum(axis=1)
        return float(np.exp(entropies / counts - cross).mean())
