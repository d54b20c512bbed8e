"""The loss on held-out digits: the same draws for every model, exact for a model whose answer is
known.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from promoe_ds.config import load_config
from promoe_ds.data.digits import load_digits_split
from promoe_ds.evaluation.digits import heldout_loss
from promoe_ds.randomness import generator


class _Silent(nn.Module):
    """Predicts zero everywhere and notes what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.config = load_config("digits_promoe")
        self.labels: list[int] = []

    def forward(self, latents, timestep, labels):
        self.labels += labels.labels_B.tolist()
        return torch.zeros_like(latents)


def test_heldout_loss_of_zero_prediction_is_the_mean_square_of_the_velocity() -> None:
    images, labels = load_digits_split(0.2, heldout=True)
    model = _Silent()
    expected = []
    for draw in range(2):
        for slot, image in enumerate(images):
            noise = generator(5, "noise", draw, slot).standard_normal(image.shape, dtype=np.float32)
            expected.append(np.square(noise - image, dtype=np.float64).mean())
    assert heldout_loss(model, draws=2, seed=5, batch_size=50) == pytest.approx(
        np.mean(expected), rel=1e-6
    )
    # Every image under its own label, none dropped.
    assert model.labels == 2 * labels.tolist()


def test_heldout_loss_does_not_depend_on_the_batch_size() -> None:
    assert heldout_loss(_Silent(), draws=1, batch_size=7) == pytest.approx(
        heldout_loss(_Silent(), draws=1, batch_size=400)
    )
