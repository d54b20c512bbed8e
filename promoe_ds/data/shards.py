"""A folder of packed latents: shards, which are mapped safetensors files, and their index.

A shard's tensors: `latents` or `moments` (n, C, H, W) and, where there are mirrored twins,
`latents_flip` or `moments_flip`; `labels` (n,); written by this package also `checksums` (n, 1 or
2), the xxh3_64 of each record's bytes as int64, and `names`, the records' sources, joined by line
feeds. `index.json` says what is there and what it belongs to, as `LatentIndex` lists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from promoe_ds.data.dataset import first_not_finite
from promoe_ds.data.normalization.statistics import LatentStatistics, measure, merge
from promoe_ds.data.reading import read_json, reading, shown
from promoe_ds.data.sources.cached import sides_of
from promoe_ds.data.vae import FLIP, LATENTS, MOMENTS, VaeIdentity
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import DataError, first_few
from promoe_ds.file_kind import SAFETENSORS
from promoe_ds.files import replacing, write_json

INDEX = "index.json"
#: What an encoding under way keeps beside its shards; the index, written last, replaces it.
UNFINISHED = "encoding.json"


class ShardRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One shard: `checksum` is the xxh3_64 of the whole file, in hexadecimal."""

    file: str
    count: int
    bytes: int
    checksum: str


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What a JSON file beside a shard says until there is an index. It is written last: a shard
    without it is not complete.
    """

    record: ShardRecord

    def write(self, path: Path) -> None:
        """Write the entry of the shard `path`, in one move."""
        write_json(path.with_suffix(".json"), msgspec.to_builtins(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the entry of the shard `path`.

        Raises: DataError naming the file that cannot be understood, and its field.
        """
        return read_json(path.with_suffix(".json"), "record of an encoding", cls)

    @classmethod
    def of_complete(cls, path: Path) -> Self | None:
        """Return the entry of the shard `path`, None where the shard is not complete."""
        if not (path.is_file() and path.with_suffix(".json").is_file()):
            return None
        entry = cls.read(path)
        return entry if entry.record.bytes == path.stat().st_size else None


class LatentIndex(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="format",
    tag="promoe_ds.latents/1",
):
    """What `index.json` says.

    `image_size` is the side in pixels, or height and width. `encoding` is what else two calls that
    fill one folder must share: number and checksum of the source's file names, images a shard, type
    of the autoencoder's computation, and the checksum of the places of the files that were taken,
    where those are not all. `statistics` are those of the latents, as stored; earlier versions did
    not measure them.
    """

    count: int
    kind: str
    shape: tuple[int, int, int]
    dtype: str
    flipped: bool
    image_size: int | list[int] | None
    vae: VaeIdentity | None
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    shards: tuple[ShardRecord, ...]
    statistics: LatentStatistics | None = None
    skipped: tuple[str, ...] = ()
    encoding: dict[str, Any] = {}
    versions: dict[str, str] = {}

    def __post_init__(self) -> None:
        """Check what the types do not say.

        Raises: ValueError for a file outside of the folder, or another number of records.
        """
        for shard in self.shards:
            if Path(shard.file).name != shard.file or shard.file in ("", ".", ".."):
                raise ValueError(f"the file name {shard.file!r} leaves the folder")
        if self.count != (found := sum(shard.count for shard in self.shards)):
            raise ValueError(f"count is {self.count}, its shards hold {found}")
        channels = self.shape[0] // (2 if self.kind == MOMENTS else 1)
        if self.statistics is not None and len(self.statistics.mean) != channels:
            raise ValueError(f"statistics are of {len(self.statistics.mean)} channels")

    def write(self, folder: Path) -> None:
        """Write `index.json`, in one move."""
        write_json(folder / INDEX, msgspec.to_builtins(self))


def read_index(folder: Path) -> LatentIndex | None:
    """Return a folder's index, None where there is none.

    Raises: DataError naming the file that cannot be understood, and its field.
    """
    path = folder / INDEX
    return read_json(path, "index of latents", LatentIndex) if path.is_file() else None


def index_of(folder: Path) -> LatentIndex:
    """Return a folder's index.

    Raises: DataError if there is none, or as `read_index`.
    """
    if (index := read_index(folder)) is None:
        raise DataError(f"{folder}: no {INDEX} there: name a folder that promoe-encode has written")
    return index


