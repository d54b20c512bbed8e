"""From a sharded checkpoint to a single export, verified at both ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from promoe_ds.config import config_from_dict
from promoe_ds.engine.manifest import MANIFEST, find_checkpoint, find_problems, read_manifest
from promoe_ds.engine.optimizer import EMA
from promoe_ds.engine.reconstruct import WEIGHTS, ShardedCheckpoint
from promoe_ds.errors import CheckpointError
from promoe_ds.model.export import CONFIG_FILE, WEIGHTS_FILE, save_export


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was converted."""

    source: Path
    step: int
    parameters: int


def convert_to_single(source: Path, destination: Path, *, weights: str = "ema") -> Conversion:
    """Write a single export of a checkpoint.

    Args:
        source: a checkpoint folder, or a run directory or its `checkpoints` folder: then its newest.
        destination: folder to write.
        weights: "ema" or "raw".
    Raises: CheckpointError naming the file that is missing or damaged, or the tensor that does not fit.
    """
    if (destination / CONFIG_FILE).exists():
        raise CheckpointError(f"{destination} already holds an export: choose another folder or remove it")
    folder = find_checkpoint(source)
    _require_sound(folder)
    manifest = read_manifest(folder)
    config = config_from_dict(manifest.config, source=str(folder / MANIFEST))
    kind, checkpoint = EMA if weights == "ema" else WEIGHTS, ShardedCheckpoint(folder, manifest)
    state = {name: checkpoint.read(kind, name) for name in checkpoint.names(kind)}
    checkpoint.check(kind)
    origin = {"step": manifest.step, "weights": weights, "layout": str(manifest.layout), "versions": manifest.versions}
    save_export(destination, state, config, origin)
    written = load_file(destination / WEIGHTS_FILE)
    for name, value in state.items():
        if not torch.equal(written[name], value):
            raise CheckpointError(f"{destination / WEIGHTS_FILE}: {name} reads back differently: the disk is not to be trusted")
    return Conversion(source=folder, step=manifest.step, parameters=sum(value.numel() for value in state.values()))


def _require_sound(folder: Path) -> None:
    if problems := find_problems(folder, read_manifest(folder).files):
        raise CheckpointError(f"{folder}: {'; '.join(problems)}")
