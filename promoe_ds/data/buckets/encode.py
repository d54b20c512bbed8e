"""From images of any shape to a folder of packed latents for each of several sizes: every image
goes to the size whose aspect ratio is nearest to its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.config.model import sides, size_name
from promoe_ds.data.encode import encode
from promoe_ds.data.images import Blob, picture_size
from promoe_ds.data.shards import LatentIndex
from promoe_ds.data.sources.packing import EncodeRequest, load_images
from promoe_ds.data.sources.samples import Samples
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.logs import Progress, get_logger

_LOG = get_logger("encode")
#: Images that threads are given together.
_AT_ONCE = 4096


def encode_buckets(
    request: EncodeRequest, sizes: Sequence[int | tuple[int, int]], team: DistributedContext
) -> dict[Path, LatentIndex]:
    """Encode images into a folder for each size, named by it, below the request's; all ranks call
    this together. Return the indices by folder.

    Raises: as `encode`; ConfigError for sizes to which no image is nearest, or an output folder
        that holds others.
    """
    folders = {size: request.out / size_name(size) for size in sizes}
    team.on_main(lambda: _check_out(request.out, list(folders.values())))
    images = load_images(request, team)
    for size in sizes:
        images.vae.identity.latents(size)
    shares = nearest_sizes(request, images.samples, sizes, team)
    if empty := [size_name(size) for size, share in zip(sizes, shares, strict=True) if not share]:
        raise ConfigError(
            f"--buckets {','.join(empty)}: no image has an aspect ratio nearest to it: leave it out"
        )
    return {
        folders[size]: encode(
            replace(request, out=folders[size], image_size=size, chosen=share), team, images
        )
        for size, share in zip(sizes, shares, strict=True)
    }


def nearest_sizes(
    request: EncodeRequest,
    samples: Samples[Any],
    sizes: Sequence[int | tuple[int, int]],
    team: DistributedContext,
) -> list[list[int]]:
    """Return, for each size, the places of the images whose aspect ratio is nearest to its own, by
    their logarithms; the first of equals. What cannot be read goes to the first, where it counts.

    Reads every image's header, each rank a share of them.
    """
    ratios = np.array([math.log(width / height) for height, width in map(sides, sizes)])

    def nearest(file: Path | Blob) -> int:
        try:
            height, width = picture_size(file)
        except DataError:
            return 0
        return int(np.abs(ratios - math.log(width / height)).argmin())

    own, reader = range(team.rank, len(samples), team.world_size), request.reader(samples, nearest)
    found, progress = list[int](), Progress(_LOG, len(samples), "images looked at")
    for start in range(0, len(own), _AT_ONCE):
        block = own[start : start + _AT_ONCE]
        part = reader.read(block)
        found += [part.get(index, 0) for index in block]
        progress.add(len(block) * team.world_size)  # the other ranks are about as far
    chosen = np.zeros(len(samples), dtype=np.int64)
    for rank, places in enumerate(team.gather(np.array(found, dtype=np.int64))):
        chosen[rank :: team.world_size] = places
    return [np.flatnonzero(chosen == place).tolist() for place in range(len(sizes))]


def _check_out(out: Path, folders: Sequence[Path]) -> None:
    strange = sorted(set(out.iterdir()) - set(folders)) if out.is_dir() else []
    if strange:
        raise ConfigError(
            f"--out {out}: holds {strange[0].name}, which is none of --buckets: choose another"
            " folder, or the same buckets"
        )
