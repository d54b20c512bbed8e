"""DDPM's chain of noise levels, in float64: its linear schedule, and the same chain in fewer steps.

Letters: J noise levels of a chain, least noise first. alpha_bar: the share of the image's variance
that is left.
"""

from __future__ import annotations

import numpy as np

#: Ho et al. (2020), Sec. 4: variances of the first and the last of 1000 steps.
BETA_FIRST, BETA_LAST, LINEAR_STEPS = 1e-4, 2e-2, 1000


def linear_alpha_bar(num_train_timesteps: int) -> np.ndarray:
    """Return alpha_bar_J of the linear schedule over `num_train_timesteps` steps.

    Source: Ho et al. (2020), Eq. 4; official DiT: the same, betas scaled so that every length ends
    about equally noisy.
    """
    scale = LINEAR_STEPS / num_train_timesteps
    return np.cumprod(
        1.0
        - np.linspace(scale * BETA_FIRST, scale * BETA_LAST, num_train_timesteps, dtype=np.float64)
    )


def respaced_timesteps(num_train_timesteps: int, steps: int) -> np.ndarray:
    """Return `steps` evenly spaced timesteps, from 0 to num_train_timesteps - 1, int64.

    Source: Nichol & Dhariwal (2021), Sec. 4; official DiT: the same to the last rounding, by a
    running sum: it falls short of an exact half where i * stride would hit it.
    """
    stride = (num_train_timesteps - 1) / (steps - 1)
    return np.cumsum([0.0] + [stride] * (steps - 1)).round().astype(np.int64)


def betas_of(alpha_bar_J: np.ndarray) -> np.ndarray:
    """Return the variances of the steps between consecutive levels: 1 - alpha_bar_i /
    alpha_bar_{i-1}.

    Source: Nichol & Dhariwal (2021), Eq. 19; official DiT: the same.
    """
    return 1.0 - alpha_bar_J / previous(alpha_bar_J)


def posterior_variance(alpha_bar_J: np.ndarray) -> np.ndarray:
    """Return the variances of one step back where the image is known; 0 for the step to the image
    itself.

    Source: Ho et al. (2020), Eq. 7; official DiT: the same.
    """
    return (1.0 - previous(alpha_bar_J)) / (1.0 - alpha_bar_J) * betas_of(alpha_bar_J)


def previous(alpha_bar_J: np.ndarray) -> np.ndarray:
    """Return the alpha_bar one level nearer to the image; 1 for the image itself."""
    return np.concatenate([[1.0], alpha_bar_J[:-1]])
