"""What is drawn anew each time a sample is taken: its mirror image, and a latent from its posterior.

Letters: B samples, Z latent channels, H, W latent size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from promoe_ds.randomness import generator

#: Probability of the mirrored twin.
_FLIP = 0.5
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
    return np.array([generator(seed, "augment", 0, int(position)).random() < _FLIP for position in positions], dtype=bool)


def draw_latents(moments_BCHW: Tensor, seed: int, positions: np.ndarray | None) -> Tensor:
    """Draw latents from posteriors: mean + exp(log variance / 2) * normal noise; the means where `positions` is None.

    Source: Kingma & Welling (2014); published code: the same, noise by the process. Here it is a function of (seed, position).
    Args:
        moments_BCHW: fp32, C = 2 Z: means, then logarithms of the variances.
    Returns: (B, Z, H, W), fp32.
    """
    mean, log_variance = moments_BCHW.chunk(2, dim=1)
    if positions is None:
        return mean.contiguous()
    noise = np.empty(mean.shape, dtype=np.float32)
    for row, position in zip(noise, positions, strict=True):
        generator(seed, "augment", 1, int(position)).standard_normal(dtype=np.float32, out=row)
    deviation = log_variance.clamp(*_LOG_VARIANCE_BOUNDS).mul_(0.5).exp_()
    return deviation.mul_(torch.from_numpy(noise).to(deviation.device)).add_(mean)
