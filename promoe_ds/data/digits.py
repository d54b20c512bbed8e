"""scikit-learn's bundled handwritten digits: 1,797 real 8x8 images, ten classes, no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import DataError
from promoe_ds.randomness import generator

_SPLIT_SEED = 0  # of the data set, not of a run: the held-out images are the same for everybody
_LARGEST_VALUE = 16.0


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8), fp32 in [-1, 1], and labels (N,), int64."""

    images: np.ndarray
    labels: np.ndarray


def load_digits_split(heldout_fraction: float, *, heldout: bool) -> Digits:
    """Return the training or the held-out digits.

    Args:
        heldout_fraction: of each class, in (0, 1); the choice is fixed.
        heldout: which side.
    Raises: DataError if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "data.dataset=digits needs scikit-learn: pip install 'promoe_ds[report]'"
        ) from None
    bundle = load_digits()
    images = (bundle.images / (_LARGEST_VALUE / 2) - 1.0).astype(np.float32)[:, None]
    labels = bundle.target.astype(np.int64)
    is_heldout = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = generator(_SPLIT_SEED, "data", digit).permutation(np.flatnonzero(labels == digit))
        is_heldout[members[: round(heldout_fraction * len(members))]] = True
    chosen = is_heldout if heldout else ~is_heldout
    return Digits(images[chosen], labels[chosen])


class TrainingDigits:
    """The digits that are not held out, in memory."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """Load them.

        Raises: DataError if scikit-learn is missing.
        """
        self._digits = load_digits_split(config.data.heldout_fraction, heldout=False)
        self._scale, self._null = np.float32(config.data.latent_scale), config.model.null_label

    def __len__(self) -> int:
        return len(self._digits.labels)

    def take(
        self, indices: np.ndarray, positions: np.ndarray | None = None
    ) -> tuple[Tensor, ClassCondition]:
        """Return the chosen images, (B, 1, 8, 8) fp32, and their labels."""
        labels = torch.from_numpy(self._digits.labels[indices])
        return torch.from_numpy(self._digits.images[indices] * self._scale), ClassCondition(
            labels, self._null
        )
