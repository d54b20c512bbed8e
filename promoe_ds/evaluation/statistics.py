"""Statistics of a set of images' features, a batch at a time, on many ranks: float64 throughout.

Letters: N images, d features, c classes, S splits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

import numpy as np
import xxhash

from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import DataError
from promoe_ds.evaluation.features import Extractor, Features
from promoe_ds.evaluation.frechet import Gaussian
from promoe_ds.evaluation.sources import FolderImages, NpzImages
from promoe_ds.logs import Progress, get_logger

_LOG = get_logger("evaluate")


class Statistic(Protocol):
    """What is kept of one output of the extractor."""

    def __init__(self, num_images: int, dimension: int) -> None:
        """Expect the images 0 ... num_images - 1, over all ranks."""

    def add(self, first: int, values_Nd: np.ndarray) -> None:
        """Add consecutive images from `first` on."""

    def result(self, team: DistributedContext) -> Any:
        """Return the statistic over all ranks; all call this together."""


#: An attribute of `Features`, and what to keep of it.
Wanted = tuple[str, type[Statistic]]


class RunningGaussian:
    """Mean and covariance, without keeping what was added.

    Source: Chan, Golub & LeVeque (1979): sums of squares about the mean so far, merged exactly; no
    cancellation.
    """

    def __init__(self, num_images: int, dimension: int) -> None:
        """Start empty."""
        self.count = 0
        self.mean, self.scatter = np.zeros(dimension), np.zeros((dimension, dimension))

    def add(self, first: int, values_Nd: np.ndarray) -> None:
        """Add a batch."""
        values = np.asarray(values_Nd, dtype=np.float64)
        if not len(values):
            return
        mean = values.mean(axis=0)
        centred = values - mean
        total, shift = self.count + len(values), mean - self.mean
        between = np.outer(shift, shift) * (self.count * len(values) / total)
        self.scatter += centred.T @ centred + between
        self.mean += shift * (len(values) / total)
        self.count = total

    def result(self, team: DistributedContext) -> Gaussian:
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

    Source: Salimans et al. (2016); ADM: splits of 5,000 images, the last one smaller, all of equal
    weight.
    """

    SPLIT = 5000

    def __init__(self, num_images: int, dimension: int) -> None:
        """Expect the images 0 ... num_images - 1, and `dimension` classes."""
        splits = -(-num_images // self.SPLIT)
        self._counts = np.zeros(splits)
        self._sums = np.zeros((splits, dimension))
        self._negative_entropies = np.zeros(splits)

    def add(self, first: int, values_Nd: np.ndarray) -> None:
        """Add the class probabilities (N, c) of consecutive images from `first` on."""
        p = np.asarray(values_Nd, dtype=np.float64)
        # 0 log 0 = 0, of classes that a network rules out.
        terms = (p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1)
        splits = (first + np.arange(len(p))) // self.SPLIT
        for split in np.unique(splits):
            members = splits == split
            self._counts[split] += members.sum()
            self._sums[split] += p[members].sum(axis=0)
            self._negative_entropies[split] += terms[members].sum()

    def result(self, team: DistributedContext) -> float:
        """Return the score over all ranks; all call this together."""
        counts, sums, entropies = map(
            team.sum, (self._counts, self._sums, self._negative_entropies)
        )
        marginal = sums / counts[:, None]
        cross = (marginal * np.log(np.where(marginal > 0, marginal, 1.0))).sum(axis=1)
        return float(np.exp(entropies / counts - cross).mean())


class AllFeatures:
    """The features themselves, on every rank: N x d x 8 bytes of memory."""

    def __init__(self, num_images: int, dimension: int) -> None:
        """Expect the images 0 ... num_images - 1."""
        self._values_Nd = np.zeros((num_images, dimension))

    def add(self, first: int, values_Nd: np.ndarray) -> None:
        """Add consecutive images from `first` on."""
        self._values_Nd[first : first + len(values_Nd)] = values_Nd

    def result(self, team: DistributedContext) -> np.ndarray:
        """Return all of them, (N, d); all ranks call this together."""
        return team.sum(self._values_Nd)


def summarise(
    images: NpzImages | FolderImages,
    extractor: Extractor,
    team: DistributedContext,
    *,
    batch_size: int,
    wanted: Collection[Wanted],
) -> tuple[dict[Wanted, Any], str]:
    """Extract features batch by batch, each rank a share of the batches; all call this together.

    Returns: what is wanted, and the xxh3_64 of the images' own xxh3_64, of their pixels alone: the
        same in a folder and in any npz.
    Raises: DataError for fewer than two images, or features that are not finite.
    """
    if len(images) < 2:
        raise DataError(f"{images.path}: {len(images)} image, a covariance needs at least 2")
    statistics: dict[Wanted, Statistic] = {}
    digests_N = np.zeros(len(images), dtype=np.uint64)
    for rows, pixels, features in _features_of(images, extractor, team, batch_size):
        for output, kind in wanted:
            values = getattr(features, output)
            if (output, kind) not in statistics:
                statistics[output, kind] = kind(len(images), values.shape[1])
            statistics[output, kind].add(rows.start, values[: len(rows)])
        digests_N[rows.start : rows.stop] = [
            xxhash.xxh3_64_intdigest(image.tobytes()) for image in pixels[: len(rows)]
        ]
    # Each image was read by one rank; the others left its place at 0.
    digest = xxhash.xxh3_64(np.bitwise_or.reduce(team.gather(digests_N)).tobytes()).hexdigest()
    return {key: statistics[key].result(team) for key in wanted}, f"xxh3_64:{digest}"


def _features_of(
    images: NpzImages | FolderImages,
    extractor: Extractor,
    team: DistributedContext,
    batch_size: int,
) -> Iterator[tuple[range, np.ndarray, Features]]:
    """Yield this rank's batches; at least one, possibly with no rows that count, so that all know
    the sizes."""
    firsts = range(0, len(images), batch_size)
    batches = [range(first, min(first + batch_size, len(images))) for first in firsts]
    progress = Progress(_LOG, len(images), "images")
    for rows in batches[team.rank :: team.world_size] or [range(0)]:
        pixels = images.read(rows or range(1))
        features = extractor(pixels)
        if not features.is_finite:
            raise DataError(
                f"{images.path}: extractor {extractor.identity['name']} returns features that are "
                f"not finite for the images {rows.start} ... {max(rows.stop - 1, 0)}: no figure "
                "can be computed from them"
            )
        yield rows, pixels, features
        progress.add(len(rows) * team.world_size)  # the other ranks are about as far
