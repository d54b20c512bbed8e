"""Mean and standard deviation of latents by channel: streaming, and merged over shards and ranks.

Letters: N records, C channels on disk, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

import msgspec
import numpy as np
import torch
from torch import Tensor

from promoe_ds.data.normalization.values import LatentNormalization

#: Bounds of the logarithm of the posterior's variance, as diffusers' DiagonalGaussianDistribution
#: has them.
LOG_VARIANCE_BOUNDS = (-30.0, 20.0)
#: Records of which copies in float64 are in memory at once.
_AT_ONCE = 256


class LatentStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Of each channel (Z,), over `count` values of it: mean and population standard deviation."""

    count: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check what the types do not say.

        Raises: ValueError for other numbers of means and deviations, or a negative deviation.
        """
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) < 0:
            raise ValueError("mean and std need one value a channel, std at least 0")

    @property
    def pooled(self) -> LatentStatistics:
        """The statistics of all channels together, as one channel."""
        parts = [
            LatentStatistics(count=self.count, mean=(mean,), std=(std,))
            for mean, std in zip(self.mean, self.std, strict=True)
        ]
        return merge(parts)

    def normalized(self, by: LatentNormalization) -> LatentStatistics:
        """Return the statistics of the same latents after normalisation."""
        mean, factor = by.per_channel(len(self.mean))
        means, deviations = np.array(self.mean), np.array(self.std)
        return _statistics(self.count, (means - mean) * factor, deviations * factor)

    def denormalized(self, by: LatentNormalization) -> LatentStatistics:
        """Return the statistics of latents of which these are those after normalisation."""
        mean, factor = by.per_channel(len(self.mean))
        means, deviations = np.array(self.mean), np.array(self.std)
        return _statistics(self.count, means / factor + mean, deviations / factor)


def merge(parts: Sequence[LatentStatistics]) -> LatentStatistics:
    """Return the statistics of all parts together, in any order the same."""
    counts_P1 = np.array([[part.count] for part in parts])
    means_PZ = np.array([part.mean for part in parts])
    stds_PZ = np.array([part.std for part in parts])
    count = int(counts_P1.sum())

    def average(values_PZ: np.ndarray) -> np.ndarray:
        return np.array([fsum(channel) for channel in (counts_P1 * values_PZ).T]) / count

    mean_Z = average(means_PZ)
    std_Z = np.sqrt(average(stds_PZ**2 + (means_PZ - mean_Z) ** 2))
    return _statistics(count, mean_Z, std_Z)


def _statistics(
    count: int, mean_Z: np.ndarray | Tensor, std_Z: np.ndarray | Tensor
) -> LatentStatistics:
    return LatentStatistics(count=count, mean=tuple(mean_Z.tolist()), std=tuple(std_Z.tolist()))


def merge_known(parts: Sequence[LatentStatistics | None]) -> LatentStatistics | None:
    """Return the statistics of all parts together, None where those of one are unknown."""
    known = [part for part in parts if part is not None]
    return merge(known) if len(known) == len(parts) else None


def measure(variants: Sequence[Tensor], *, has_posterior: bool) -> LatentStatistics | None:
    """Return the statistics of latents as training takes them, None if there are none.

    Args:
        variants: records (N, C, H, W), and those of the mirrored images.
        has_posterior: records are moments: the variance of a drawn latent is that of the means and
            the mean of the posteriors' variances.
    """
    parts = [
        _measured(records, has_posterior)
        for variant in variants
        for records in variant.split(_AT_ONCE)
        if len(records)
    ]
    return merge(parts) if parts else None


def _measured(records_NCHW: Tensor, has_posterior: bool) -> LatentStatistics:
    values, axes = records_NCHW.double(), (0, 2, 3)
    if has_posterior:
        values, log_variance = values.chunk(2, dim=1)
    variance_Z, mean_Z = torch.var_mean(values, dim=axes, correction=0)
    if has_posterior:
        variance_Z = variance_Z + log_variance.clamp(*LOG_VARIANCE_BOUNDS).exp().mean(dim=axes)
    return _statistics(values.numel() // values.shape[1], mean_Z, variance_Z.sqrt())
