"""Images encoded while training, by a frozen autoencoder: slow, but nothing has to be prepared.

Letters: B images, Z latent channels, H, W size.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from promoe_ds.config.schema import RunConfig
from promoe_ds.data.dataset import DrawnLatents, first_not_finite
from promoe_ds.data.images import read_image
from promoe_ds.data.index import check_scale
from promoe_ds.data.reading import shown
from promoe_ds.data.trees import CorruptFiles, TreeReader, check_classes, scan_tree
from promoe_ds.data.vae import Vae
from promoe_ds.errors import DataError

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class EncodedImages(DrawnLatents):
    """A tree of images whose latents are made when they are taken."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """List the tree and load the autoencoder onto `device`.

        Raises: DataError if either is missing or does not fit the recipe.
        """
        self._tree = scan_tree(Path(config.data.path))
        super().__init__(config, self._tree.root, has_twins=True)
        check_classes(self._tree.root, len(self._tree.classes), config.model.num_classes)
        self._vae = Vae(config.data.vae, device=device, dtype=_DTYPES[config.data.vae_dtype])
        identity = self._vae.identity
        if identity.latent_channels != config.model.in_channels:
            raise DataError(
                f"{identity.name} has {identity.latent_channels} latent channels, "
                f"model.in_channels={config.model.in_channels}"
            )
        check_scale(identity, config)
        size = config.model.input_size * identity.downsampling
        self._reader = TreeReader(self._tree, partial(read_image, size=size), config.data.workers)
        self._corrupt = CorruptFiles(config.data.max_corrupt, "data.max_corrupt")

    def __len__(self) -> int:
        return len(self._tree)

    def read(self, indices: np.ndarray, flips: np.ndarray) -> tuple[Tensor, Tensor]:
        """Encode images; one that cannot be read is replaced by the next one of the tree that can.

        Raises: DataError when `data.max_corrupt` is passed, none of all images can be read, or a
            latent is not finite.
        """
        chosen = indices.copy()
        images = [
            self._readable(chosen, place, image)
            for place, image in enumerate(self._reader.try_all(indices.tolist()))
        ]
        pixels = np.stack(
            [image[:, ::-1] if flip else image for image, flip in zip(images, flips, strict=True)]
        )
        moments = self._vae.encode(pixels).cpu()
        if (bad := first_not_finite(moments)) is not None:
            path = self._tree.root / self._tree.names[chosen[bad]]
            raise DataError(
                f"{shown(path)}: its latent is not finite: encode with data.vae_dtype=fp32, or "
                "remove the image"
            )
        return moments, torch.from_numpy(self._tree.labels[chosen])

    def _readable(
        self, chosen: np.ndarray, place: int, image: np.ndarray | DataError
    ) -> np.ndarray:
        """Return the image, or the next that can be read, and note in `chosen` which one it is."""
        for _ in range(len(self._tree)):
            if not isinstance(image, DataError):
                return image
            self._corrupt.add(self._tree.names[chosen[place]], str(image))
            chosen[place] = (chosen[place] + 1) % len(self._tree)
            [image] = self._reader.try_all([int(chosen[place])])
        raise DataError(f"{self._tree.root}: none of its {len(self._tree)} images could be read")
