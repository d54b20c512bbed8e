"""The index of a folder of packed latents: `index.json`.

It says what is there and what it belongs to: records and checksum of each shard, classes, the
autoencoder, the resolution, and which images were skipped. The format is documented in
docs/imagenet.md.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from promoe_ds.config.schema import RunConfig
from promoe_ds.config.section import name_and_message
from promoe_ds.data.reading import reading
from promoe_ds.data.trees import check_classes
from promoe_ds.data.vae import Vae, VaeIdentity
from promoe_ds.errors import DataError
from promoe_ds.files import write_json
from promoe_ds.logs import get_logger, rank_from_environment

_LOG = get_logger("data")

INDEX = "index.json"
#: What an encoding under way keeps beside its shards; the index, written last, replaces it.
UNFINISHED = "encoding.json"
FORMAT = "promoe_ds.latents/1"
_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard: `checksum` is the xxh3_64 of the whole file, in hexadecimal."""

    file: str
    count: int
    bytes: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class LatentIndex:
    """What `index.json` says.

    `encoding` is what else two calls that fill one folder must share: number and checksum of the
    source's file names, images a shard, type of the autoencoder's computation.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: str
    shape: tuple[int, int, int]
    dtype: str
    flipped: bool
    image_size: int | None
    vae: VaeIdentity | None
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    shards: tuple[ShardRecord, ...]
    skipped: tuple[str, ...] = ()
    encoding: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Records in all."""
        return sum(shard.count for shard in self.shards)

    @property
    def latent_channels(self) -> int:
        """Z: half the moments' channels."""
        return self.shape[0] // 2 if self.kind == "moments" else self.shape[0]

    def write(self, folder: Path) -> None:
        """Write `index.json`, in one move."""
        values = {"format": FORMAT, "count": self.count, **asdict(self)}
        write_json(folder / INDEX, values)


def read_index(folder: Path) -> LatentIndex | None:
    """Return a folder's index, None where there is none.

    Raises: DataError naming the file that cannot be understood.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    with reading(path, "index of latents"):
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        count = values.pop("count")
        try:
            index = TypeAdapter(LatentIndex).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            raise ValueError(": ".join(name_and_message(error.errors()[0]))) from None
        if index.count != count or not isinstance(count, int):
            raise ValueError(f"count is {count}, its shards hold {index.count}")
    for shard in index.shards:
        if Path(shard.file).name != shard.file or shard.file in ("", ".", ".."):
            raise DataError(f"{path}: the file name {shard.file!r} leaves the folder")
    return index


def check_index(index: LatentIndex, folder: Path, config: RunConfig) -> None:
    """Hold what the latents belong to against the recipe.

    Raises: DataError naming both sides: another resolution, scale, number of classes, or
    autoencoder.
    """
    model, data, path = config.model, config.data, folder / INDEX
    found, wanted = (
        (index.latent_channels, *index.shape[1:]),
        (model.in_channels, model.input_size, model.input_size),
    )
    if found != wanted:
        size = f", from images of {index.image_size} pixels" if index.image_size else ""
        raise DataError(
            f"{path}: latents are {_shape(found)}{size}, the recipe's model.in_channels and"
            f" model.input_size say {_shape(wanted)}: encode at that size, or change the recipe"
        )
    check_classes(path, len(index.classes), model.num_classes)
    if index.vae is None:
        if data.vae is not None:
            raise DataError(
                f"{path}: does not say which autoencoder the latents come from, the recipe wants"
                f" data.vae={data.vae}: pack them anew with --vae-name"
            )
        return
    check_scale(index.vae, config, f"{path}: ")
    if data.vae is not None and not _is_meant(index.vae, data.vae):
        weights = index.vae.fingerprint or "weights unknown"
        raise DataError(
            f"{path}: the latents were encoded by {index.vae.name} ({weights}), the recipe wants "
            f"data.vae={data.vae}: encode them anew, or set data.vae to the one that they come from"
        )


def check_scale(vae: VaeIdentity, config: RunConfig, where: str = "") -> None:
    """Hold an autoencoder's scale, if known, against the recipe's.

    Raises: DataError naming both.
    """
    scale = config.data.latent_scale
    if vae.scaling_factor is not None and abs(vae.scaling_factor - scale) > _TOLERANCE:
        raise DataError(
            f"{where}{vae.name} scales its latents by {vae.scaling_factor}, but"
            f" data.latent_scale={scale}"
        )


def trust_vae(where: Path, config: RunConfig) -> None:
    """Warn, by rank 0, that latents without an index cannot show that they come from the recipe's
    autoencoder.
    """
    if config.data.vae is not None and rank_from_environment() == 0:
        _LOG.warning(
            "%s: nothing there says which autoencoder the latents come from; that it is data.vae=%s"
            " is taken on trust",
            where,
            config.data.vae,
        )


def _is_meant(identity: VaeIdentity, wanted: str) -> bool:
    if identity.is_called(wanted):
        return True
    # A copy in a folder of another name is the same autoencoder if its weights are.
    return Path(wanted).is_dir() and Vae(wanted).identity.fingerprint == identity.fingerprint


def _shape(shape: tuple[Any, ...]) -> str:
    return " x ".join(map(str, shape))
