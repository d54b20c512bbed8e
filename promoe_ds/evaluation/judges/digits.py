"""The judge of digits: a classifier trained on real ones, and the distance of pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.config import RunConfig
from promoe_ds.data.digits import load_digits_split
from promoe_ds.errors import DataError
from promoe_ds.evaluation.frechet import fit_gaussian, frechet_distance
from promoe_ds.evaluation.images import read_samples, to_uint8
from promoe_ds.evaluation.judges.judge import Figure, Judge, heldout_figure

_NOISE_SEED = 0


class DigitsJudge(Judge):
    """Judges 8x8 digits by pixels."""

    figures = (
        heldout_figure("digits"),
        Figure(
            name="frechet",
            heading="Fréchet",
            title="Fréchet distance of pixels to held-out digits, lower is better",
            unit="squared distance, pixels in [0, 1]",
            meaning="Squared Fréchet distance of pixels to the digits held out from training.",
            landmark=("training digits", "frechet_of_training_digits"),
        ),
        Figure(
            name="accuracy",
            heading="accuracy, %",
            title="Samples recognised as their label, higher is better",
            unit="% of samples",
            meaning=(
                "Share that a classifier trained on real digits recognises as the label asked for."
            ),
            decimals=1,
            factor=100.0,
            landmark=("real digits", "accuracy_on_real"),
        ),
    )
    libraries: ClassVar[dict[str, str]] = {"sklearn": "report"}

    def wanted(self, num: int) -> dict[str, Any]:
        """Return so many digits, all classes in turn."""
        return {"num": num}

    def judge(self, samples: Path, heldout_fraction: float = 0.2) -> dict[str, Any]:
        """Return accuracies in [0, 1], of samples and of real digits, and squared Fréchet distances
        of pixels in [0, 1] to the held-out digits.

        The classifier (a support-vector machine on pixels) sees the training digits only; its
        accuracy on the held-out ones says how far it can be trusted. Training digits and uniform
        noise are the distance's two landmarks.
        """
        images, labels = read_samples(samples)
        are_digits = images.shape[1:] == (8, 8, 1) and set(labels.tolist()) <= set(range(10))
        if not are_digits or len(images) < 2:
            raise DataError(
                f"{samples}: {images.shape} images are no 8x8 digits with labels 0 ... 9"
            )
        train_images, train_labels = load_digits_split(heldout_fraction, heldout=False)
        heldout_images, heldout_labels = load_digits_split(heldout_fraction, heldout=True)
        from sklearn.svm import SVC  # it is there: the digits come from it

        real, unseen = _features(to_uint8(train_images)), _features(to_uint8(heldout_images))
        classifier = SVC(gamma="scale", C=10.0).fit(real, train_labels)
        features = _features(images)
        is_right = classifier.predict(features) == labels
        target = fit_gaussian(unseen)
        noise = np.random.default_rng(_NOISE_SEED).random(features.shape)
        return {
            "samples": len(labels),
            "accuracy": float(is_right.mean()),
            "accuracy_by_class": {
                int(label): float(is_right[labels == label].mean()) for label in np.unique(labels)
            },
            "accuracy_on_real": float(classifier.score(unseen, heldout_labels)),
            "frechet": frechet_distance(fit_gaussian(features), target),
            "frechet_of_training_digits": frechet_distance(fit_gaussian(real), target),
            "frechet_of_noise": frechet_distance(fit_gaussian(noise), target),
        }

    def words(self, report: dict[str, Any]) -> str:
        """Return a report as text."""
        by_class = "  ".join(
            f"{label}: {share:.0%}" for label, share in report["accuracy_by_class"].items()
        )
        return f"""{report["samples"]} samples
  recognised as their label by a classifier trained on real digits: {report["accuracy"]:.1%}
    (the same classifier on real digits it has not seen: {report["accuracy_on_real"]:.1%})
    {by_class}
  Frechet distance of the pixels to real digits never trained on: {report["frechet"]:.3f}
    (0 = same mean and covariance; the training digits: \
{report["frechet_of_training_digits"]:.3f}, uniform noise: {report["frechet_of_noise"]:.3f})
"""

    def heldout(self, config: RunConfig) -> tuple[Tensor, ClassCondition]:
        """Return the held-out digits and their labels."""
        images, labels = load_digits_split(config.data.heldout_fraction, heldout=True)
        condition = ClassCondition(torch.from_numpy(labels), config.model.null_label)
        return torch.from_numpy(images), condition


def _features(images_NHWC: np.ndarray) -> np.ndarray:
    return images_NHWC.reshape(len(images_NHWC), -1).astype(np.float64) / 255.0
