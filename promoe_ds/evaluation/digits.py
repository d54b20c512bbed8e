"""Evaluating digits models: their samples, by a classifier trained on real digits, and their loss
on unseen ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from promoe_ds.condition import ClassCondition
from promoe_ds.data.digits import load_digits_split
from promoe_ds.diffusion import build_objective, draw_batch
from promoe_ds.errors import DataError
from promoe_ds.evaluation.frechet import fit_gaussian, frechet_distance
from promoe_ds.evaluation.images import read_samples, to_uint8
from promoe_ds.model.dit import DiT

_NOISE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class DigitsReport:
    """Accuracies in [0, 1]; squared Fréchet distances between pixels in [0, 1], each to the
    held-out digits.
    """

    samples: int
    accuracy: float
    accuracy_by_class: dict[int, float]
    accuracy_on_real: float
    frechet: float
    frechet_of_training_digits: float
    frechet_of_noise: float


def judge_samples(path: Path, heldout_fraction: float = 0.2) -> DigitsReport:
    """Classify samples and measure their distance to the digits held out from training.

    The classifier (a support-vector machine on pixels) sees the training digits only; its accuracy
    on the held-out ones says how far it can be trusted. Training digits and uniform noise are the
    distance's two landmarks. Args:
        path: samples.npz or its folder.
        heldout_fraction: that of the recipe, `data.heldout_fraction`.
    Raises: DataError if the samples are no 8x8 grey images with labels 0 ... 9.
    """
    from sklearn.svm import SVC

    images, labels = read_samples(path)
    if (
        images.shape[1:] != (8, 8, 1)
        or len(images) < 2
        or not set(labels.tolist()) <= set(range(10))
    ):
        raise DataError(f"{path}: {images.shape} images are no 8x8 digits with labels 0 ... 9")
    train_images, train_labels = load_digits_split(heldout_fraction, heldout=False)
    heldout_images, heldout_labels = load_digits_split(heldout_fraction, heldout=True)
    real, unseen = _features(to_uint8(train_images)), _features(to_uint8(heldout_images))
    classifier = SVC(gamma="scale", C=10.0).fit(real, train_labels)
    features = _features(images)
    is_right = classifier.predict(features) == labels
    target = fit_gaussian(unseen)
    noise = np.random.default_rng(_NOISE_SEED).random(features.shape)
    return DigitsReport(
        samples=len(labels),
        accuracy=float(is_right.mean()),
        accuracy_by_class={int(c): float(is_right[labels == c].mean()) for c in np.unique(labels)},
        accuracy_on_real=float(classifier.score(unseen, heldout_labels)),
        frechet=frechet_distance(fit_gaussian(features), target),
        frechet_of_training_digits=frechet_distance(fit_gaussian(real), target),
        frechet_of_noise=frechet_distance(fit_gaussian(noise), target),
    )


@torch.no_grad()
def heldout_loss(model: DiT, *, draws: int = 8, seed: int = 0, batch_size: int = 64) -> float:
    """Return the mean diffusion loss of a model, in evaluation mode, on the digits held out from
    its training.

    Every image meets its own label and the same `draws` noises and noise levels whatever the model:
    differences between models are theirs. Methods that choose from the batch get batches of
    `batch_size`. Args:
        model: of a digits recipe.
    """
    config, objective = model.config, build_objective(model.config.diffusion)
    images, labels = map(
        torch.from_numpy, load_digits_split(config.data.heldout_fraction, heldout=True)
    )
    images, condition = (
        images * config.data.latent_scale,
        ClassCondition(labels, config.model.null_label),
    )
    total = 0.0
    for draw in range(draws):
        for start in range(0, len(labels), batch_size):
            slots = range(len(labels))[start : start + batch_size]
            own = condition.select(slice(start, slots.stop))
            clean = images[start : slots.stop]
            batch = draw_batch(clean, own, objective, seed=seed, step=draw, slots=slots)
            prediction = model(objective.noised(batch), objective.timestep(batch), own)
            total += len(slots) * objective.losses(prediction, batch)["diffusion"].item()
    return total / (draws * len(labels))


def _features(images_NHWC: np.ndarray) -> np.ndarray:
    return images_NHWC.reshape(len(images_NHWC), -1).astype(np.float64) / 255.0
