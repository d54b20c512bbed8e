"""What is encoded: images by an autoencoder, or another program's cache of latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promoe_ds.data.sources.formats import IMAGES, LATENTS, Format, open_samples
from promoe_ds.data.sources.samples import Columns, SampleReader, Samples
from promoe_ds.data.vae import MOMENTS, Vae, VaeIdentity
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class EncodeRequest:
    """What to encode: images by `vae`, or another program's cache of latents (`from_latents`).

    chosen: places, ascending, of the samples to take; all if left out.
    """

    source: Path
    out: Path
    vae: str | None = None
    vae_name: str | None = None
    from_latents: bool = False
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | tuple[int, int] = 256
    chosen: Sequence[int] | None = None
    flip: bool = True
    dtype: str = "float32"
    vae_dtype: str = "float32"
    batch_size: int = 32
    shard_size: int = 4096
    workers: int = 8
    max_corrupt: int = 0

    def path(self, number: int) -> Path:
        """Return the place of a shard."""
        return self.out / f"shard-{number:05d}.safetensors"

    def samples(self) -> tuple[Samples[Any], Format]:
        """Return the samples of the source and their format."""
        formats = LATENTS if self.from_latents else IMAGES
        columns = Columns(image=self.image_column, label=self.label_column)
        return open_samples(self.source, formats, columns, split=self.split)

    def reader(self, samples: Samples[Any], read: Callable[..., Any]) -> SampleReader:
        """Return what reads the samples."""
        limit = self.max_corrupt
        return SampleReader(samples, read, self.workers, max_corrupt=limit, setting="--max-corrupt")


@dataclass(frozen=True)
class ImageSource:
    """Images of any size, their format, and the autoencoder that encodes them."""

    samples: Samples[Any]
    format: Format
    vae: Vae


@dataclass(frozen=True, kw_only=True)
class PackedSource:
    """What is packed: which samples, of which autoencoder.

    format: of the samples. kind: moments, or latents of an autoencoder without a posterior.
    shape: of a record, (C, H, W). sides: 2 with the mirrored image, else 1.
    records: returns those of a batch, by side. changes: what `reader` changed of images.
    """

    samples: Samples[Any]
    format: str
    identity: VaeIdentity
    kind: str
    shape: tuple[int, int, int]
    sides: int
    reader: SampleReader
    records: Callable[[np.ndarray], Sequence[Tensor]]
    changes: list[str] = field(default_factory=list)


def load_images(request: EncodeRequest, team: DistributedContext) -> ImageSource:
    """List the images of a request and load its autoencoder; all ranks call this together.

    Raises: DataError if they cannot be read.
    """
    samples, form = request.samples()
    load = partial(
        Vae,
        request.vae,
        device=team.device,
        dtype=getattr(torch, request.vae_dtype),
        name=request.vae_name,
    )
    return ImageSource(samples, form, team.main_first(load))


def open_images(request: EncodeRequest, images: ImageSource) -> PackedSource:
    """Return images of the request's size, and what encodes them.

    Raises: ConfigError for a size that the autoencoder would cut.
    """
    samples, form, vae = images.samples, images.format, images.vae
    changes, sides, identity = list[str](), 1 + request.flip, vae.identity

    def records(images_BHWC: np.ndarray) -> list[Tensor]:
        return [vae.encode(each) for each in (images_BHWC, images_BHWC[:, :, ::-1].copy())[:sides]]

    return PackedSource(
        samples=samples,
        format=form.name,
        identity=identity,
        kind=vae.kind,
        shape=(vae.record_channels, *identity.latents(request.image_size)),
        sides=sides,
        reader=request.reader(
            samples, partial(form.read, size=request.image_size, changes=changes)
        ),
        records=records,
        changes=changes,
    )


def open_cached(request: EncodeRequest) -> PackedSource:
    """Return cached latents; all have the shape of the first that can be read.

    Raises: ConfigError if their autoencoder is not named; DataError if there are more unreadable
        ones than allowed.
    """
    if request.vae_name is None:
        raise ConfigError(
            "--from-latents: the files do not say which autoencoder they come from: name it with"
            " --vae-name, as recipes do in data.vae"
        )
    samples, form = request.samples()
    probe = request.reader(samples, form.read)
    shapes = (found[i].shape for i in range(len(samples)) if (found := probe.read([i])))
    if (shape := next(shapes, None)) is None:
        raise DataError(f"{samples.root}: none of its {len(samples)} records could be read")
    sides, channels = min(shape[0], 1 + request.flip), shape[1]
    if samples.kind == MOMENTS:
        channels //= 2
    # No more is known than the name that the user gives, and the channels.
    return PackedSource(
        samples=samples,
        format=form.name,
        identity=VaeIdentity(name=request.vae_name, latent_channels=channels),
        kind=samples.kind,
        shape=shape[1:],
        sides=sides,
        reader=request.reader(samples, partial(form.read, shape=shape)),
        records=lambda values: torch.from_numpy(values).unbind(1)[:sides],
    )
