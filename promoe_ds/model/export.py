"""The single export: a folder with `config.json` and weights that one GPU or CPU loads, without
deepspeed.

The weights are `model.safetensors`, or several such files with an index where they are large. An
export may also keep the state of training (`training_state.safetensors`), which nothing but
conversion reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promoe_ds.config import config_from_dict
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import CheckpointError, ConfigError, cause_of
from promoe_ds.files import write_json
from promoe_ds.model.build import build_model
from promoe_ds.model.dit import DiT
from promoe_ds.model.shards import ShardReader, ShardWriter
from promoe_ds.model.state import POSITIONS, check_state

WEIGHTS_STEM = "model"
TRAINING_STEM = "training_state"
CONFIG_FILE = "config.json"
_FORMAT = 1


def save_export(
    folder: Path, state: Mapping[str, Tensor], config: RunConfig, origin: Mapping[str, Any]
) -> None:
    """Write an export.

    Args:
        state: rank-blind names; its keys and shapes must be exactly those of the config's model.
        origin: where the weights come from (step, ema or raw, versions), kept in config.json.
    Raises: CheckpointError naming a missing, left-over or misshapen tensor, or the file that cannot
    be written.
    """
    check_state(state, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writer = ShardWriter(folder, WEIGHTS_STEM)
        for name, value in state.items():
            writer.write(name, value)
        writer.close()
        write_export_config(folder, config, origin)
    except OSError as error:
        raise CheckpointError(f"{folder}: the export could not be written: {error}") from None


def write_export_config(folder: Path, config: RunConfig, origin: Mapping[str, Any]) -> None:
    """Write an export's `config.json`: the resolved config and where the weights come from."""
    values = {"format": _FORMAT, "config": config.model_dump(mode="json"), "origin": dict(origin)}
    write_json(folder / CONFIG_FILE, values)


def read_export_config(folder: Path) -> RunConfig:
    """Return the config of an export.

    Raises: CheckpointError if the folder holds none, or one of a newer version.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (found := values.get("format", _FORMAT)) != _FORMAT:
            raise CheckpointError(
                f"{path}: format {found} is not {_FORMAT}: use the version of promoe_ds that"
                " wrote it"
            )
        return config_from_dict(
            values["config"], source=str(path), written_by=writer_of(values.get("origin"))
        )
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        is_run = (folder / "checkpoints").is_dir()
        run = folder if is_run else "RUN"
        hint = f"{'. It is a run' * is_run}: promoe-convert {run} EXPORT --to single makes one"
        raise CheckpointError(f"{folder} is no export: {path} ({cause_of(error)}){hint}") from None


def writer_of(origin: Any) -> Any:
    """Return the version of this package that an origin names, None where it names none."""
    versions = origin.get("versions") if isinstance(origin, dict) else None
    return versions.get("promoe_ds") if isinstance(versions, dict) else None


def read_export_origin(folder: Path) -> dict[str, Any]:
    """Return where an export's weights come from, as `save_export` was given it; call after
    `read_export_config`.

    Raises: CheckpointError if that cannot be understood.
    """
    origin = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("origin", {})
    if not isinstance(origin, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE}: origin={origin!r} is no object")
    return origin


def read_export_state(folder: Path, config: RunConfig) -> dict[str, Tensor]:
    """Return the weights of an export.

    Raises: CheckpointError naming a tensor or file that is missing or does not fit.
    """
    state = dict(ShardReader(folder, WEIGHTS_STEM).items())
    check_state(state, config)
    return state


def load_model(
    export_dir: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> DiT:
    """Load an export in evaluation mode.

    Args:
        export_dir: folder written by `promoe-convert --to single`.
        device: where the module goes.
        dtype: of the weights; as stored (fp32) if left out.
    Returns: the network; `module(latents_BZHW, timestep_B, labels_B)` returns (B, out_channels, H,
        W). Timesteps run from 0 (data) to `diffusion.num_train_timesteps` (noise; 1000): sigma
        times that number. Labels are classes, `num_classes` is none.
    Raises: CheckpointError naming what is missing or does not fit.
    """
    folder = Path(export_dir)
    config = read_export_config(folder)
    state = read_export_state(folder, config)
    with torch.device("meta"):
        network = build_model(config)
    return fill_network(network, state).to(device=device, dtype=dtype)


def fill_network(network: DiT, state: Mapping[str, Tensor]) -> DiT:
    """Give a network that was built on the meta device its tensors, which become its own; return it
    in evaluation mode.
    """
    network.load_state_dict(state, assign=True)
    if POSITIONS not in state:
        network.positions = torch.empty(network.positions.shape)
        network.reset_positions()
    return network.requires_grad_(False).eval()
