"""Latents as other trainers cache them: a tree of class folders with one npz file an image.

Letters: B samples, Z latent channels, H, W latent size.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from promoe_ds.config.schema import RunConfig
from promoe_ds.data.dataset import DrawnLatents
from promoe_ds.data.index import trust_vae
from promoe_ds.data.reading import reading, shown
from promoe_ds.data.trees import Tree, TreeReader, check_classes
from promoe_ds.errors import DataError

#: Names of a record and its mirrored twin, which may be missing, in the npz files of the published
#: code and of DiffMoE; both are moments.
NPZ_NAMES = (("latent", "latent_flip"), ("moments", "moments_flip"))
NPZ_SUFFIX = ".npz"
#: numpy parses headers by `ast`, whose recursion count threads of CPython 3.11 share: it fails at
# random.
_PARSING = threading.Lock()


class NpzLatents(DrawnLatents):
    """Moments (2 Z, H, W), unscaled, of files named `latent` and `latent_flip`, or `moments` and
    `moments_flip`.

    The mirrored twins may be missing. Slow: for anything but a trial, pack the files once with
    `promoe-encode --from-npz`. They do not say which autoencoder they come from.
    """

    def __init__(self, config: RunConfig, tree: Tree) -> None:
        """Read the files of `tree`.

        Raises: DataError if it has more classes than the recipe, or its first file cannot be read.
        """
        self._tree, size = tree, config.model.input_size
        check_classes(tree.root, len(tree.classes), config.model.num_classes)
        trust_vae(tree.root, config)
        sides = len(read_npz_moments(tree.root / tree.names[0]))
        super().__init__(config, tree.root, has_twins=sides == 2)
        shape = (sides, 2 * config.model.in_channels, size, size)
        self._reader = TreeReader(
            tree, lambda path: read_npz_moments(path, shape), config.data.workers
        )

    def __len__(self) -> int:
        return len(self._tree)

    def read(self, indices: np.ndarray, flips: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return moments and labels.

        Raises: DataError naming the file that cannot be read or does not fit.
        """
        chosen = []
        for sides, flip in zip(self._reader.try_all(indices.tolist()), flips, strict=True):
            if isinstance(sides, DataError):
                raise sides
            chosen.append(sides[int(flip)])
        return torch.from_numpy(np.stack(chosen)), torch.from_numpy(self._tree.labels[indices])


def read_npz_moments(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return a file's moments and, where it holds them, the mirrored image's: (1 or 2, 2 Z, H, W)
    fp32.

    Raises: DataError naming a file that is damaged, of another kind or, where `shape` is given, of
        another shape.
    """
    with reading(path, "latent file"), _PARSING, np.load(path, allow_pickle=False) as data:
        names = next((names for names in NPZ_NAMES if names[0] in data), None)
        if names is None:
            raise DataError(
                f"{shown(path)}: holds {', '.join(map(shown, data.files)) or 'nothing'}, expected "
                f"{' or '.join(plain for plain, _ in NPZ_NAMES)}, with or without its twin "
                f"({NPZ_NAMES[0][1]}, {NPZ_NAMES[1][1]})"
            )
        sides = [data[name] for name in names if name in data]
    # Some caches kept the batch dimension of one.
    sides = [side[0] if side.ndim == 4 and len(side) == 1 else side for side in sides]
    found = " and ".join(f"{side.dtype} {side.shape}" for side in sides)
    if any(side.dtype.kind != "f" for side in sides):
        raise DataError(f"{shown(path)}: moments are {found}, expected floats")
    fits = sides[0].ndim == 3 and sides[0].shape == sides[-1].shape
    if not fits or shape not in (None, (len(sides), *sides[0].shape)):
        wanted = "one or two alike of three dimensions"
        if shape:
            wanted = f"{shape[0]} x ({' x '.join(map(str, shape[1:]))})"
        raise DataError(f"{shown(path)}: moments {found} do not fit, expected {wanted}")
    if len(sides[0]) % 2:
        raise DataError(
            f"{shown(path)}: moments {found} are no means and variances: their channels cannot be "
            "halved"
        )
    moments = np.stack(sides).astype(np.float32)
    if not np.isfinite(moments).all():
        raise DataError(f"{shown(path)}: not finite: encode this image anew")
    return moments
