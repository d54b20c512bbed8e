"""Data sets of one file a sample, slow but without preparation: images that a frozen autoencoder
encodes while training, and latents as other trainers cache them.

Letters: B samples, C channels on disk, Z latent channels, H, W size.
"""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from promoe_ds.config.schema import RunConfig
from promoe_ds.data.dataset import DrawnLatents, first_not_finite
from promoe_ds.data.images import read_image
from promoe_ds.data.reading import reading, shown
from promoe_ds.data.sources.cached import CachedRecord, read_record, sides_of
from promoe_ds.data.sources.samples import SampleReader
from promoe_ds.data.trees import Tree, scan_tree
from promoe_ds.data.vae import MOMENTS, Vae
from promoe_ds.errors import DataError

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
#: Names of a record in the npz files of the published code and of DiffMoE; both are moments.
_NPZ_NAMES = ("latent", "moments")
NPZ_SUFFIX = ".npz"
#: numpy parses headers by `ast`, whose recursion count threads of CPython 3.11 share: it fails at
# random.
_PARSING = threading.Lock()


class EncodedImages(DrawnLatents):
    """A tree of images whose latents are made when they are taken."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """List the tree and load the autoencoder onto `device`.

        Raises: DataError if either is missing or does not fit the recipe.
        """
        data, self._tree = config.data, scan_tree(Path(config.data.path))
        self._vae = Vae(data.vae, device=device, dtype=_DTYPES[data.vae_dtype])
        self.kind, identity = self._vae.kind, self._vae.identity
        classes = len(self._tree.classes)
        super().__init__(config, self._tree.root, has_twins=True, classes=classes, vae=identity)
        self._labels = torch.from_numpy(self._tree.labels)
        self._reader = SampleReader(
            self._tree,
            partial(read_image, size=identity.pixels(config.model.latent_size)),
            data.workers,
            max_corrupt=data.max_corrupt,
            setting="data.max_corrupt",
        )

    def read(self, indices: np.ndarray, flips: np.ndarray) -> tuple[Tensor, Tensor]:
        """Encode images; one that cannot be read is replaced by the next one of the tree that can.

        Raises: DataError when `data.max_corrupt` is passed, none of all images can be read, or a
            latent is not finite.
        """
        chosen = indices.copy()
        images = self._reader.read(chosen.tolist())
        for _ in range(len(self._tree)):
            lost = [place for place, index in enumerate(chosen.tolist()) if index not in images]
            if not lost:
                break
            chosen[lost] = (chosen[lost] + 1) % len(self._tree)
            images |= self._reader.read(chosen[lost].tolist())
        else:
            raise DataError(
                f"{self._tree.root}: none of its {len(self._tree)} images could be read"
            )
        sides = zip(chosen.tolist(), flips, strict=True)
        pixels = [images[index][:, ::-1] if flip else images[index] for index, flip in sides]
        records = self._vae.encode(np.stack(pixels)).cpu()
        if (bad := first_not_finite(records)) is not None:
            path = self._tree.root / self._tree.names[chosen[bad]]
            raise DataError(
                f"{shown(path)}: its latent is not finite: encode with data.vae_dtype=fp32, or "
                "remove the image"
            )
        return records, self._labels[chosen]


class NpzLatents(DrawnLatents):
    """Moments (2 Z, H, W), unscaled, of files named `latent` and `latent_flip`, or `moments` and
    `moments_flip`.

    The mirrored twins may be missing. For anything but a trial, pack the files once with
    `promoe-encode --from-npz`. They do not say which autoencoder they come from.
    """

    def __init__(self, config: RunConfig, tree: Tree) -> None:
        """Read the files of `tree`.

        Raises: DataError if it has more classes than the recipe, or its first file cannot be read.
        """
        sides = len(read_npz_moments(tree.root / tree.names[0]))
        super().__init__(config, tree.root, has_twins=sides == 2, classes=len(tree.classes))
        self._labels = torch.from_numpy(tree.labels)
        shape = (sides, 2 * config.model.in_channels, *config.model.latent_size)
        self._reader = SampleReader(
            tree, partial(read_npz_moments, shape=shape), config.data.workers
        )

    def read(self, indices: np.ndarray, flips: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return moments and labels.

        Raises: DataError naming the file that cannot be read or does not fit.
        """
        files = self._reader.read(indices.tolist())
        sides = zip(indices.tolist(), flips.astype(int), strict=True)
        chosen = np.stack([files[index][side] for index, side in sides])
        return torch.from_numpy(chosen), self._labels[indices]


def read_npz_moments(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return a file's moments and, where it holds them, the mirrored image's: (1 or 2, 2 Z, H, W)
    fp32.

    Raises: DataError naming a file that is damaged, of another kind or, where `shape` is given, of
        another shape.
    """
    with reading(path, "latent file"), _PARSING, np.load(path, allow_pickle=False) as data:
        _, names = sides_of(path, data.files, _NPZ_NAMES)
        sides = [data[name] for name in names]
    return read_record(CachedRecord(path, MOMENTS, sides), shape)
