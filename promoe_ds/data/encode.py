"""From images to packed latents, on many ranks, resumable: whole shards are the unit of
work.

The shards that are missing are split over the ranks. A shard is complete once its entry
(`shard-N.json`) is beside it; the index, made of all entries, is written last and replaces them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from promoe_ds.data.images import COMPOSED, TURNED
from promoe_ds.data.normalization.statistics import LatentStatistics, measure, merge
from promoe_ds.data.reading import read_json, reading, shown, some_of
from promoe_ds.data.shards import (
    UNFINISHED,
    LatentIndex,
    Shard,
    ShardRecord,
    read_index,
    write_shard,
)
from promoe_ds.data.sources.files import fetch_from_hub
from promoe_ds.data.sources.formats import IMAGES, LATENTS, TREE, Format, open_samples
from promoe_ds.data.sources.samples import Columns, SampleReader, Samples
from promoe_ds.data.vae import MOMENTS, Vae, VaeIdentity
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError, DataError, differences
from promoe_ds.files import write_json
from promoe_ds.logs import Progress, get_logger
from promoe_ds.versions import versions_of

_LOG = get_logger("encode")
#: Settings that an index keeps in `encoding`.
_ENCODING = ("files", "listing", "source", "shard_size", "vae_dtype")


@dataclass(frozen=True, kw_only=True)
class EncodeRequest:
    """What to encode: images by `vae`, or another program's cache of latents (`from_latents`)."""

    source: Path
    out: Path
    vae: str | None = None
    vae_name: str | None = None
    from_latents: bool = False
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    image_size: int = 256
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

    def reader(self, samples: Samples[Any], read: Callable[..., np.ndarray]) -> SampleReader:
        """Return what reads the samples."""
        limit = self.max_corrupt
        return SampleReader(samples, read, self.workers, max_corrupt=limit, setting="--max-corrupt")


class ShardEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What `shard-N.json` says: how many images were changed, by kind; which were skipped; the
    latents' statistics, None of an empty shard.
    """

    record: ShardRecord
    skipped: list[str]
    statistics: LatentStatistics | None = None
    changes: dict[str, int] = {}


@dataclass(frozen=True, kw_only=True)
class _Source:
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


def encode(request: EncodeRequest, team: DistributedContext) -> LatentIndex:
    """Encode images; all ranks call this together. Return the index.

    Raises: DataError for images that cannot be read, beyond `max_corrupt` of a rank or of all
        together; ConfigError for a request that cannot be, or an output folder that holds something
        else.
    """
    # Rank 0 alone fetches what is on the hub first.
    team.on_main(lambda: fetch_from_hub(request.source, request.split))
    request = replace(request, source=fetch_from_hub(request.source, request.split))
    source = _cached(request) if request.from_latents else _images(request, team)
    settings, files = _settings(request, source), range(len(source.samples))
    if (done := team.on_main(lambda: _claim(request.out, settings))) is not None:
        return done
    size = request.shard_size
    shards = [files[start : start + size] for start in range(0, len(files), size)]
    todo = team.on_main(lambda: missing_shards(request, len(shards)))
    progress = Progress(_LOG, sum(len(shards[number]) for number in todo), "images")
    for number in todo[team.rank :: team.world_size]:
        _encode_shard(request, source, shards[number], request.path(number))
        # The other ranks are about as far.
        progress.add(len(shards[number]) * team.world_size)
    team.barrier()
    return team.on_main(lambda: _finish(request, source, settings, len(shards)))


def missing_shards(request: EncodeRequest, shards: int) -> list[int]:
    """Return the numbers of the shards that are not complete: each is written in one move, and then
    its entry.
    """

    def is_complete(path: Path) -> bool:
        has_both = path.is_file() and path.with_suffix(".json").is_file()
        return has_both and _read_entry(path).record.bytes == path.stat().st_size

    return [number for number in range(shards) if not is_complete(request.path(number))]


def _images(request: EncodeRequest, team: DistributedContext) -> _Source:
    """Return the images and the autoencoder that encodes them.

    Raises: DataError for images or an autoencoder that cannot be read; ConfigError for a size that
        the autoencoder would cut.
    """
    samples, form = request.samples()
    load = partial(
        Vae,
        request.vae,
        device=team.device,
        dtype=getattr(torch, request.vae_dtype),
        name=request.vae_name,
    )
    # Into the memory of every rank at once: rank 0 alone fetches a hub id from the network first.
    first = load() if team.is_main else None
    team.barrier()
    vae, changes, sides = first or load(), list[str](), 1 + request.flip
    identity = vae.identity
    side, cut = divmod(request.image_size, identity.downsampling)
    if cut:
        raise ConfigError(
            f"--image-size {request.image_size}: must be a multiple of the {identity.downsampling}"
            f" pixels that {identity.name} makes one latent of"
        )

    def records(images_BHWC: np.ndarray) -> list[Tensor]:
        return [vae.encode(each) for each in (images_BHWC, images_BHWC[:, :, ::-1].copy())[:sides]]

    return _Source(
        samples=samples,
        format=form.name,
        identity=identity,
        kind=vae.kind,
        shape=(vae.record_channels, side, side),
        sides=sides,
        reader=request.reader(
            samples, partial(form.read, size=request.image_size, changes=changes)
        ),
        records=records,
        changes=changes,
    )


def _cached(request: EncodeRequest) -> _Source:
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
    return _Source(
        samples=samples,
        format=form.name,
        identity=VaeIdentity(name=request.vae_name, latent_channels=channels),
        kind=samples.kind,
        shape=shape[1:],
        sides=sides,
        reader=request.reader(samples, partial(form.read, shape=shape)),
        records=lambda values: torch.from_numpy(values).unbind(1)[:sides],
    )


def _settings(request: EncodeRequest, source: _Source) -> dict[str, Any]:
    """Return what must agree between the calls that fill one folder."""
    return {
        "files": len(source.samples),
        "listing": source.samples.listing(),
        "source": source.format,
        "image_size": None if request.from_latents else request.image_size,
        "flipped": source.sides == 2,
        "dtype": request.dtype,
        "vae_dtype": None if request.from_latents else request.vae_dtype,
        "shard_size": request.shard_size,
        "vae": asdict(source.identity),
    }


def _claim(out: Path, settings: dict[str, Any]) -> LatentIndex | None:
    """Take the output folder, or recognise what is in it; return the index if nothing is left to
    do.
    """
    path, before = out / UNFINISHED, settings
    try:
        if (index := read_index(out)) is not None:
            # Earlier versions read nothing but trees.
            before = {"source": TREE, **msgspec.to_builtins(index), **index.encoding}
            _LOG.info("%s: latents are there already", out)
        elif path.is_file():
            before = {"source": TREE, **read_json(path, "record of an encoding", dict)}
            _LOG.info("%s: resuming the encoding found there", out)
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(
                f"--out {out} is no empty folder and holds no latents: choose another one"
            )
        if isinstance(before.get("vae"), dict):
            with reading(path, "record of an encoding"):  # an earlier version's knew less
                before = {**before, "vae": asdict(msgspec.convert(before["vae"], VaeIdentity))}
        if differing := differences(before, settings):
            raise ConfigError(
                f"--out {out} already holds other latents: {'; '.join(differing)}. Choose another"
                " folder, or use the same arguments and files"
            )
        if index is None:
            out.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error}") from None
    return index


def _encode_shard(request: EncodeRequest, source: _Source, files: range, path: Path) -> None:
    """Encode one shard; it is empty if none of its records can be read."""
    samples, dtype, kept = source.samples, getattr(torch, request.dtype), list[int]()
    sides = [[torch.empty(0, *source.shape, dtype=dtype)] for _ in range(source.sides)]
    source.changes.clear()
    for start in range(0, len(files), request.batch_size):
        if good := source.reader.read(files[start : start + request.batch_size]):
            kept += good
            records = source.records(np.stack(list(good.values())))
            for parts, part in zip(sides, records, strict=True):
                parts.append(part.cpu().to(dtype))
    skipped = [shown(samples.names[index]) for index in sorted(set(files) - set(kept))]
    labels, names = torch.from_numpy(samples.labels[kept]), [samples.names[i] for i in kept]
    variants = [torch.cat(parts) for parts in sides]
    measured = measure(variants, has_posterior=source.kind == MOMENTS)
    try:
        record = write_shard(path, variants, labels, names, source.kind)
        entry = ShardEntry(
            record=record, skipped=skipped, statistics=measured, changes=Counter(source.changes)
        )
        write_json(path.with_suffix(".json"), msgspec.to_builtins(entry))
    except OSError as error:
        raise DataError(
            f"{path}: could not be written: {error}. Free the disk and run the same command again"
        ) from None


def _finish(
    request: EncodeRequest, source: _Source, settings: dict[str, Any], shards: int
) -> LatentIndex:
    """Make the index from all entries; rank 0 only."""
    entries = [_read_entry(request.path(number)) for number in range(shards)]
    skipped, samples = tuple(name for entry in entries for name in entry.skipped), source.samples
    if len(skipped) > request.max_corrupt:
        raise DataError(
            f"{len(skipped)} files could not be read, --max-corrupt={request.max_corrupt} are"
            f" allowed: {some_of(skipped)}. Repair them and encode into a new folder, or run again"
            " with a higher limit: nothing is encoded twice"
        )
    records = tuple(entry.record for entry in entries)
    labels = torch.cat([Shard(request.out / record.file).labels for record in records])
    if not len(labels):
        raise DataError(f"{samples.root}: none of its {len(samples)} files could be read")
    counts = labels.bincount(minlength=len(samples.classes)).tolist()
    if changes := sum((Counter(entry.changes) for entry in entries), Counter()):
        _LOG.info(
            "%s: %d images with transparent pixels were composed over white, %d turned upright as"
            " their EXIF data say",
            *(samples.root, changes[COMPOSED], changes[TURNED]),
        )
    if unread := [name for name, count in zip(samples.classes, counts, strict=True) if not count]:
        _LOG.warning(
            "%s: no image of %d classes could be read, their labels never occur: %s",
            *(samples.root, len(unread), some_of(unread)),
        )
    index = LatentIndex(
        count=len(labels),
        kind=source.kind,
        shape=source.shape,
        dtype=request.dtype,
        flipped=settings["flipped"],
        image_size=settings["image_size"],
        vae=source.identity,
        classes=tuple(map(shown, samples.classes)),
        class_counts=tuple(counts),
        shards=records,
        statistics=_merged(entries),
        skipped=skipped,
        encoding={name: settings[name] for name in _ENCODING},
        versions=versions_of("diffusers", "numpy", "pillow", "safetensors"),
    )
    index.write(request.out)
    for leftover in (request.out / UNFINISHED, *request.out.glob("shard-*.json")):
        leftover.unlink()
    return index


def _merged(entries: Sequence[ShardEntry]) -> LatentStatistics | None:
    """Return the statistics of all shards, None where an earlier version wrote one of them."""
    parts = [entry.statistics for entry in entries if entry.record.count]
    found = [part for part in parts if part is not None]
    return merge(found) if len(found) == len(parts) else None


def _read_entry(path: Path) -> ShardEntry:
    return read_json(path.with_suffix(".json"), "record of an encoding", ShardEntry)
