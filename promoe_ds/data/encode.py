"""From a tree of images to packed latents, on many ranks, resumable: whole shards are the unit of
work.

The shards that are missing are split over the ranks. A shard is complete once its entry
(`shard-N.json`) is beside it; the index, made of all entries, is written last and replaces them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash
from torch import Tensor

from promoe_ds.data.images import COMPOSED, TURNED, read_image
from promoe_ds.data.reading import read_json, shown, some_of
from promoe_ds.data.shards import (
    MOMENTS,
    UNFINISHED,
    LatentIndex,
    Shard,
    ShardRecord,
    read_index,
    write_shard,
)
from promoe_ds.data.trees import Tree, TreeReader, scan_tree
from promoe_ds.data.unpacked import NPZ_SUFFIX, read_npz_moments
from promoe_ds.data.vae import Vae, VaeIdentity
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError, DataError, differences
from promoe_ds.files import write_json
from promoe_ds.logs import Progress, get_logger
from promoe_ds.versions import versions_of

_LOG = get_logger("encode")
#: Settings that an index keeps in `encoding`.
_ENCODING = ("files", "chosen", "listing", "shard_size", "vae_dtype")


@dataclass(frozen=True, kw_only=True)
class EncodeRequest:
    """What to encode: images by `vae`, or the npz files of another trainer's cache (`from_npz`).

    chosen: places, ascending, of the files to take; all if left out.
    """

    source: Path
    out: Path
    vae: str | None = None
    vae_name: str | None = None
    from_npz: bool = False
    split: str = "train"
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

    def reader(self, tree: Tree, read: Callable[[Path], np.ndarray]) -> TreeReader:
        """Return what reads the files of a tree."""
        limit = self.max_corrupt
        return TreeReader(tree, read, self.workers, max_corrupt=limit, setting="--max-corrupt")


class ShardEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What `shard-N.json` says: how many images were changed, by kind; which were skipped."""

    record: ShardRecord
    skipped: list[str]
    changes: dict[str, int] = {}


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What is packed: the files of a tree, of which autoencoder.

    shape: of a record, (2 Z, H, W). sides: 2 with the mirrored image, else 1.
    moments: returns those of a batch, by side. changes: what `reader` changed of images.
    """

    tree: Tree
    identity: VaeIdentity
    shape: tuple[int, int, int]
    sides: int
    reader: TreeReader
    moments: Callable[[np.ndarray], Sequence[Tensor]]
    changes: list[str] = field(default_factory=list)


def encode(request: EncodeRequest, team: DistributedContext, vae: Vae | None = None) -> LatentIndex:
    """Encode a tree; all ranks call this together. Return the index.

    Args:
        vae: the request's, if it is loaded already.
    Raises: DataError for images that cannot be read, beyond `max_corrupt` of a rank or of all
        together; ConfigError for a request that cannot be, or an output folder that holds something
        else.
    """
    source = _cached(request) if request.from_npz else _images(request, team, vae)
    files = range(len(source.tree)) if request.chosen is None else request.chosen
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
    """Return the numbers of the shards that are not complete: each is written in one move, and then
    its entry.
    """

    def is_complete(path: Path) -> bool:
        has_both = path.is_file() and path.with_suffix(".json").is_file()
        return has_both and _read_entry(path).record.bytes == path.stat().st_size

    return [number for number in range(shards) if not is_complete(request.path(number))]


def load_vae(request: EncodeRequest, team: DistributedContext) -> Vae:
    """Load the autoencoder of a request; all ranks call this together.

    Raises: DataError if it cannot be read.
    """
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
    return first or load()


def _images(request: EncodeRequest, team: DistributedContext, vae: Vae | None) -> _Source:
    """Return a tree of images and the autoencoder that encodes them, loaded unless it is given.

    Raises: DataError for a tree or an autoencoder that cannot be read; ConfigError for a size that
        the autoencoder would cut.
    """
    tree = scan_tree(request.source, split=request.split)
    vae, changes, sides = vae or load_vae(request, team), list[str](), 1 + request.flip
    identity = vae.identity

    def moments(images_BHWC: np.ndarray) -> list[Tensor]:
        return [vae.encode(each) for each in (images_BHWC, images_BHWC[:, :, ::-1].copy())[:sides]]

    return _Source(
        tree=tree,
        identity=identity,
        shape=(2 * identity.latent_channels, *identity.latents(request.image_size)),
        sides=sides,
        reader=request.reader(tree, partial(read_image, size=request.image_size, changes=changes)),
        moments=moments,
        changes=changes,
    )


def _cached(request: EncodeRequest) -> _Source:
    """Return a tree of cached moments; all have the shape of the first that can be read.

    Raises: ConfigError if their autoencoder is not named; DataError if there are more unreadable
        ones than allowed.
    """
    if request.vae_name is None:
        raise ConfigError(
            "--from-npz: the files do not say which autoencoder they come from: name it with"
            " --vae-name, as recipes do in data.vae"
        )
    tree = scan_tree(request.source, (NPZ_SUFFIX,), split=request.split)
    probe = request.reader(tree, read_npz_moments)
    shapes = (found[i].shape for i in range(len(tree)) if (found := probe.read([i])))
    if (shape := next(shapes, None)) is None:
        raise DataError(f"{tree.root}: none of its {len(tree)} files could be read")
    sides = min(shape[0], 1 + request.flip)
    # No more is known than the name that the user gives, and the channels.
    return _Source(
        tree=tree,
        identity=VaeIdentity(name=request.vae_name, latent_channels=shape[1] // 2),
        shape=shape[1:],
        sides=sides,
        reader=request.reader(tree, partial(read_npz_moments, shape=shape)),
        moments=lambda values: torch.from_numpy(values).unbind(1)[:sides],
    )


def _settings(request: EncodeRequest, source: _Source, files: Sequence[int]) -> dict[str, Any]:
    """Return what must agree between the calls that fill one folder."""
    names, size = os.fsencode("\n".join(source.tree.names)), request.image_size
    places = np.array(files, dtype=np.int64).tobytes()
    chosen = None if request.chosen is None else xxhash.xxh3_64(places).hexdigest()
    return {
        "files": len(files),
        "chosen": chosen,
        "listing": xxhash.xxh3_64(names).hexdigest(),
        "image_size": None if request.from_npz else size if isinstance(size, int) else list(size),
        "flipped": source.sides == 2,
        "dtype": request.dtype,
        "vae_dtype": None if request.from_npz else request.vae_dtype,
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
            before = {**msgspec.to_builtins(index), **index.encoding}
            _LOG.info("%s: latents are there already", out)
        elif path.is_file():
            before = read_json(path, "record of an encoding", dict)
            _LOG.info("%s: resuming the encoding found there", out)
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(
                f"--out {out} is no empty folder and holds no latents: choose another one"
            )
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
    request: EncodeRequest, source: _Source, files: Sequence[int], path: Path
) -> None:
    """Encode one shard; it is empty if none of its files can be read."""
    tree, dtype, kept = source.tree, getattr(torch, request.dtype), list[int]()
    sides = [[torch.empty(0, *source.shape, dtype=dtype)] for _ in range(source.sides)]
    source.changes.clear()
    for start in range(0, len(files), request.batch_size):
        if good := source.reader.read(files[start : start + request.batch_size]):
            kept += good
            moments = source.moments(np.stack(list(good.values())))
            for parts, part in zip(sides, moments, strict=True):
                parts.append(part.cpu().to(dtype))
    skipped = [shown(tree.names[index]) for index in sorted(set(files) - set(kept))]
    labels, names = torch.from_numpy(tree.labels[kept]), [tree.names[index] for index in kept]
    try:
        record = write_shard(path, [torch.cat(parts) for parts in sides], labels, names)
        entry = ShardEntry(record=record, skipped=skipped, changes=Counter(source.changes))
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
    skipped, tree = tuple(name for entry in entries for name in entry.skipped), source.tree
    if len(skipped) > request.max_corrupt:
        raise DataError(
            f"{len(skipped)} files could not be read, --max-corrupt={request.max_corrupt} are"
            f" allowed: {some_of(skipped)}. Repair them and encode into a new folder, or run again"
            " with a higher limit: nothing is encoded twice"
        )
    records = tuple(entry.record for entry in entries)
    labels = torch.cat([Shard(request.out / record.file).labels for record in records])
    if not len(labels):
        raise DataError(f"{tree.root}: none of its {settings['files']} files could be read")
    counts = labels.bincount(minlength=len(tree.classes)).tolist()
    if changes := sum((Counter(entry.changes) for entry in entries), Counter()):
        _LOG.info(
            "%s: %d images with transparent pixels were composed over white, %d turned upright as"
            " their EXIF data say",
            *(tree.root, changes[COMPOSED], changes[TURNED]),
        )
    unread = [name for name, count in zip(tree.classes, counts, strict=True) if not count]
    if unread and request.chosen is None:
        _LOG.warning(
            "%s: no image of %d classes could be read, their labels never occur: %s",
            *(tree.root, len(unread), some_of(unread)),
        )
    index = LatentIndex(
        count=len(labels),
        kind=MOMENTS,
        shape=source.shape,
        dtype=request.dtype,
        flipped=settings["flipped"],
        image_size=settings["image_size"],
        vae=source.identity,
        classes=tuple(map(shown, tree.classes)),
        class_counts=tuple(counts),
        shards=records,
        skipped=skipped,
        encoding={name: settings[name] for name in _ENCODING},
        versions=versions_of("diffusers", "numpy", "pillow", "safetensors"),
    )
    index.write(request.out)
    for leftover in (request.out / UNFINISHED, *request.out.glob("shard-*.json")):
        leftover.unlink()
    return index


def _read_entry(path: Path) -> ShardEntry:
    return read_json(path.with_suffix(".json"), "record of an encoding", ShardEntry)
