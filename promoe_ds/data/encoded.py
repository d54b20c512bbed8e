"""Images encoded while training, by a frozen autoencoder: slow, but nothing has to be prepared.

Letters: B images, Z latent channels, H, W size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.augment import draw_flips, draw_latents
from promoe_ds.data.images import CorruptFiles, TreeReader, check_classes, read_image, scan_tree
from promoe_ds.data.reading import shown
from promoe_ds.data.shards import first_not_finite
from promoe_ds.data.vae import Vae
from promoe_ds.errors import DataError

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class EncodedImages:
    """A tree of images whose latents are made when they are taken."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """List the tree and load the autoencoder onto `device`.

        Raises: DataError if either is missing or does not fit the recipe.
        """
        self._tree = scan_tree(Path(config.data.path))
        check_classes(self._tree.root, len(self._tree.classes), config.model.num_classes)
        self._vae = Vae(config.data.vae, device=device, dtype=_DTYPES[config.data.vae_dtype])
        identity = self._vae.identity
        if identity.latent_channels != config.model.in_channels:
            raise DataError(f"{identity.name} has {identity.latent_channels} latent channels, model.in_channels="
                            f"{config.model.in_channels}")
        if abs(identity.scaling_factor - config.data.latent_scale) > 1e-6:
            raise DataError(f"{identity.name} scales its latents by {identity.scaling_factor}, but data.latent_scale="
                            f"{config.data.latent_scale}")
        self._null = config.model.null_label
        size = config.model.input_size * identity.downsampling
        self._reader = TreeReader(self._tree, lambda path: read_image(path, size), config.data.workers)
        self._corrupt = CorruptFiles(config.data.max_corrupt, "data.max_corrupt")
        self._scale, self._seed, self._flip = config.data.latent_scale, config.train.seed, config.data.flip is not False

    def __len__(self) -> int:
        return len(self._tree)

    def take(self, indices: np.ndarray, positions: np.ndarray | None = None) -> tuple[Tensor, ClassCondition]:
        """Return scaled fp32 latents (B, Z, H, W), on the CPU, and their classes; mirrored and drawn by position.

        An image that cannot be read is named, counted, and replaced by the next one of the tree that can.
        Raises: DataError when `data.max_corrupt` is passed, none of all images can be read, or a latent is not finite.
        """
        chosen, images = self._read(np.asarray(indices))
        flips = draw_flips(self._seed, positions, len(images), flip=self._flip)
        pixels = np.stack([image[:, ::-1] if flip else image for image, flip in zip(images, flips, strict=True)])
        moments = self._vae.encode(pixels).cpu()
        if (bad := first_not_finite(moments)) is not None:
            raise DataError(f"{shown(self._tree.root / self._tree.names[chosen[bad]])}: its latent is not finite: encode with "
                            "data.vae_dtype=fp32, or remove the image")
        latents = draw_latents(moments, self._seed, positions)
        return latents.mul_(self._scale), ClassCondition(torch.from_numpy(self._tree.labels[chosen]), self._null)

    def _read(self, indices: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        chosen = indices.copy()
        images: list[np.ndarray] = []
        for place, image in enumerate(self._reader.try_all(chosen.tolist())):
            tries = 0
            while isinstance(image, DataError):
                self._corrupt.add(self._tree.names[chosen[place]], str(image))
                if (tries := tries + 1) == len(self._tree):
                    raise DataError(f"{self._tree.root}: none of its {len(self._tree)} images could be read")
                chosen[place] = (chosen[place] + 1) % len(self._tree)
                image = self._reader.try_all([int(chosen[place])])[0]
            images.append(image)
        return chosen, images
