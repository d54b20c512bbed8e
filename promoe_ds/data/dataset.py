"""What every data set is, and what those on disk draw anew each time a sample is taken: its mirror
image, its latent.

Letters: B samples, C channels on disk, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition, Condition, EmptyText, TextCondition
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.normalization.check import normalization_problem
from promoe_ds.data.normalization.choice import choose_normalization
from promoe_ds.data.normalization.statistics import LOG_VARIANCE_BOUNDS, LatentStatistics
from promoe_ds.data.normalization.values import LatentNormalization
from promoe_ds.data.reading import shown, warn_once
from promoe_ds.data.vae import MOMENTS, Vae, VaeIdentity
from promoe_ds.errors import DataError
from promoe_ds.randomness import generator, hashes


class LatentDataset(Protocol):
    """An indexable set of latents and their conditions."""

    def __len__(self) -> int: ...

    def take(
        self, indices: np.ndarray, positions: np.ndarray | None = None
    ) -> tuple[Tensor, Condition]:
        """Return fp32 latents (B, Z, H, W), scaled as the network wants them, and their conditions.

        `positions` in the training stream (see `order`) decide what is drawn anew each time, if
        anything is; without them nothing is drawn.
        """


class SyntheticLatents:
    """Standard-normal latents with random labels or texts, to time a step; nothing can be
    learned.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """Use the recipe's shapes, classes and seed."""
        self._model, self._seed = config.model, config.train.seed
        self._groups = config.num_groups
        self._count = config.data.synthetic_samples

    def __len__(self) -> int:
        return self._count

    def take(
        self, indices: np.ndarray, positions: np.ndarray | None = None
    ) -> tuple[Tensor, Condition]:
        """Return the latents and conditions of these indices, always the same."""
        model = self._model
        shape = model.in_channels, *model.latent_size
        draws = [generator(self._seed, "synthetic", int(index)) for index in indices]
        latents = [draw.standard_normal(shape, dtype=np.float32) for draw in draws]
        clean = torch.from_numpy(np.stack(latents))
        labels = [draw.integers(self._groups) for draw in draws if self._groups]
        if model.condition == "text":
            return clean, self._texts(draws, labels)
        return clean, ClassCondition(torch.tensor(labels, dtype=torch.int64), model.null_label)

    def _texts(self, draws: list[np.random.Generator], groups: list[np.int64]) -> TextCondition:
        """Draw texts of 1 ... text_length tokens; the empty one, for all the same, has one."""
        lengths = [int(draw.integers(1, self._model.text_length + 1)) for draw in draws]
        texts = list(map(self._text, draws, lengths))
        return TextCondition.of_states(
            [tokens_LC for tokens_LC, _ in texts],
            torch.stack([pooled_C for _, pooled_C in texts]),
            EmptyText(*self._text(generator(self._seed, "synthetic", self._count), 1)),
            groups_B=torch.tensor(groups, dtype=torch.int64) if groups else None,
            num_groups=self._groups,
        )

    def _text(self, draw: np.random.Generator, length: int) -> tuple[Tensor, Tensor]:
        tokens_LC = draw.standard_normal((length, self._model.text_width), dtype=np.float32)
        pooled_C = draw.standard_normal(self._model.pooled_width, dtype=np.float32)
        return torch.from_numpy(tokens_LC).bfloat16(), torch.from_numpy(pooled_C)


