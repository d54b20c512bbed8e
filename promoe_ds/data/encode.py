"""From images to packed latents, on many ranks, resumable: whole shards are the unit of
work.

The shards that are missing are split over the ranks. A shard is complete once its entry
(`shard-N.json`) is beside it; the index, made of all entries, is written last and replaces them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash

from promoe_ds.data.images import COMPOSED, TURNED
from promoe_ds.data.normalization.statistics import LatentStatistics, measure, merge_known
from promoe_ds.data.reading import read_json, reading, shown, some_of
from promoe_ds.data.shards import (
    UNFINISHED,
    Entry,
    LatentIndex,
    Shard,
    read_index,
    write_shard,
)
from promoe_ds.data.sources.formats import TREE
from promoe_ds.data.sources.packing import (
    EncodeRequest,
    ImageSource,
    PackedSource,
    load_images,
    open_cached,
    open_images,
)
from promoe_ds.data.vae import MOMENTS, VaeIdentity
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError, DataError, differences
from promoe_ds.files import write_json
from promoe_ds.logs import Progress, get_logger
from promoe_ds.versions import versions_of

_LOG = get_logger("encode")
#: Settings that an index keeps in `encoding`.
_ENCODING = ("files", "chosen", "listing", "source", "shard_size", "vae_dtype")
#: What earlier versions did not say, because they knew nothing else.
_EARLIER = {"source": TREE, "chosen": None}


class ShardEntry(Entry, frozen=True, kw_only=True):
    """What `shard-N.json` says: how many images were changed, by kind; which were skipped; the
    latents' statistics, None of an empty shard.
    """

    skipped: list[str]
    statistics: LatentStatistics | None = None
    changes: dict[str, int] = msgspec.field(default_factory=dict)


def encode(
    request: EncodeRequest, team: DistributedContext, images: ImageSource | None = None
) -> LatentIndex:
    """Encode images; all ranks call this together. Return the index.

    Args:
        images: the request's, if they are listed already.
    Raises: DataError for images that cannot be read, beyond `max_corrupt` of a rank or of all
        together; ConfigError for a request that cannot be, or an output folder that holds something
        else.
    """
    if request.from_latents:
        source = open_cached(request)
    else:
        source = open_images(request, images or load_images(request, team))
    files = range(len(source.samples)) if request.chosen is None else request.chosen
    settings = _settings(request, source, files)
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
    """Return the numbers of the shards that are not complete."""
    return [n for n in range(shards) if ShardEntry.of_complete(request.path(n)) is None]


def _settings(request: EncodeRequest, source: PackedSource, files: Sequence[int]) -> dict[str, Any]:
    """Return what must agree between the calls that fill one folder."""
    places, size = np.array(files, dtype=np.int64).tobytes(), request.image_size
    chosen = None if request.chosen is None else xxhash.xxh3_64(places).hexdigest()
    is_cached = request.from_latents
    return {
        "files": len(files),
        "chosen": chosen,
        "listing": source.samples.listing(),
        "source": source.format,
        "image_size": None if is_cached else (size if isinstance(size, int) else list(size)),
        "flipped": source.sides == 2,
        "dtype": request.dtype,
        "vae_dtype": None if is_cached else request.vae_dtype,
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
            before = {**_EARLIER, **msgspec.to_builtins(index), **index.encoding}
            _LOG.info("%s: latents are there already", out)
        elif path.is_file():
            before = {**_EARLIER, **read_json(path, "record of an encoding", dict)}
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


def _encode_shard(
    request: EncodeRequest, source: PackedSource, files: Sequence[int], path: Path
) -> None:
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
    skipped = [shown(samples.name(index)) for index in sorted(set(files) - set(kept))]
    labels, names = torch.from_numpy(samples.labels[kept]), [samples.name(index) for index in kept]
    variants = [torch.cat(parts) for parts in sides]
    measured = measure(variants, has_posterior=source.kind == MOMENTS)
    try:
        record = write_shard(path, variants, labels, names, source.kind)
        entry = ShardEntry(
            record=record, skipped=skipped, statistics=measured, changes=Counter(source.changes)
        )
        entry.write(path)
    except OSError as error:
        raise DataError(
            f"{path}: could not be written: {error}. Free the disk and run the same command again"
        ) from None


def _finish(
    request: EncodeRequest, source: PackedSource, settings: dict[str, Any], shards: int
) -> LatentIndex:
    """Make the index from all entries; rank 0 only."""
    entries = [ShardEntry.read(request.path(number)) for number in range(shards)]
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
        raise DataError(f"{samples.root}: none of its {settings['files']} files could be read")
    counts = labels.bincount(minlength=len(samples.classes)).tolist()
    if changes := sum((Counter(entry.changes) for entry in entries), Counter()):
        _LOG.info(
            "%s: %d images with transparent pixels were composed over white, %d turned upright as"
            " their EXIF data say",
            *(samples.root, changes[COMPOSED], changes[TURNED]),
        )
    unread = [name for name, count in zip(samples.classes, counts, strict=True) if not count]
    if unread and request.chosen is None:
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
        # Earlier versions measured none.
        statistics=merge_known([entry.statistics for entry in entries if entry.record.count]),
        skipped=skipped,
        encoding={name: settings[name] for name in _ENCODING},
        versions=versions_of("diffusers", "numpy", "pillow", "safetensors"),
    )
    index.write(request.out)
    for leftover in (request.out / UNFINISHED, *request.out.glob("shard-*.json")):
        leftover.unlink()
    return index
