"""Whole tensors from a sharded checkpoint: one process, no GPU, no engine.

Under ZeRO 1 and 2 each rank's file holds flat fp32 slices of the parameters it owns (masters, moments, moving average)
and a map from names to slices. Dense parameters are cut over all ranks; a routed expert's over the ranks that replicate
it. Without ZeRO the values lie whole in the model and optimizer files. Either way the result carries the rank-blind
model's names, experts stacked in the order of their global ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promoe_ds.config import config_from_dict
from promoe_ds.engine.adapter import expert_file_key
from promoe_ds.engine.manifest import MANIFEST, Layout, Manifest
from promoe_ds.engine.optimizer import EMA
from promoe_ds.engine.storage import load_trusted
from promoe_ds.errors import CheckpointError
from promoe_ds.model.state import buffer_names
from promoe_ds.moe.experts import EXPERT_PARAMETERS

#: What can be asked for: fp32 weights, their moving average, AdamW's moments.
WEIGHTS = "weights"
KINDS = (WEIGHTS, EMA, "exp_avg", "exp_avg_sq")
_PREFIX = "denoiser."


def reconstruct(folder: Path, manifest: Manifest, kind: str) -> dict[str, Tensor]:
    """Assemble every parameter's fp32 value of `kind`; weights of either kind come with the routers' running state.

    Args:
        folder: a sound checkpoint; manifest: its manifest.
        kind: one of KINDS.
    Returns: rank-blind name -> tensor.
    Raises: CheckpointError naming the file or tensor that is missing or does not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    model_states = load_trusted(folder / "mp_rank_00_model_states.pt", mmap=True)
    if manifest.layout.zero_stage > 0:
        pieces = _from_zero_shards(folder, manifest.layout, model_states, kind)
    elif kind == WEIGHTS:
        pieces = _from_module_files(folder, manifest, model_states)
    else:
        pieces = _from_optimizer_files(folder, manifest.layout, model_states, kind)
    result = {name.removeprefix(_PREFIX): value for name, value in pieces}
    if kind in (WEIGHTS, EMA):
        result |= _routers_state(folder, manifest, model_states)
    if not result:
        raise CheckpointError(f"{folder}: holds no parameter")
    return result


def _from_zero_shards(folder: Path, layout: Layout, model_states: dict[str, Any], kind: str) -> Iterator[tuple[str, Tensor]]:
    prefix = "bf16_" if layout.precision == "bf16" else ""
    shards = [load_trusted(folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", mmap=True)["optimizer_state_dict"]
              for rank in range(layout.world_size)]
    for group, shapes in enumerate(model_states["param_shapes"]):
        flats = [_flat_values(shard, group, kind, folder) for shard in shards]
        slices = [shard["param_slice_mappings"][group] for shard in shards]
        ep_size = layout.world_size // shards[0]["partition_count"][group]
        for name, shape in shapes.items():
            parts = []
            for ep_rank in range(ep_size):
                owners = [rank for rank in range(layout.world_size) if _ep_rank(rank, layout, ep_size) == ep_rank]
                fragments = [flats[rank][part.start:part.start + part.numel] for rank in owners
                             if (part := slices[rank].get(name)) is not None]
                value = torch.cat(fragments) if fragments else torch.empty(0)
                if value.numel() != math.prod(shape):
                    raise CheckpointError(f"{folder}: the shards hold {value.numel()} of {math.prod(shape)} values of {name}")
                parts.append(value.view(shape))
            yield name, torch.cat(parts) if ep_size > 1 else parts[0]


def _routers_state(folder: Path, manifest: Manifest, model_states: dict[str, Any]) -> dict[str, Tensor]:
    config = config_from_dict(manifest.config, source=str(folder / MANIFEST))
    try:
        return {name: model_states["module"][f"{_PREFIX}{name}"] for name in buffer_names(config)}
    except KeyError as error:
        raise CheckpointError(f"{folder}: holds no {error.args[0]}") from None


def _flat_values(shard: dict[str, Any], group: int, kind: str, folder: Path) -> Tensor:
    if kind == WEIGHTS:
        return shard["single_partition_of_fp32_groups"][group]
    state = shard["base_optimizer_state"]["state"].get(group, {})
    if kind not in state:
        raise CheckpointError(f"{folder}: the optimizer state holds no {kind}")
    return state[kind]


def _ep_rank(rank: int, layout: Layout, ep_size: int) -> int:
    return rank // (layout.world_size // ep_size) if layout.data_before_expert else rank % ep_size


def _from_module_files(folder: Path, manifest: Manifest, model_states: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in model_states["module"].items():
        yield name, value
    if manifest.layout.dispatch == "local":
        return
    config = config_from_dict(manifest.config, source=str(folder / MANIFEST))
    for layer, block in enumerate(config.moe_block_indices):
        files = [load_trusted(folder / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt", mmap=True)
                 for expert in range(config.routing.num_experts)]
        for parameter in EXPERT_PARAMETERS[config.routing.expert_type]:
            name = f"{_PREFIX}blocks.{block}.moe.routed.{parameter}"
            yield name, torch.stack([file[expert_file_key(name, expert)] for expert, file in enumerate(files)])


def _from_optimizer_files(folder: Path, layout: Layout, model_states: dict[str, Any],
                          kind: str) -> Iterator[tuple[str, Tensor]]:
    if layout.dispatch == "local":
        optimizers = [model_states["optimizer"]]
    else:
        optimizers = [load_trusted(folder / f"expp_rank_{rank}_mp_rank_00_optim_states.pt", mmap=True)["optimizer"]
                      for rank in range(layout.ep_size)]
    values = [dict(_named_states(optimizer, kind)) for optimizer in optimizers]
    for name, value in values[0].items():
        is_sharded = layout.dispatch != "local" and ".moe.routed." in name
        yield name, torch.cat([rank_values[name] for rank_values in values]) if is_sharded else value


def _named_states(optimizer: dict[str, Any], kind: str) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer["param_groups"]:
        for name, index in zip(group["param_names"], group["params"], strict=True):
            yield name, optimizer["state"][index][kind]