class Shard:
    """An open shard; records stay on disk until they are taken.

    layout: kind, type, and whether there are mirrored twins, in words. variants: the records, and
    where there are any the mirrored ones, mapped.
    """

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises: DataError naming a file that is no shard, or whose latents are no floats.
        """
        self.path = path
        with reading(path, "latent shard", kind=SAFETENSORS):
            tensors = load_file(path)  # maps it
            self.kind, sides = sides_of(path, tensors, (LATENTS, MOMENTS))
            variants = [tensors[side] for side in sides]
            self.labels, self.dtype = tensors["labels"], variants[0].dtype
            self.shape = tuple(variants[0].shape)
            found = [f"{_name(each.dtype)} {tuple(each.shape)}" for each in variants]
            if not self.dtype.is_floating_point:
                raise DataError(
                    f"{path}: {self.kind} are {found[0]}, expected floats: if they are quantised,"
                    " store the floats that they encode"
                )
            if len(set(found)) > 1:
                raise DataError(
                    f"{path}: {self.kind} are {found[0]}, their mirrored twins {found[1]}: store"
                    " both in one shape and type"
                )
            sums = tensors.get("checksums")
            self.checksums = None if sums is None else sums.numpy().view(np.uint64)
            self.variants = variants
            # As bytes: numpy knows no bfloat16, and copies rows several times faster than torch.
            self._bytes = [_as_bytes(variant) for variant in variants]
        self.flipped = len(variants) > 1
        twins = "with" if self.flipped else "without"
        self.layout = f"{self.kind} as {_name(self.dtype)}, {twins} mirrored twins"
        self._names = tensors.get("names")
        if self.checksums is not None and self.checksums.shape != (len(self), len(variants)):
            raise DataError(
                f"{path}: checksums {self.checksums.shape} do not fit {len(self)} records of"
                f" {len(variants)}"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def record(self, row: int, flip: bool) -> np.ndarray:
        """Return the bytes of a record, mapped.

        Raises: DataError naming a record that is not what was written.
        """
        record = self._bytes[int(flip)][row]
        checksums = self.checksums
        if checksums is not None and xxhash.xxh3_64_intdigest(record) != checksums[row, int(flip)]:
            raise DataError(
                f"{self.path}: record {row} ({self.name(row)}){', mirrored,' if flip else ''} is"
                " damaged: its checksum does not match; encode this shard anew"
            )
        return record

    def name(self, row: int) -> str:
        """Return the source of a record, as far as the shard knows."""
        try:
            return self.names()[row]
        except Exception:  # here names serve messages alone
            return "of unknown source"

    def names(self) -> list[str]:
        """Return the sources of all records.

        Raises: DataError if the shard does not say them.
        """
        with reading(self.path, "shard that names the sources of its records"):
            names = self._names.numpy().tobytes().decode().split("\n")[: len(self)]
            if len(names) != len(self):
                raise ValueError(f"{len(names)} names of {len(self)} records")
            return names


def write_shard(
    path: Path,
    variants: Sequence[Tensor],
    labels: Tensor,
    names: Sequence[str],
    kind: str = MOMENTS,
) -> ShardRecord:
    """Write a shard, in one move, and return its entry in the index.

    Args:
        variants: records (n, C, H, W) and, where there are any, those of the mirrored images.
        labels: (n,); names: the records' sources; kind: moments, or latents.
    Raises: DataError naming a record that is not finite.
    """
    tensors = {kind + FLIP * side: each.contiguous() for side, each in enumerate(variants)}
    digests = []
    for values in tensors.values():
        if (bad := first_not_finite(values)) is not None:
            raise DataError(
                f"{shown(names[bad])}: its latent is not finite as {_name(values.dtype)}: store or"
                " compute in a wider type"
            )
        digests.append([xxhash.xxh3_64_intdigest(row) for row in _as_bytes(values)])
    checksums = np.array(digests, dtype=np.uint64).reshape(len(tensors), -1).T.copy()
    text = "\n".join(map(shown, names)).encode() or b"\n"
    tensors |= {
        "labels": labels,
        "checksums": torch.from_numpy(checksums.view(np.int64)),
        "names": torch.frombuffer(bytearray(text), dtype=torch.uint8),
    }
    return save_shard(path, tensors, len(labels))


def save_shard(path: Path, tensors: dict[str, Tensor], count: int) -> ShardRecord:
    """Write a file of tensors, in one move, and return its entry in the index."""
    with replacing(path) as temporary:
        save_file(tensors, temporary)
    return _describe(path, count)


def _describe(path: Path, count: int) -> ShardRecord:
    """Return a file's entry in the index: reads all of it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_64)
    return ShardRecord(
        file=path.name, count=count, bytes=path.stat().st_size, checksum=digest.hexdigest()
    )


def verify(folder: Path, team: DistributedContext) -> LatentIndex:
    """Read every shard of a finished folder and compare it with the index, each rank a share of
    them.

    Raises: DataError naming the shards, and the first records, that are not what was written.
    """
    index = index_of(folder)
    own = index.shards[team.rank :: team.world_size]
    found = team.gather([problem for record in own for problem in _problems(folder, record)])
    if problems := [problem for of_rank in found for problem in of_rank]:
        raise DataError(first_few(problems))
    return index


def measure_folder(folder: Path, team: DistributedContext) -> LatentIndex:
    """Measure the latents of a finished folder and write their statistics into its index; all ranks
    call this together.

    Raises: DataError for a folder without an index, or a shard that cannot be read.
    """
    index = index_of(folder)
    has_posterior = index.kind == MOMENTS
    own = [
        measure(Shard(folder / record.file).variants, has_posterior=has_posterior)
        for record in index.shards[team.rank :: team.world_size]
    ]
    parts = [part for of_rank in team.gather(own) for part in of_rank if part is not None]
    measured = msgspec.structs.replace(index, statistics=merge(parts))
    team.on_main(lambda: measured.write(folder))
    return measured


def file_problem(folder: Path, record: ShardRecord, index: str) -> str | None:
    """Return how a file differs from its record in an index, None if it does not: reads all of
    it.
    """
    path = folder / record.file
    if not path.is_file():
        return f"{path}: missing"
    is_same = _describe(path, record.count) == record
    return None if is_same else f"{path}: its checksum is not that of {index}"


def _problems(folder: Path, record: ShardRecord) -> Iterator[str]:
    if (problem := file_problem(folder, record, INDEX)) is None:
        return
    yield problem
    if (folder / record.file).is_file():
        try:
            shard = Shard(folder / record.file)
            for row, flip in product(range(len(shard)), range(1 + shard.flipped)):
                shard.record(row, bool(flip))
        except DataError as error:
            yield str(error)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_bytes(tensor: Tensor) -> np.ndarray:
    """Return (n, bytes of a record) uint8, a view."""
    if not tensor.numel():
        return np.empty((len(tensor), 0), np.uint8)
    return tensor.reshape(len(tensor), -1).view(torch.uint8).numpy()
