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
from promoe_ds.errors import CheckpointError, explaining, first_few
from promoe_ds.files import write_json
from promoe_ds.model.build import build_model
from promoe_ds.model.dit import DiT
from promoe_ds.model.shards import ShardReader
from promoe_ds.model.state import POSITIONS, shape_problems, state_shapes

WEIGHTS_STEM = "model"
TRAINING_STEM = "training_state"
CONFIG_FILE = "config.json"
_FORMAT = 1


def write_export_config(folder: Path, config: RunConfig, origin: Mapping[str, Any]) -> None:
    """Write an export's `config.json`: the resolved config and where the weights come from (step,
    ema or raw, versions).
    """
    values = {"format": _FORMAT, "config": config.model_dump(mode="json"), "origin": dict(origin)}
    write_json(folder / CONFIG_FILE, values)


def read_export_config(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Return the config of an export, and where its weights come from.

    Raises: CheckpointError if the folder holds none, or one of a newer version.
    """
    path = folder / CONFIG_FILE
    run = folder if (folder / "checkpoints").is_dir() else "RUN"
    with explaining(
        f"{folder} is no export (promoe-convert {run} EXPORT --to single makes one): {path}"
    ):
        values = json.loads(path.read_text(encoding="utf-8"))
        if (found := values.get("format", _FORMAT)) != _FORMAT:
            raise CheckpointError(
                f"{path}: format {found} is not {_FORMAT}: use the version of promoe_ds that"
                " wrote it"
            )
        origin = dict(values.get("origin", {}))
        config = config_from_dict(values["config"], source=str(path), written_by=writer_of(origin))
    return config, origin


def writer_of(origin: Mapping[str, Any]) -> Any:
    """Return the version of this package that an origin names, None where it names none."""
    return dict(origin.get("versions") or {}).get("promoe_ds")


def open_weights(folder: Path, config: RunConfig) -> ShardReader:
    """Open the weights of an export.

    Raises: CheckpointError naming a tensor or file that is missing or does not fit.
    """
    reader = ShardReader(folder, WEIGHTS_STEM)
    expected = state_shapes(config, own_positions=POSITIONS in reader.shapes)
    if problems := shape_problems(reader.shapes, expected):
        raise CheckpointError(f"{folder}: its weights do not fit its config: {first_few(problems)}")
    return reader


def read_export_state(folder: Path, config: RunConfig) -> dict[str, Tensor]:
    """Return the weights of an export; raises as `open_weights`, or naming a damaged tensor."""
    reader = open_weights(folder, config)
    return {name: reader.read(name) for name in reader.shapes}


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
    config, _ = read_export_config(folder)
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
