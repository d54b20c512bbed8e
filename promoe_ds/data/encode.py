"""From a tree of images to packed latents, on many ranks, resumable: whole shards are the unit of work.

The shards that are missing are dealt out to the ranks. A shard is complete once its entry (`shard-N.json`) lies beside it; the
index, made of all entries, is written last and replaces them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from tqdm import tqdm

from promoe_ds.data.images import COMPOSED, TURNED, CorruptFiles, Tree, TreeReader, read_image, scan_tree
from promoe_ds.data.index import INDEX, UNFINISHED, LatentIndex, ShardRecord, read_index
from promoe_ds.data.latents import NPZ_SUFFIX, read_npz_moments
from promoe_ds.data.reading import reading, shown
from promoe_ds.data.shards import Shard, ShardContent, describe_shard, write_shard
from promoe_ds.data.vae import Vae, VaeIdentity
from promoe_ds.distributed.team import Team
from promoe_ds.errors import ConfigError, DataError, differences, first_few
from promoe_ds.files import write_json
from promoe_ds.logs import get_logger
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


def encode(request: EncodeRequest, team: Team) -> LatentIndex:
    """Encode a tree; all ranks call this together. Return the index.

    Raises: DataError for images that cannot be read, beyond `max_corrupt` of a rank or of all together; ConfigError for a request
        that cannot be, or an output folder that holds something else.
    """
    tree = scan_tree(request.source, (NPZ_SUFFIX,), split=request.split) if request.from_npz else scan_tree(
        request.source, split=request.split)
    # Read into the memory of every rank at once: rank 0 alone fetches a hub id from the network first.
    vae = None if request.from_npz else _load(request, team)
    sides, *shape = _cached_shape(request, tree) if vae is None else (2, *_encoded_shape(request, vae.identity))
    request = replace(request, flip=request.flip and sides == 2)
    # Of cached moments no more is known than the name that the user gives, and their channels.
    identity = vae.identity if vae else VaeIdentity(name=request.vae_name, latent_channels=shape[0] // 2)
    settings = _settings(request, tree, identity)
    if (done := team.on_main(lambda: _claim(request, settings))) is not None:
        return done
    work = _Worker(request, tree, vae, tuple(shape))
    shards = -(-len(tree) // request.shard_size)
    todo = team.on_main(lambda: missing_shards(request.out, shards))
    total = sum(len(work.files_of(number)) for number in todo)
    with tqdm(total=total, unit="image", disable=None if team.is_main else True) as progress:
        for number in todo[team.rank::team.world_size]:
            work.encode_shard(number)
            progress.update(min(len(work.files_of(number)) * team.world_size, total - progress.n))
    team.barrier()
    return team.on_main(lambda: _finish(request, settings, tree, shards))


def missing_shards(out: Path, shards: int) -> list[int]:
    """Return the numbers of the shards that are not complete: each is written in one move, and then its entry."""
    def is_complete(path: Path) -> bool:
        entry = path.with_suffix(".json")
        return entry.is_file() and path.is_file() and _read_json(entry)["record"]["bytes"] == path.stat().st_size

    return [number for number in range(shards) if not is_complete(out / _shard_name(number))]


def _load(request: EncodeRequest, team: Team) -> Vae:
    def load() -> Vae:
        return Vae(request.vae, device=team.device, dtype=DTYPES[request.vae_dtype], name=request.vae_name)

    first = load() if team.is_main else None
    team.barrier()
    return first or load()


def _encoded_shape(request: EncodeRequest, identity: VaeIdentity) -> tuple[int, int, int]:
    """Return the shape of an image's moments, (2 Z, H, W).

    Raises: ConfigError for a size that the autoencoder would cut.
    """
    if request.image_size % identity.downsampling:
        raise ConfigError(f"--image-size {request.image_size}: must be a multiple of the {identity.downsampling} pixels that "
                          f"{identity.name} makes one latent of")
    side = request.image_size // identity.downsampling
    return 2 * identity.latent_channels, side, side


def _cached_shape(request: EncodeRequest, tree: Tree) -> tuple[int, int, int, int]:
    """Return the shape of the first cached moments that can be read, (1 or 2 sides, 2 Z, H, W): all others must have it.

    Raises: ConfigError if their autoencoder is not named; DataError if there are more unreadable ones than allowed.
    """
    if request.vae_name is None:
        raise ConfigError("--from-npz: the files do not say which autoencoder they come from: name it with --vae-name, as recipes "
                          "do in data.vae")
    corrupt = CorruptFiles(request.max_corrupt, "--max-corrupt")
    for name in tree.names:
        try:
            return read_npz_moments(tree.root / name).shape
        except DataError as error:
            corrupt.add(shown(name), str(error))
    raise DataError(f"{tree.root}: none of its {len(tree)} files could be read")


def _settings(request: EncodeRequest, tree: Tree, identity: VaeIdentity) -> dict[str, Any]:
    """Return what must agree between the calls that fill one folder."""
    listing = xxhash.xxh3_64(os.fsencode("\n".join(tree.names))).hexdigest()
    return {"files": len(tree), "listing": listing, "image_size": None if request.from_npz else request.image_size,
            "flipped": request.flip, "dtype": request.dtype, "vae_dtype": None if request.from_npz else request.vae_dtype,
            "shard_size": request.shard_size, "vae": identity.as_json()}


def _claim(request: EncodeRequest, settings: dict[str, Any]) -> LatentIndex | None:
    """Take the output folder, or recognise what is in it; return the index if nothing is left to do."""
    out, path = request.out, request.out / UNFINISHED
    try:
        if (index := read_index(out)) is not None:
            if differing := differences({**asdict(index), **index.encoding}, settings):
                raise ConfigError(f"--out {out} already holds other latents: {'; '.join(differing)}. Choose another folder")
            _LOG.info("%s: complete already", out)
            return index
        if path.is_file():
            before = _read_json(path)
            if differing := differences(before, settings):
                raise ConfigError(f"--out {out} holds an encoding begun otherwise: {'; '.join(differing)}. Choose another "
                                  "folder, or use the same arguments and files")
            _LOG.info("%s: going on with the encoding found there", out)
            return None
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out {out} is no empty folder and holds no latents: choose another one")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error}") from None
    return None


class _Worker:
    """Encodes shards of one rank."""

    def __init__(self, request: EncodeRequest, tree: Tree, vae: Vae | None, shape: tuple[int, int, int]) -> None:
        self._request, self._tree, self._vae, self._shape = request, tree, vae, shape
        self._changes: list[str] = []

        def read(path: Path) -> np.ndarray:
            return (read_npz_moments(path, (1 + request.flip, *shape)) if vae is None
                    else read_image(path, request.image_size, self._changes))

        self._reader = TreeReader(tree, read, request.workers)
        self._corrupt = CorruptFiles(request.max_corrupt, "--max-corrupt")

    def files_of(self, number: int) -> range:
        """Return the indices of a shard's files."""
        return range(number * self._request.shard_size, min((number + 1) * self._request.shard_size, len(self._tree)))

    def encode_shard(self, number: int) -> None:
        """Encode one shard; it is empty if none of its files can be read."""
        path, indices = self._request.out / _shard_name(number), self.files_of(number)
        empty = torch.empty(0, *self._shape, dtype=DTYPES[self._request.dtype])
        kept, moments, twins, skipped = [], [empty], [empty], []
        self._changes.clear()
        for start in range(indices.start, indices.stop, self._request.batch_size):
            batch = range(start, min(start + self._request.batch_size, indices.stop))
            good = []
            for index, value in zip(batch, self._reader.try_all(batch), strict=True):
                if isinstance(value, DataError):
                    skipped.append(shown(self._tree.names[index]))
                    self._corrupt.add(skipped[-1], str(value))
                else:
                    good.append(value)
                    kept.append(index)
            if good:
                plain, mirrored = self._moments(np.stack(good))
                moments.append(plain)
                twins += [mirrored] if self._request.flip else []
        content = ShardContent(kind=_KIND, records=torch.cat(moments), flipped=torch.cat(twins) if self._request.flip else None,
                               labels=torch.from_numpy(self._tree.labels[kept]), names=[self._tree.names[i] for i in kept])
        try:
            record = write_shard(path, content)
            write_json(path.with_suffix(".json"),
                       {"record": asdict(record), "skipped": skipped, "changes": Counter(self._changes)})
        except OSError as error:
            raise DataError(f"{path}: could not be written: {error}. Free the disk and run the same command again") from None

    def _moments(self, values: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return moments of images, or as they were cached, and those of the mirrored images, as stored."""
        dtype = DTYPES[self._request.dtype]
        if self._vae is None:
            pair = (*torch.from_numpy(values).unbind(1), None)
        else:
            pair = (self._vae.encode(values), self._vae.encode(values[:, :, ::-1].copy()) if self._request.flip else None)
        return pair[0].cpu().to(dtype), None if pair[1] is None else pair[1].cpu().to(dtype)


def _finish(request: EncodeRequest, settings: dict[str, Any], tree: Tree, shards: int) -> LatentIndex:
    """Make the index from all entries; rank 0 only."""
    entries = [_read_json((request.out / _shard_name(number)).with_suffix(".json")) for number in range(shards)]
    skipped = [name for entry in entries for name in entry["skipped"]]
    if len(skipped) > request.max_corrupt:
        raise DataError(f"{len(skipped)} files could not be read, --max-corrupt={request.max_corrupt} are allowed: "
                        f"{', '.join(skipped[:5])}{' ...' if len(skipped) > 5 else ''}. Repair them and encode into a new "
                        "folder, or run again with a higher limit: nothing is encoded twice")
    records = tuple(ShardRecord(**entry["record"]) for entry in entries)
    if not sum(record.count for record in records):
        raise DataError(f"{tree.root}: none of its {len(tree)} files could be read")
    opened = [Shard(request.out / record.file) for record in records]
    counts = np.bincount(torch.cat([shard.labels for shard in opened]).numpy(), minlength=len(tree.classes))
    changes = sum((Counter(entry.get("changes", {})) for entry in entries), Counter())
    if changes:
        _LOG.info("%s: %d images with transparent pixels were composed over white, %d turned upright as their EXIF data say",
                  tree.root, changes[COMPOSED], changes[TURNED])
    if unread := [shown(name) for name, count in zip(tree.classes, counts, strict=True) if not count]:
        _LOG.warning("%s: no image of %d classes could be read, their labels never occur: %s", tree.root, len(unread),
                     ", ".join(unread[:5]))
    index = LatentIndex(
        kind=_KIND, shape=opened[0].shape[1:], dtype=request.dtype, flipped=request.flip, image_size=settings["image_size"],
        vae=VaeIdentity(**settings["vae"]), classes=tuple(map(shown, tree.classes)), class_counts=tuple(counts.tolist()),
        shards=records, skipped=tuple(skipped),
        encoding={name: settings[name] for name in ("files", "listing", "shard_size", "vae_dtype")},
        versions=versions_of("diffusers", "numpy", "pillow", "safetensors"))
    index.write(request.out)
    for leftover in (request.out / UNFINISHED, *(request.out.glob("shard-*.json"))):
        leftover.unlink()
    return index


def verify(folder: Path, team: Team) -> LatentIndex:
    """Read every shard of a finished folder and hold it against the index, each rank a share of them.

    Raises: DataError naming the shards, and the first records, that are not what was written.
    """
    index = read_index(folder)
    if index is None:
        raise DataError(f"{folder}: no {INDEX} there: nothing to verify against")
    problems = [problem for record in index.shards[team.rank::team.world_size] for problem in _problems(folder, record)]
    if problems := [problem for found in team.gather(problems) for problem in found]:
        raise DataError(first_few(problems))
    return index


def _problems(folder: Path, record: ShardRecord) -> Iterator[str]:
    path = folder / record.file
    if not path.is_file():
        yield f"{path}: missing"
        return
    if describe_shard(path, record.count, name=record.file) == record:
        return
    yield f"{path}: its checksum is not that of {INDEX}"
    try:
        shard = Shard(path)
        out = np.empty(shard.record_bytes, dtype=np.uint8)
        for row in range(len(shard)):
            for flip in range(1 + shard.flipped):
                shard.copy_record(row, bool(flip), out)
    except DataError as error:
        yield str(error)


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _read_json(path: Path) -> dict[str, Any]:
    with reading(path, "record of an encoding"):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"holds {type(values).__name__}")
        return values
