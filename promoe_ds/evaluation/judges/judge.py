"""What a judge of a data set is, and the loss on what was held out, which all judges share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from promoe_ds.condition import Condition
from promoe_ds.config import RunConfig
from promoe_ds.data.normalization.values import LatentNormalization
from promoe_ds.diffusion import build_objective, draw_batch
from promoe_ds.model.dit import DiT


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number of a judge's report, and how it is shown.

    name: in the report and in comparison.json; heading: of a table's column; title, unit: of a
    chart; meaning: how it is measured; factor: from the number to the unit; landmark: what else the
    chart marks, and its name in the report.
    """

    name: str
    heading: str
    title: str
    unit: str
    meaning: str
    decimals: int = 3
    factor: float = 1.0
    landmark: tuple[str, str] | None = None


class Judge(ABC):
    """Judges samples of one data set, and models of it by their loss.

    figures: in the order of a report; the first is `heldout_loss`, the others are entries of what
    `judge` returns; libraries: what must be installed, and the extra that has it.
    """

    figures: ClassVar[tuple[Figure, ...]]
    #: What the licence of the pictures asks for beside samples of models trained on them.
    attribution: ClassVar[str] = ""
    libraries: ClassVar[dict[str, str]]

    @abstractmethod
    def wanted(self, num: int) -> dict[str, Any]:
        """Return what to sample to be judged by `num` images: fields of a SampleRequest."""

    @abstractmethod
    def judge(self, samples: Path, heldout_fraction: float = 0.2) -> dict[str, Any]:
        """Return a report on samples: JSON.

        Args:
            samples: folder of samples; heldout_fraction: `data.heldout_fraction` of the recipe,
            where the data set is split by it.
        Raises: DataError if they are no samples of this data set.
        """

    @abstractmethod
    def words(self, report: dict[str, Any]) -> str:
        """Return a report as text."""

    @abstractmethod
    def heldout(self, config: RunConfig) -> tuple[Tensor, Condition]:
        """Return the images never trained on, (N, C, H, W) fp32 in [-1, 1], and their own
        conditions.
        """


def heldout_figure(pictures: str) -> Figure:
    """Return the first figure of a judge of these pictures."""
    return Figure(
        name="heldout_loss",
        heading="held-out loss",
        title=f"Diffusion loss of the averaged weights on held-out {pictures}, lower is better",
        unit="squared error, equal noise for all",
        meaning=(
            f"Mean diffusion loss of the moving-average weights on the {pictures} held out from"
            " training, each with its own condition and the same noises and noise levels for every"
            " candidate and seed."
        ),
        decimals=4,
    )


@torch.no_grad()
def heldout_loss(
    model: DiT,
    images_NCHW: Tensor,
    condition: Condition,
    *,
    draws: int = 8,
    seed: int = 0,
    batch_size: int = 64,
) -> float:
    """Return the mean diffusion loss of a model, in evaluation mode, on images held out from its
    training, unscaled, each under its own condition.

    Every image meets the same `draws` noises and noise levels whatever the model: differences
    between models are theirs. Methods that choose from the batch get batches of `batch_size`.
    """
    config, objective = model.config, build_objective(model.config.diffusion)
    images, total = LatentNormalization.of(config.data).normalize(images_NCHW), 0.0
    for draw in range(draws):
        for start in range(0, len(images), batch_size):
            slots = range(len(images))[start : start + batch_size]
            own = condition.select(slice(start, slots.stop))
            clean = images[start : slots.stop]
            batch = draw_batch(clean, own, objective, seed=seed, step=draw, slots=slots)
            prediction = model(objective.noised(batch), objective.timestep(batch), own)
            total += len(slots) * objective.losses(prediction, batch)["diffusion"].item()
    return total / (draws * len(images))
