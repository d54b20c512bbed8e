"""From a tree of images to packed latents, on many ranks, resumable: whole shards are the unit of
work.

The shards that are missing are dealt out to the ranks. A shard is complete once its entry
(`shard-N.json`) lies beside it; the index, made of all entries, is written last and replaces them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from promoe_ds.data.images import COMPOSED, TURNED, read_image
from promoe_ds.data.index import UNFINISHED, LatentIndex, ShardRecord, read_index
from promoe_ds.data.listing import some_of
from promoe_ds.data.npz import NPZ_SUFFIX, read_npz_moments
from promoe_ds.data.reading import reading, shown
from promoe_ds.data.shards import Shard, ShardContent, write_shard
from promoe_ds.data.trees import CorruptFiles, Tree, TreeReader, scan_tree
from promoe_ds.data.vae import Vae, VaeIdentity
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError, DataError, differences
from promoe_ds.files import write_json
from promoe_ds.logs import Progress, get_logger
from promoe_ds.versions import versions_of

_LOG = get_logger("encode")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_KIND = "moments"


@dataclass(frozen=True, kw_only=True)
class EncodeRequest:
    """What to encode: images by `vae`, or the npz files of another trainer's cache (`from_npz`)."""

    source: Path
    out: Path
    vae: str | None = None
    vae_name: str | None = None
    from_npz: bool = False
    split: str = "train"
    image_size: int = 256
    flip: bool = True
    dtype: str = "float32"
    vae_dtype: str = "float32"
    batch_size: int = 32
    shard_size: int = 4096
    workers: int = 8
    max_corrupt: int = 0