class DrawnLatents(ABC):
    """Latents or posteriors of classes, mirrored and drawn by position.

    kind: `moments` of posteriors, or `latents`.  A reader sets `_labels`.
    normalization: between the autoencoder's latents and the network's.
    """

    kind = MOMENTS
    #: (N,) int64.
    _labels: Tensor

    def __init__(
        self,
        config: RunConfig,
        where: Path,
        *,
        has_twins: bool,
        classes: int | None = None,
        vae: VaeIdentity | None = None,
        measured: LatentStatistics | None = None,
    ) -> None:
        """Take normalisation, seed and mirroring from the recipe, and compare with it what is
        known.

        Args:
            has_twins: whether samples can be mirrored.
            classes, vae, measured: number of classes, autoencoder, statistics of the latents; None
                where nothing says it.
        Raises: DataError naming both sides of what does not fit; rank 0 warns of fewer classes than
            the recipe's, and of an autoencoder that is taken on trust.
        """
        data, groups, named = config.data, config.num_groups, config.groups_field
        if data.flip is True and not has_twins:
            raise DataError(
                f"{where}: holds no mirrored latents, but data.flip=true: encode them with both, or"
                " leave data.flip out"
            )
        # Captions need no groups; classes need labels.
        if classes is not None and classes > groups > 0:
            raise DataError(f"{shown(where)}: {classes} classes, but {named}={groups}")
        if classes is not None and classes < groups:
            warn_once(
                "%s: %d classes of %s=%d: the labels from %d on never occur",
                *(where, classes, named, groups, classes),
            )
        self.normalization = choose_normalization(data, vae, measured, where)
        self._where, self._measured = where, measured
        self._applied = LatentNormalization() if data.latents_normalized else self.normalization
        if vae is not None:
            _check_vae(where, vae, with_normalization(config, self.normalization))
        elif data.vae is not None:
            warn_once(
                "%s: nothing there says which autoencoder the latents come from; that it is"
                " data.vae=%s is taken on trust",
                *(where, data.vae),
            )
        self._flip = has_twins and data.flip is not False
        self._seed = config.train.seed
        self._null = config.model.null_label

    def __len__(self) -> int:
        return len(self._labels)

    @abstractmethod
    def read(self, indices: np.ndarray, flips: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return records as stored (B, C, H, W), fp32, mirrored where `flips` says so, and labels
        (B,).

        Raises: DataError naming what cannot be read or is not finite.
        """

    def take(
        self, indices: np.ndarray, positions: np.ndarray | None = None
    ) -> tuple[Tensor, Condition]:
        """Return normalised fp32 latents (B, Z, H, W) on the CPU and their conditions.

        Raises: DataError naming what cannot be read or is not finite.
        """
        flips = np.zeros(len(indices), dtype=bool)
        if self._flip and positions is not None:
            flips = (hashes(self._seed, "flip", positions) & np.uint64(1)).astype(bool)
        latents, labels = self.read(np.asarray(indices), flips)
        if self.kind == MOMENTS:
            latents = draw_latents(latents, self._seed, positions)
        return self._applied.normalize(latents), self.conditions(indices, labels, positions)

    def check(self, latents_BZHW: Tensor) -> None:
        """Compare the first latents that were taken with what normalised ones are like.

        Raises: DataError saying what they look like: scaled twice, never, or of another
            autoencoder.
        """
        if problem := normalization_problem(latents_BZHW, self._applied, self._measured):
            raise DataError(f"{shown(self._where)}: {problem}")

    def conditions(
        self, indices: np.ndarray, labels: Tensor, positions: np.ndarray | None
    ) -> Condition:
        """Return what these samples, of these labels, are conditioned on."""
        return ClassCondition(labels, self._null)


def draw_latents(moments_BCHW: Tensor, seed: int, positions: np.ndarray | None) -> Tensor:
    """Draw latents: mean + exp(log variance / 2) * normal noise; means where `positions` is None.

    Source: Kingma & Welling (2014); published code: the same, noise by the process. Here it is a
    function of (seed, position), drawn by torch: a third of numpy's time, which would be most of a
    loader's. torch takes the low 32 bits of a seed, so a noise comes again, for another sample,
    about every four billion draws.
    Args:
        moments_BCHW: fp32, C = 2 Z: means, then logarithms of the variances.
    Returns: (B, Z, H, W), fp32.
    """
    mean, log_variance = moments_BCHW.chunk(2, dim=1)
    if positions is None:
        return mean.contiguous()
    noise, source = torch.empty(mean.shape), torch.Generator()
    keys = hashes(seed, "posterior", positions).tolist()
    for row, key in zip(noise.unbind(0), keys, strict=True):
        row.normal_(generator=source.manual_seed(key >> 1))
    return log_variance.clamp(*LOG_VARIANCE_BOUNDS).mul_(0.5).exp_().mul_(noise).add_(mean)


def first_not_finite(records: Tensor) -> int | None:
    """Return the place of the first record, (B, ...), with a value that is not finite; None if all
    are.
    """
    if torch.isfinite(records).all():
        return None
    return int((~torch.isfinite(records)).flatten(1).any(dim=1).nonzero()[0])


def with_normalization(config: RunConfig, normalization: LatentNormalization) -> RunConfig:
    """Return the config with the values that latents are normalised by."""
    data = config.data.model_copy(update=asdict(normalization))
    return config.model_copy(update={"data": data})


def _check_vae(where: Path, vae: VaeIdentity, config: RunConfig) -> None:
    if misfit := vae.misfit(config):
        raise DataError(f"{where}: {vae.name} has {misfit}")
    if not vae.is_meant(config.data.vae, Vae):
        raise DataError(
            f"{where}: the latents were encoded by {vae.name}"
            f" ({vae.fingerprint or 'weights unknown'}), the recipe wants data.vae="
            f"{config.data.vae}: encode them anew, or set data.vae to the one that they come from"
        )
