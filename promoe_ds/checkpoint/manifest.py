"""A checkpoint is complete or ignored: the manifest, written last, lists every file with size and
checksum.

No torch here: whether a checkpoint can be trusted is decided before any of its tensors is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import xxhash
from msgspec import Meta, Struct

from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.config.loader import with_new_names
from promoe_ds.errors import CheckpointError, explaining
from promoe_ds.run_files import CHECKPOINT_NAME

MANIFEST = "manifest.json"
FORMAT = 2
UNFINISHED = ".tmp"
#: Expert storage of a checkpoint that no training wrote: its ranks say nothing of a run.
CONVERTED = "converted"
#: The file of a run directory that holds the run's id at Weights & Biases.
WANDB_ID = "wandb_run_id"
#: Newer than the format: a manifest without it is taken as it is.
_OWN_CHECKSUM = "xxh3"
Count = Annotated[int, Meta(ge=0)]


class FileRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and XXH3 checksum (64 bits, as 16 hexadecimal digits) of one file."""

    bytes: int
    xxh3: str


class Layout(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the shards of a checkpoint depend on.

    aligned: parameters are in another order than the network's own, those of odd sizes last
        (`is_reordered`); joined: unconditional experts are behind routed ones (`lays_joined`). Both
        are false for checkpoints that do not say it.
    """

    world_size: int
    ep_size: int
    dispatch: str
    zero_stage: int
    precision: str
    data_before_expert: bool = False
    aligned: bool = False
    joined: bool = False

    def __str__(self) -> str:
        return (
            f"{self.world_size} ranks, parallel.ep_size={self.ep_size}, expert storage"
            f" {self.dispatch}, ZeRO {self.zero_stage},"
            f" {self.precision}{', aligned' * self.aligned}{', joined' * self.joined}"
        )


class Manifest(Struct, frozen=True, kw_only=True):
    """The whole of manifest.json.

    averages_since: the step at which a moving average began, of those that began later than
        training.
    wandb_id: of the run at Weights & Biases, "" where it has none.
    dataset_size: samples of the data set, on which their order depends; None where it is not known.
    """

    step: Count
    samples_seen: Count
    layout: Layout
    config: dict[str, Any]
    files: Annotated[dict[str, FileRecord], Meta(min_length=1)]
    versions: dict[str, Any]
    averages_since: dict[str, int] = {}
    dataset_size: Count | None = None
    wandb_id: str = ""

    def run_config(self, folder: Path) -> RunConfig:
        """Return the config of the run that wrote the checkpoint in `folder`.

        Raises: CheckpointError if it cannot be understood, or a newer version wrote it.
        """
        path, version = folder / MANIFEST, self.versions.get("promoe_ds")
        with explaining(f"{path}: cannot be understood"):
            return config_from_dict(self.config, source=str(path), written_by=version)

    def write(self, folder: Path) -> None:
        """Write to `folder`, flushed to the disk, with a checksum of the manifest itself."""
        # torch's version is of a class of its own.
        values = {"format": FORMAT, **msgspec.to_builtins(self, str_keys=True, enc_hook=str)}
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump({**values, _OWN_CHECKSUM: _checksum_of(values)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises: CheckpointError if there is none, it cannot be understood, is damaged, or of another
        step than its folder.
    """
    path = folder / MANIFEST
    with explaining(f"{path}: cannot be understood"):
        if not path.exists():
            raise CheckpointError(f"{folder}: no {MANIFEST}: not a complete checkpoint")
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: format {values['format']} is not {FORMAT}; use the version that wrote it"
            )
        if values.pop(_OWN_CHECKSUM, own := _checksum_of(values)) != own:
            raise CheckpointError(
                f"{path} does not match its own checksum: copy the checkpoint again, or take"
                " another"
            )
        values["config"] = with_new_names(values["config"])[0]
        manifest = msgspec.convert(values, Manifest)
    named = CHECKPOINT_NAME.match(folder.resolve().name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"{path}: says step {manifest.step}, its folder's name another")
    for name in manifest.files:
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path}: the file name {name!r} leaves the checkpoint's folder")
    return manifest


def find_problems(
    folder: Path, files: dict[str, FileRecord], *, sizes_only: bool = False
) -> list[str]:
    """Compare files with their records; return a line for each that differs or cannot be read.

    Args:
        files: the whole manifest's or a share of it.
        sizes_only: leave the checksums out.
    """
    problems = []
    for name, record in files.items():
        path = folder / name
        try:
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif path.stat().st_size != record.bytes:
                problems.append(f"{path} has {path.stat().st_size} bytes instead of {record.bytes}")
            elif not sizes_only and checksum(path) != record.xxh3:
                problems.append(f"{path} does not match its checksum")
        except OSError as error:
            problems.append(f"{path} cannot be read: {error}")
    return problems


def checksum(path: Path) -> str:
    """Return the XXH3 checksum of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def manifest_checksum(folder: Path) -> str:
    """Return the checksum of a checkpoint's manifest, which tells it from all others."""
    return f"xxh3_64:{checksum(folder / MANIFEST)}"


def step_folder(step: int) -> str:
    """Return the name of a step's checkpoint folder."""
    return f"step_{step:07d}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint folder, read off its name."""
    return int(CHECKPOINT_NAME.match(folder.name)[1])


def list_checkpoints(root: Path) -> list[Path]:
    """Return the finished checkpoint folders under `root`, newest first, whether sound or not."""
    found = root.iterdir() if root.is_dir() else ()
    folders = [path for path in found if CHECKPOINT_NAME.match(path.name) and path.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def named_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints that a user's path names: itself alone, that of a file `latest`, or
    all of a run, newest first.

    Raises: CheckpointError if there is none. Whether they are sound is another question.
    """
    if path.is_file():
        with explaining(f"{path}: cannot be read"):
            name = path.read_bytes()[:64].decode(errors="replace").strip()
        if CHECKPOINT_NAME.match(name):
            return [path.parent / name]
        raise CheckpointError(
            f"{path}: is a file and does not name a checkpoint, as RUN/checkpoints/latest does:"
            " give a checkpoint's folder or a run directory"
        )
    if (path / MANIFEST).is_file():
        return [path]
    candidates = list_checkpoints(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if not candidates:
        raise CheckpointError(
            f"{path}: neither a complete checkpoint (no {MANIFEST}) nor a run directory with one"
        )
    return candidates


def read_wandb_id(run_dir: Path) -> str:
    """Return the id of a run at Weights & Biases, "" before it has one."""
    text = ""
    with suppress(OSError):
        text = (run_dir / WANDB_ID).read_bytes().decode(errors="replace").strip()
    return text if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text) else ""


def list_unfinished(root: Path) -> list[Path]:
    """Return the leftovers of saves that never ended."""
    return sorted(root.glob(f"step_*{UNFINISHED}"))


def _checksum_of(values: dict[str, Any]) -> str:
    """Return the XXH3 of a manifest's fields, whatever the white space between them and their
    order.
    """
    content = {name: value for name, value in values.items() if name != _OWN_CHECKSUM}
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