def encode(request: EncodeRequest, team: DistributedContext) -> LatentIndex:
    """Encode a tree; all ranks call this together. Return the index.

    Raises: DataError for images that cannot be read, beyond `max_corrupt` of a rank or of all
    together; ConfigError for a request
        that cannot be, or an output folder that holds something else.
    """
    source = _cached(request) if request.from_npz else _images(request, team)
    tree, settings = source.tree, _settings(request, source)
    if (done := team.on_main(lambda: _claim(request, settings))) is not None:
        return done
    work = _Worker(request, source)
    shards = -(-len(tree) // request.shard_size)
    todo = team.on_main(lambda: missing_shards(request.out, shards))
    total = sum(len(work.files_of(number)) for number in todo)
    progress = Progress(_LOG, total, "images")
    for number in todo[team.rank :: team.world_size]:
        work.encode_shard(number)
        progress.add(
            len(work.files_of(number)) * team.world_size
        )  # the other ranks are about as far
    team.barrier()
    return team.on_main(lambda: _finish(request, settings, tree, shards))


def missing_shards(out: Path, shards: int) -> list[int]:
    """Return the numbers of the shards that are not complete: each is written in one move, and then
    its entry.
    """

    def is_complete(path: Path) -> bool:
        entry = path.with_suffix(".json")
        return (
            entry.is_file()
            and path.is_file()
            and _read_json(entry)["record"]["bytes"] == path.stat().st_size
        )

    return [number for number in range(shards) if not is_complete(out / _shard_name(number))]


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What is packed: the files of a tree, of which autoencoder.

    shape: of a record, (2 Z, H, W). sides: 2 with the mirrored image, else 1.
    read: returns what a file holds. moments: returns those of a batch, by side.
    changes: what `read` changed of images.
    """

    tree: Tree
    identity: VaeIdentity
    shape: tuple[int, ...]
    sides: int
    read: Callable[[Path], np.ndarray]
    moments: Callable[[np.ndarray], Sequence[Tensor]]
    changes: list[str] = field(default_factory=list)


def _images(request: EncodeRequest, team: DistributedContext) -> _Source:
    """Return a tree of images and the autoencoder that encodes them.

    Raises: DataError for a tree or an autoencoder that cannot be read; ConfigError for a size that
        the autoencoder would cut.
    """
    tree = scan_tree(request.source, split=request.split)

    def load() -> Vae:
        return Vae(
            request.vae, device=team.device, dtype=DTYPES[request.vae_dtype], name=request.vae_name
        )

    # Into the memory of every rank at once: rank 0 alone fetches a hub id from the network first.
    first = load() if team.is_main else None
    team.barrier()
    vae, changes = first or load(), list[str]()
    identity = vae.identity
    if request.image_size % identity.downsampling:
        raise ConfigError(
            f"--image-size {request.image_size}: must be a multiple of the {identity.downsampling}"
            f" pixels that {identity.name} makes one latent of"
        )

    def moments(images_BHWC: np.ndarray) -> list[Tensor]:
        sides = [images_BHWC, images_BHWC[:, :, ::-1].copy()][: 1 + request.flip]
        return [vae.encode(side) for side in sides]

    side = request.image_size // identity.downsampling
    return _Source(
        tree=tree,
        identity=identity,
        shape=(2 * identity.latent_channels, side, side),
        sides=1 + request.flip,
        moments=moments,
        changes=changes,
        read=partial(read_image, size=request.image_size, changes=changes),
    )


def _cached(request: EncodeRequest) -> _Source:
    """Return a tree of cached moments; all have the shape of the first that can be read.

    Raises: ConfigError if their autoencoder is not named; DataError if there are more unreadable
    ones than allowed.
    """
    tree = scan_tree(request.source, (NPZ_SUFFIX,), split=request.split)
    if request.vae_name is None:
        raise ConfigError(
            "--from-npz: the files do not say which autoencoder they come from: name it with"
            " --vae-name, as recipes do in data.vae"
        )
    corrupt = CorruptFiles(request.max_corrupt, "--max-corrupt")
    for name in tree.names:
        try:
            shape = read_npz_moments(tree.root / name).shape
            break
        except DataError as error:
            corrupt.add(shown(name), str(error))
    else:
        raise DataError(f"{tree.root}: none of its {len(tree)} files could be read")
    sides = min(shape[0], 1 + request.flip)
    # No more is known than the name that the user gives, and the channels.
    return _Source(
        tree=tree,
        identity=VaeIdentity(name=request.vae_name, latent_channels=shape[1] // 2),
        shape=shape[1:],
        sides=sides,
        read=partial(read_npz_moments, shape=shape),
        moments=lambda values: torch.from_numpy(values).unbind(1)[:sides],
    )


def _settings(request: EncodeRequest, source: _Source) -> dict[str, Any]:
    """Return what must agree between the calls that fill one folder."""
    listing = xxhash.xxh3_64(os.fsencode("\n".join(source.tree.names))).hexdigest()
    return {
        "files": len(source.tree),
        "listing": listing,
        "image_size": None if request.from_npz else request.image_size,
        "flipped": source.sides == 2,
        "dtype": request.dtype,
        "vae_dtype": None if request.from_npz else request.vae_dtype,
        "shard_size": request.shard_size,
        "vae": asdict(source.identity),
    }


def _claim(request: EncodeRequest, settings: dict[str, Any]) -> LatentIndex | None:
    """Take the output folder, or recognise what is in it; return the index if nothing is left to
    do.
    """
    out, path = request.out, request.out / UNFINISHED
    try:
        if (index := read_index(out)) is not None:
            if differing := differences({**asdict(index), **index.encoding}, settings):
                raise ConfigError(
                    f"--out {out} already holds other latents: {'; '.join(differing)}. Choose"
                    " another folder"
                )
            _LOG.info("%s: complete already", out)
            return index
        if path.is_file():
            before = _read_json(path)
            if differing := differences(before, settings):
                raise ConfigError(
                    f"--out {out} holds an encoding begun otherwise: {'; '.join(differing)}. Choose"
                    " another folder, or use the same arguments and files"
                )
            _LOG.info("%s: going on with the encoding found there", out)
            return None
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(
                f"--out {out} is no empty folder and holds no latents: choose another one"
            )
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error}") from None
    return None


class _Worker:
    """Encodes shards of one rank."""

    def __init__(self, request: EncodeRequest, source: _Source) -> None:
        self._request, self._source = request, source
        self._reader = TreeReader(source.tree, source.read, request.workers)
        self._corrupt = CorruptFiles(request.max_corrupt, "--max-corrupt")

    def files_of(self, number: int) -> range:
        """Return the indices of a shard's files."""
        start = number * self._request.shard_size
        return range(start, min(start + self._request.shard_size, len(self._source.tree)))

    def encode_shard(self, number: int) -> None:
        """Encode one shard; it is empty if none of its files can be read."""
        path, indices = self._request.out / _shard_name(number), self.files_of(number)
        tree, dtype = self._source.tree, DTYPES[self._request.dtype]
        sides = [
            [torch.empty(0, *self._source.shape, dtype=dtype)] for _ in range(self._source.sides)
        ]
        kept, skipped = [], []
        self._source.changes.clear()
        for start in range(indices.start, indices.stop, self._request.batch_size):
            batch = range(start, min(start + self._request.batch_size, indices.stop))
            good = []
            for index, value in zip(batch, self._reader.try_all(batch), strict=True):
                if isinstance(value, DataError):
                    skipped.append(shown(tree.names[index]))
                    self._corrupt.add(skipped[-1], str(value))
                else:
                    good.append(value)
                    kept.append(index)
            for parts, part in zip(
                sides, self._source.moments(np.stack(good)) if good else (), strict=bool(good)
            ):
                parts.append(part.cpu().to(dtype))
        records = [torch.cat(parts) for parts in sides]
        content = ShardContent(
            kind=_KIND,
            records=records[0],
            flipped=records[1] if len(records) > 1 else None,
            labels=torch.from_numpy(tree.labels[kept]),
            names=[tree.names[i] for i in kept],
        )
        try:
            record = write_shard(path, content)
            write_json(
                path.with_suffix(".json"),
                {
                    "record": asdict(record),
                    "skipped": skipped,
                    "changes": Counter(self._source.changes),
                },
            )
        except OSError as error:
            raise DataError(
                f"{path}: could not be written: {error}. Free the disk and run the same command"
                " again"
            ) from None


def _finish(
    request: EncodeRequest, settings: dict[str, Any], tree: Tree, shards: int
) -> LatentIndex:
    """Make the index from all entries; rank 0 only."""
    entries = [
        _read_json((request.out / _shard_name(number)).with_suffix(".json"))
        for number in range(shards)
    ]
    skipped = [name for entry in entries for name in entry["skipped"]]
    if len(skipped) > request.max_corrupt:
        raise DataError(
            f"{len(skipped)} files could not be read, --max-corrupt={request.max_corrupt} are"
            f" allowed: {some_of(skipped)}. Repair them and encode into a new folder, or run again"
            " with a higher limit: nothing is encoded twice"
        )
    records = tuple(ShardRecord(**entry["record"]) for entry in entries)
    if not sum(record.count for record in records):
        raise DataError(f"{tree.root}: none of its {len(tree)} files could be read")
    opened = [Shard(request.out / record.file) for record in records]
    counts = np.bincount(
        torch.cat([shard.labels for shard in opened]).numpy(), minlength=len(tree.classes)
    )
    changes = sum((Counter(entry.get("changes", {})) for entry in entries), Counter())
    if changes:
        _LOG.info(
            "%s: %d images with transparent pixels were composed over white, %d turned upright as"
            " their EXIF data say",
            tree.root,
            changes[COMPOSED],
            changes[TURNED],
        )
    if unread := [name for name, count in zip(tree.classes, counts, strict=True) if not count]:
        _LOG.warning(
            "%s: no image of %d classes could be read, their labels never occur: %s",
            tree.root,
            len(unread),
            some_of(unread),
        )
    index = LatentIndex(
        kind=_KIND,
        shape=opened[0].shape[1:],
        dtype=request.dtype,
        flipped=settings["flipped"],
        image_size=settings["image_size"],
        vae=VaeIdentity(**settings["vae"]),
        classes=tuple(map(shown, tree.classes)),
        class_counts=tuple(counts.tolist()),
        shards=records,
        skipped=tuple(skipped),
        encoding={name: settings[name] for name in ("files", "listing", "shard_size", "vae_dtype")},
        versions=versions_of("diffusers", "numpy", "pillow", "safetensors"),
    )
    index.write(request.out)
    for leftover in (request.out / UNFINISHED, *(request.out.glob("shard-*.json"))):
        leftover.unlink()
    return index


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _read_json(path: Path) -> dict[str, Any]:
    with reading(path, "record of an encoding"):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"holds {type(values).__name__}")
        return values
