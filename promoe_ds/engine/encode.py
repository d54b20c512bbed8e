"""From a tree of images to packed latents, on many ranks, resumable: whole shards are the unit of work.

Rank r encodes the shards r, r + W, ... A shard is complete once its entry (`shard-N.json`) lies beside it; the index, made of
all entries, is written last and replaces them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from tqdm import tqdm

from promoe_ds.data.images import CorruptFiles, Tree, TreeReader, read_image, scan_tree
from promoe_ds.data.index import INDEX, UNFINISHED, LatentIndex, ShardRecord, read_index
from promoe_ds.data.latents import NPZ_SUFFIX, read_npz_moments
from promoe_ds.data.shards import Shard, ShardContent, describe_shard, write_shard
from promoe_ds.data.vae import Vae, VaeIdentity
from promoe_ds.engine.team import Team
from promoe_ds.engine.versions import versions_of
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.logs import get_logger

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

    Raises: DataError for images that cannot be read, beyond `max_corrupt` of a rank or of all together; ConfigError if the
    output folder holds something else.
    """
    tree = scan_tree(request.source, (NPZ_SUFFIX,), split=request.split) if request.from_npz else scan_tree(
        request.source, split=request.split)
    # Read into the memory of every rank at once: rank 0 alone fetches a hub id from the network first.
    vae = None if request.from_npz else _load(request, team)
    settings = _settings(request, tree, vae.identity if vae else _named_only(request, tree))
    if (done := team.on_main(lambda: _claim(request, settings, len(tree)))) is not None:
        return done
    work = _Worker(request, tree, vae, team)
    numbers = range(-(-len(tree) // request.shard_size))
    with tqdm(total=len(tree), unit="image", disable=None if team.is_main else True) as progress:
        for number in numbers[team.rank::team.world_size]:
            count = work.encode_shard(number)
            progress.update(min(count * team.world_size, len(tree) - progress.n))
    team.barrier()
    return team.on_main(lambda: _finish(request, settings, tree, len(numbers)))


def _load(request: EncodeRequest, team: Team) -> Vae:
    def load() -> Vae:
        return Vae(request.vae, device=team.device, dtype=DTYPES[request.vae_dtype], name=request.vae_name)

    first = load() if team.is_main else None
    team.barrier()
    return first or load()


def _named_only(request: EncodeRequest, tree: Tree) -> VaeIdentity | None:
    """Return what can be said of the autoencoder of cached moments: the name that the user gives, and their channels."""
    if request.vae_name is None:
        return None
    channels = read_npz_moments(tree.root / tree.names[0]).shape[1] // 2
    return VaeIdentity(name=request.vae_name, latent_channels=channels)


def _settings(request: EncodeRequest, tree: Tree, identity: VaeIdentity | None) -> dict[str, Any]:
    """Return what must agree between the calls that fill one folder."""
    listing = xxhash.xxh3_64("\n".join(tree.names).encode()).hexdigest()
    return {"files": len(tree), "listing": listing, "image_size": None if request.from_npz else request.image_size,
            "flipped": request.flip, "dtype": request.dtype, "shard_size": request.shard_size,
            "vae": None if identity is None else identity.as_json()}


def _claim(request: EncodeRequest, settings: dict[str, Any], count: int) -> LatentIndex | None:
    """Take the output folder, or recognise what is in it; return the index if nothing is left to do."""
    out, path = request.out, request.out / UNFINISHED
    try:
        if (index := read_index(out)) is not None:
            same = (index.dtype, index.flipped, index.image_size, index.vae and index.vae.as_json()) == tuple(
                settings[name] for name in ("dtype", "flipped", "image_size", "vae"))
            if not same or index.count + len(index.skipped) != count:
                raise ConfigError(f"--out {out} already holds other latents, see its {INDEX}: choose another folder")
            _LOG.info("%s: complete already", out)
            return index
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            differing = [f"{name} was {before.get(name)!r} and is {value!r}" for name, value in settings.items()
                         if before.get(name) != value]
            if differing:
                raise ConfigError(f"--out {out} holds an encoding begun otherwise: {'; '.join(differing)}. Choose another folder, "
                                  "or use the same arguments and files")
            _LOG.info("%s: going on with the encoding found there", out)
            return None
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out {out} is no empty folder and holds no latents: choose another one")
        out.mkdir(parents=True, exist_ok=True)
        _write_json(path, settings)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error}") from None
    return None


class _Worker:
    """Encodes shards of one rank."""

    def __init__(self, request: EncodeRequest, tree: Tree, vae: Vae | None, team: Team) -> None:
        self._request, self._tree, self._vae = request, tree, vae
        read = read_npz_moments if vae is None else lambda path: read_image(path, request.image_size)
        self._reader = TreeReader(tree, read, request.workers)
        self._corrupt = CorruptFiles(request.max_corrupt, "--max-corrupt")

    def encode_shard(self, number: int) -> int:
        """Encode one shard, unless it is there already; return how many files it stands for."""
        path = self._request.out / _shard_name(number)
        indices = range(number * self._request.shard_size, min((number + 1) * self._request.shard_size, len(self._tree)))
        if _is_complete(path):
            return len(indices)
        kept, moments, twins, skipped = [], [], [], []
        for start in range(indices.start, indices.stop, self._request.batch_size):
            batch = range(start, min(start + self._request.batch_size, indices.stop))
            good = []
            for index, value in zip(batch, self._reader.try_all(batch), strict=True):
                if isinstance(value, DataError):
                    self._corrupt.add(self._tree.names[index], str(value))
                    skipped.append(self._tree.names[index])
                else:
                    good.append(value)
                    kept.append(index)
            if good:
                plain, mirrored = self._moments(np.stack(good))
                moments.append(plain)
                twins += [mirrored] if self._request.flip else []
        if not kept:
            raise DataError(f"{self._tree.root}: none of the {len(indices)} files from {self._tree.names[indices.start]} on could "
                            "be read")
        content = ShardContent(kind=_KIND, records=torch.cat(moments), flipped=torch.cat(twins) if twins else None,
                               labels=torch.from_numpy(self._tree.labels[kept]), names=[self._tree.names[i] for i in kept])
        try:
            record = write_shard(path, content)
            _write_json(path.with_suffix(".json"), {"record": asdict(record), "skipped": skipped})
        except OSError as error:
            raise DataError(f"{path}: could not be written: {error}. Free the disk and run the same command again") from None
        return len(indices)

    def _moments(self, values: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return moments of images, or as they were cached, and those of the mirrored images, as stored."""
        dtype = DTYPES[self._request.dtype]
        if self._vae is None:
            pair = torch.from_numpy(values).unbind(1)
        else:
            pair = (self._vae.encode(values), self._vae.encode(values[:, :, ::-1].copy()) if self._request.flip else None)
        return pair[0].cpu().to(dtype), None if pair[1] is None else pair[1].cpu().to(dtype)


def _finish(request: EncodeRequest, settings: dict[str, Any], tree: Tree, shards: int) -> LatentIndex:
    """Make the index from all entries; rank 0 only."""
    entries = [json.loads((request.out / _shard_name(number)).with_suffix(".json").read_text(encoding="utf-8"))
               for number in range(shards)]
    skipped = [name for entry in entries for name in entry["skipped"]]
    if len(skipped) > request.max_corrupt:
        raise DataError(f"{len(skipped)} files could not be read, --max-corrupt={request.max_corrupt} are allowed: "
                        f"{', '.join(skipped[:5])}{' ...' if len(skipped) > 5 else ''}. Mend them and encode into a new folder, or "
                        "run again with a higher limit: nothing is encoded twice")
    records = tuple(ShardRecord(**entry["record"]) for entry in entries)
    opened = [Shard(request.out / record.file) for record in records]
    counts = np.bincount(torch.cat([shard.labels for shard in opened]).numpy(), minlength=len(tree.classes))
    identity = None if settings["vae"] is None else VaeIdentity(**settings["vae"])
    index = LatentIndex(
        kind=_KIND, shape=opened[0].shape[1:], dtype=request.dtype, flipped=request.flip, image_size=settings["image_size"],
        vae=identity, classes=tree.classes, class_counts=tuple(counts.tolist()), shards=records, skipped=tuple(skipped),
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
        raise DataError("; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else ""))
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


def _is_complete(path: Path) -> bool:
    """Whether a shard and its entry are there and fit; both are written in one move, the entry last."""
    entry = path.with_suffix(".json")
    return entry.is_file() and path.is_file() and (
        json.loads(entry.read_text(encoding="utf-8"))["record"]["bytes"] == path.stat().st_size)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
    temporary.replace(path)
