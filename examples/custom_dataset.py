"""A data set of your own in one file: discs, squares and crosses of any place and size.

    promoe-train --import examples/custom_dataset.py --recipe digits_promoe \
        --deepspeed_config ds_configs/zero0_fp32.json --run-dir runs/shapes \
        --set parallel.ep_size=1 data.dataset=shapes model.input_size=16 model.num_classes=3

Give the same --import to promoe-convert and promoe-sample. Letters: B samples.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.config import RunConfig
from promoe_ds.config.data import DATASETS as TRAITS
from promoe_ds.config.data import DatasetTraits
from promoe_ds.data.build import DATASETS
from promoe_ds.randomness import generator
from promoe_ds.registry import register

SIDE, LENGTH = 16, 3000

# What is known before anything is opened: a recipe of other sizes or classes is refused at once.
TRAITS["shapes"] = DatasetTraits(size=(SIDE, 1), conditions=("class",), classes=3)


@register(DATASETS, "shapes")
class Shapes:
    """Pictures in [-1, 1] with a label each, made when they are asked for."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._null_label = config.model.null_label

    def __len__(self) -> int:
        return LENGTH

    def take(
        self, indices: np.ndarray, positions: np.ndarray | None = None
    ) -> tuple[Tensor, ClassCondition]:
        """Return latents (B, 1, 16, 16) and their condition.

        The order of training and its resumption are the package's: the same index must give the
        same sample. What is drawn anew each time would be a function of `positions`.
        """
        images = np.stack([draw(int(index)) for index in indices])
        labels = torch.from_numpy(np.asarray(indices) % 3)
        return torch.from_numpy(images), ClassCondition(labels, self._null_label)


def draw(index: int) -> np.ndarray:
    """Return one picture, (1, 16, 16) fp32: shape index % 3, the rest from a seed."""
    random = generator(0, "data", index)
    radius, (x, y) = random.uniform(2, 5), random.uniform(5, 11, size=2)
    dx, dy = np.abs(np.mgrid[:SIDE, :SIDE] + 0.5 - np.array([x, y])[:, None, None])
    inside = (
        np.hypot(dx, dy) < radius,
        np.maximum(dx, dy) < radius,
        (np.minimum(dx, dy) < 1) & (np.maximum(dx, dy) < radius),
    )[index % 3]
    return np.where(inside, 1.0, -1.0).astype(np.float32)[None]
