"""Latents that other programs encoded: moments of posteriors, or latents drawn once.

Letters: Z latent channels, C channels on disk, H, W size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promoe_ds.data.reading import shown, some_of
from promoe_ds.data.vae import FLIP, LATENTS, MOMENTS
from promoe_ds.errors import DataError


@dataclass(frozen=True)
class CachedRecord:
    """A record's values, and those of the mirrored image where they are there."""

    path: Path
    kind: str
    sides: Sequence[np.ndarray]


def sides_of(
    path: Path, names: Collection[str], wanted: Sequence[str] = (MOMENTS, LATENTS)
) -> tuple[str, list[str]]:
    """Return the first wanted name that a file has among its columns or tensors; and it with its
    mirrored twin, if that is there.

    Raises: DataError if there is none.
    """
    for name in wanted:
        if name in names:
            return name, [side for side in (name, name + FLIP) if side in names]
    raise DataError(
        f"{shown(path)}: holds {some_of(names) or 'nothing'}, expected {' or '.join(wanted)}, with"
        " or without its twin (..._flip)"
    )


def read_record(record: CachedRecord, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return the values of a record and, where they are there, of the mirrored image: (1 or 2, C,
    H, W) fp32; C = 2 Z for moments, Z for latents.

    Raises: DataError naming the file that holds something else or, where `shape` is given, another
        shape, or values that are not finite.
    """
    path, kind = record.path, record.kind
    # Some caches kept the batch dimension of one.
    sides = [side[0] if side.ndim == 4 and len(side) == 1 else side for side in record.sides]
    found = " and ".join(f"{side.dtype} {side.shape}" for side in sides)
    wanted = f"one or two of floats, alike, ({'2 Z' if kind == MOMENTS else 'Z'}, H, W)"
    if shape is not None:
        wanted = f"{shape[0]} x ({' x '.join(map(str, shape[1:]))}) of floats"
    fits = all(
        side.dtype.kind == "f"
        and side.ndim == 3
        and (kind != MOMENTS or len(side) % 2 == 0)
        and (len(sides), *side.shape) == (shape or (len(sides), *sides[0].shape))
        for side in sides
    )
    if not fits:
        raise DataError(f"{shown(path)}: {kind} {found} do not fit, expected {wanted}")
    values = np.stack(sides).astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{shown(path)}: not finite: encode this image anew")
    return values
