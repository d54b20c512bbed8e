"""What is drawn anew each time a sample is taken: its mirror image, and a latent from its posterior.

Letters: B samples, Z latent channels, H, W latent size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from promoe_ds.randomness import hashes

#: Bounds of the logarithm of the posterior's variance, as diffusers' DiagonalGaussianDistribution has them.
_LOG_VARIANCE_BOUNDS = (-30.0, 20.0)


def draw_flips(seed: int, positions: np.ndarray | None, count: int, *, flip: bool) -> np.ndarray:
    """Return whether each sample is mirrored, (B,) bool.

    Args:
        positions: places in the training stream, see `order`; None: as they are, nothing is drawn.
        count: B.
    """
    if positions is None or not flip:
        return np.zeros(count, dtype=bool)
    return (hashes(seed, "flip", positions) & np.uint64(1)).astype(bool)


def draw_latents(moments_BCHW: Tensor, seed: int, positions: np.ndarray | None) -> Tensor:
    """Draw latents from posteriors: mean + exp(log variance / 2) * normal noise; the means where `positions` is None.

    Source: Kingma & Welling (2014); published code: the same, noise by the process. Here it is a function of (seed, position),
    drawn by torch: a third of numpy's time, which would be most of a loader's. torch takes the low 32 bits of a seed, so a noise
    comes again, for another sample, about every four billion draws.
    Args:
        moments_BCHW: fp32, C = 2 Z: means, then logarithms of the variances.
    Returns: (B, Z, H, W), fp32.
    """
    mean, log_variance = moments_BCHW.chunk(2, dim=1)
    if positions is None:
        return mean.contiguous()
    noise, source = torch.empty(mean.shape), torch.Generator()
    for row, key in zip(noise.unbind(0), hashes(seed, "posterior", positions).tolist(), strict=True):
        row.normal_(generator=source.manual_seed(key >> 1))
    return log_variance.clamp(*_LOG_VARIANCE_BOUNDS).mul_(0.5).exp_().mul_(noise).add_(mean)
