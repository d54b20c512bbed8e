"""One shard of packed latents: a safetensors file, mapped, each record under its own checksum.

Tensors: `latents` or `moments` (n, C, H, W) and, where there are mirrored twins, `latents_flip` or
`moments_flip`; `labels` (n,); written by this package also `checksums` (n, 1 or 2), the xxh3_64 of
each record's bytes as int64, and `names`, the records' sources, joined by line feeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from promoe_ds.data.dataset import first_not_finite
from promoe_ds.data.index import INDEX, LatentIndex, ShardRecord, read_index
from promoe_ds.data.reading import reading, shown
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import DataError
from promoe_ds.file_kind import SAFETENSORS
from promoe_ds.files import replacing

KINDS = ("latents", "moments")
_FLIP = "_flip"
_CHUNK_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class ShardContent:
    """What goes into a shard: records (n, C, H, W), their mirrored twins if any, labels (n,), names
    of their sources.
    """

    kind: str
    records: Tensor
    flipped: Tensor | None
    labels: Tensor
    names: list[str]


class Shard:
    """An open shard; records stay on disk until they are taken."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises: DataError naming a file that is no shard, or whose latents are no floats.
        """
        self.path = path
        with reading(path, "latent shard", kind=SAFETENSORS):
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys())
                self.kind = next((kind for kind in KINDS if kind in keys), KINDS[0])
                variants = [
                    file.get_tensor(name)
                    for name in (self.kind, self.kind + _FLIP)
                    if name in keys or name in KINDS
                ]
                self.labels = file.get_tensor("labels")
                checksums = (
                    file.get_tensor("checksums").numpy().view(np.uint64)
                    if "checksums" in keys
                    else None
                )
            self.dtype, self.shape, self.flipped = (
                variants[0].dtype,
                tuple(variants[0].shape),
                len(variants) > 1,
            )
            if not self.dtype.is_floating_point:
                raise DataError(
                    f"{path}: {self.kind} are {_name(self.dtype)}, expected floats: if they are"
                    " quantised, store the floats that they encode"
                )
            if self.flipped and (variants[1].shape, variants[1].dtype) != (
                variants[0].shape,
                variants[0].dtype,
            ):
                raise DataError(
                    f"{path}: {self.kind}{_FLIP} {tuple(variants[1].shape)}"
                    f" {_name(variants[1].dtype)} does not fit {self.kind} {self.shape}"
                    f" {_name(self.dtype)}: store both in one shape and type"
                )
            # As bytes: numpy knows no bfloat16, and copies rows several times faster than torch.
            self._bytes = [_as_bytes(variant) for variant in variants]
        self._checksums = checksums
        if checksums is not None and checksums.shape != (self.shape[0], len(variants)):
            raise DataError(
                f"{path}: checksums {checksums.shape} do not fit {self.shape[0]} records of"
                f" {len(variants)}"
            )

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def checked(self) -> bool:
        """Whether its records have checksums."""
        return self._checksums is not None

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return self._bytes[0].shape[1]

    def copy_record(self, row: int, flip: bool, out: np.ndarray) -> None:
        """Copy the bytes of a record into `out`.

        Raises: DataError naming a record that is not what was written.
        """
        record = self._bytes[int(flip)][row]
        if (
            self._checksums is not None
            and xxhash.xxh3_64_intdigest(record) != self._checksums[row, int(flip)]
        ):
            raise DataError(
                f"{self.path}: record {row} ({self.name(row)}){', mirrored,' if flip else ''} is"
                " damaged: its checksum does not match; encode this shard anew"
            )
        out[:] = record

    def name(self, row: int) -> str:
        """Return the source of a record, as far as the shard knows."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor("names").numpy().tobytes().decode().split("\n")[row]
        except Exception:  # names serve messages alone
            return "of unknown source"


def write_shard(path: Path, content: ShardContent) -> ShardRecord:
    """Write a shard, in one move, and return its entry in the index.

    Raises: DataError naming a record that is not finite.
    """
    variants = [
        content.records.contiguous(),
        *([content.flipped.contiguous()] if content.flipped is not None else []),
    ]
    for variant in variants:
        if (bad := first_not_finite(variant)) is not None:
            raise DataError(
                f"{shown(content.names[bad])}: its latent is not finite as {_name(variant.dtype)}:"
                " store or compute in a wider type"
            )
    digests = np.array(
        [[xxhash.xxh3_64_intdigest(row) for row in _as_bytes(variant)] for variant in variants],
        dtype=np.uint64,
    )
    tensors = {
        content.kind: variants[0],
        "labels": content.labels,
        "checksums": torch.from_numpy(digests.reshape(len(variants), -1).T.copy().view(np.int64)),
        "names": torch.frombuffer(
            bytearray("\n".join(map(shown, content.names)).encode() or b"\n"), dtype=torch.uint8
        ),
    }
    if len(variants) > 1:
        tensors[content.kind + _FLIP] = variants[1]
    with replacing(path) as temporary:
        save_file(tensors, temporary)
        return describe_shard(temporary, len(content.labels), name=path.name)


def describe_shard(path: Path, count: int, *, name: str) -> ShardRecord:
    """Return a shard's entry in the index: reads the whole file."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return ShardRecord(
        file=name, count=count, bytes=path.stat().st_size, checksum=digest.hexdigest()
    )


def verify(folder: Path, team: DistributedContext) -> LatentIndex:
    """Read every shard of a finished folder and hold it against the index, each rank a share of
    them.

    Raises: DataError naming the shards, and the first records, that are not what was written.
    """
    index = read_index(folder)
    if index is None:
        raise DataError(f"{folder}: no {INDEX} there: nothing to verify against")
    problems = [
        problem
        for record in index.shards[team.rank :: team.world_size]
        for problem in _problems(folder, record)
    ]
    if problems := [problem for found in team.gather(problems) for problem in found]:
        raise DataError(
            "; ".join(problems[:5])
            + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        )
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_bytes(tensor: Tensor) -> np.ndarray:
    """Return (n, bytes of a record) uint8, a view."""
    return (
        tensor.reshape(len(tensor), -1).view(torch.uint8).numpy()
        if tensor.numel()
        else np.empty((len(tensor), 0), np.uint8)
    )
