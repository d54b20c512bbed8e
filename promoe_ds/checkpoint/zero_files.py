"""Where the files of a checkpoint keep parameters, of any ranks, expert parallelism, ZeRO stage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promoe_ds.backends.expert_parallel import expert_file_key
from promoe_ds.checkpoint.manifest import Layout
from promoe_ds.config.optimizer import EMA
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import CheckpointError
from promoe_ds.model.state import buffer_names
from promoe_ds.moe.experts import EXPERT_PARAMETERS

#: The fp32 weights; beside them a checkpoint may hold moving averages and the moments.
WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
MODEL_STATES = "mp_rank_00_model_states.pt"
PREFIX = "denoiser."
#: In the names of the stacked experts' tensors.
ROUTED = ".moe.routed."
#: A key, its first value, and how many.
Piece = tuple[str, int, int]
Open = Callable[[str], Any]


def is_weights(kind: str) -> bool:
    """Whether a kind is a set of weights, raw or averaged; those have the routers' running
    state.
    """
    return kind == WEIGHTS or kind.startswith(EMA)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Where the files keep parameters.

    tensors: kind -> key -> tensor of a file.
    pieces: kind -> parameter -> equal parts of it in order, each of pieces that together are it.
    optimizer_step: updates that the moments have seen.
    """

    shapes: dict[str, tuple[int, ...]]
    tensors: dict[str, dict[str, Tensor]]
    pieces: dict[str, dict[str, list[list[Piece]]]]
    optimizer_step: int | None


def find_slices(open_file: Open, layout: Layout, model: Any, folder: Path) -> Contents:
    """Find parameters in the flat slices of ZeRO's files; the last of each may be padding."""
    prefix = "bf16_" if layout.precision == "bf16" else ""
    files = [
        f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        for rank in range(layout.world_size)
    ]
    shards = [open_file(file)["optimizer_state_dict"] for file in files]
    shapes: dict[str, Any] = {}
    pieces: dict[str, list[list[Piece]]] = {}
    for group, group_shapes in enumerate(model["param_shapes"]):
        maps = [shard["param_slice_mappings"][group] for shard in shards]
        ep_size = layout.world_size // shards[0]["partition_count"][group]
        if left := {name for one in maps for name in one} - group_shapes.keys():
            raise CheckpointError(f"{folder}: {sorted(left)[0]} has values but no shape")
        for key, shape in group_shapes.items():
            name = key.removeprefix(PREFIX)
            shapes[name] = (ep_size * shape[0], *shape[1:]) if ep_size > 1 else tuple(shape)
            pieces[name] = [[] for _ in range(ep_size)]
            for rank, (file, slices) in enumerate(zip(files, maps, strict=True)):
                if key in slices:
                    piece = (f"{file}:{group}", slices[key].start, slices[key].numel)
                    pieces[name][_ep_rank(rank, layout, ep_size)].append(piece)
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for file, shard in zip(files, shards, strict=True):
        states = shard["base_optimizer_state"]["state"]
        for group, flat in enumerate(shard["single_partition_of_fp32_groups"]):
            for kind, value in {WEIGHTS: flat, **states.get(group, {})}.items():
                tensors[kind][f"{file}:{group}"] = value
    steps = tensors.pop("step", {})
    return Contents(
        shapes=shapes,
        tensors=tensors,
        pieces=dict.fromkeys(tensors, pieces),
        optimizer_step=next((int(step) for step in steps.values()), None),
    )


def _ep_rank(rank: int, layout: Layout, ep_size: int) -> int:
    if layout.data_before_expert:
        return rank // (layout.world_size // ep_size)
    return rank % ep_size


def find_tensors(open_file: Open, layout: Layout, model: Any, config: RunConfig) -> Contents:
    """Find parameters whole in the model file; experts in files of their own where sharded."""
    found: dict[str, dict[str, list[tuple[str, Tensor]]]] = defaultdict(lambda: defaultdict(list))
    buffers, files = set(buffer_names(config)), [MODEL_STATES]
    for key, value in model["module"].items():
        if (name := key.removeprefix(PREFIX)) not in buffers:
            found[WEIGHTS][name].append((f"{MODEL_STATES}:{key}", value))
    if is_sharded := layout.dispatch == "deepspeed":
        for name, key, value in _expert_tensors(open_file, config):
            found[WEIGHTS][name].append((key, value))
        files = [f"expp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(layout.ep_size)]
    for file in files:
        for name, state in _named_states(open_file(file).get("optimizer")):
            if file == files[0] or ROUTED in name:
                for kind, value in state.items():
                    found[kind][name].append((f"{file}:{name}", value))
    steps = found.pop("step", {})
    return Contents(
        shapes={
            name: (len(values),) * (is_sharded and ROUTED in name) + tuple(values[0][1].shape)
            for name, values in found[WEIGHTS].items()
        },
        tensors={
            kind: dict(part for values in named.values() for part in values)
            for kind, named in found.items()
        },
        pieces={
            kind: {
                name: [[(key, 0, value.numel())] for key, value in values]
                for name, values in named.items()
            }
            for kind, named in found.items()
        },
        optimizer_step=next((int(values[0][1]) for values in steps.values()), None),
    )


def add_frozen(
    frozen: Collection[str],
    contents: Contents,
    open_file: Open,
    model: Any,
    config: RunConfig,
) -> None:
    """Add parameters that no optimizer knows: their averages are their weights, their moments 0."""
    values = {
        name: [(f"{MODEL_STATES}:{PREFIX}{name}", model["module"][f"{PREFIX}{name}"])]
        for name in frozen
        if f"{PREFIX}{name}" in model["module"]
    }
    for name, key, value in _expert_tensors(open_file, config) if len(values) < len(frozen) else ():
        if name in frozen:
            values.setdefault(name, []).append((key, value))
    for name, parts in values.items():
        is_split = f"{PREFIX}{name}" not in model["module"]
        contents.shapes[name] = (len(parts),) * is_split + tuple(parts[0][1].shape)
        for kind, tensors in contents.tensors.items():
            if name in contents.pieces[kind]:
                continue
            contents.pieces[kind] = {
                **contents.pieces[kind],
                name: [[(key, 0, value.numel())] for key, value in parts],
            }
            for key, value in parts:
                zeros = torch.zeros(1).expand(value.numel())
                tensors[key] = value if is_weights(kind) else zeros


def _expert_tensors(open_file: Open, config: RunConfig) -> Iterator[tuple[str, str, Tensor]]:
    """Yield name, key and tensor of every routed expert's every parameter, expert after expert."""
    for layer, block in enumerate(config.moe_block_indices):
        for expert in range(config.routing.num_experts):
            file = f"layer_{layer}_expert_{expert}_{MODEL_STATES}"
            content = open_file(file)
            for parameter in EXPERT_PARAMETERS[config.routing.expert_type]:
                name = f"blocks.{block}{ROUTED}{parameter}"
                yield (
                    name,
                    f"{file}:{parameter}",
                    content[expert_file_key(f"{PREFIX}{name}", expert)],
                )


def _named_states(optimizer: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for group in (optimizer or {}).get("param_groups", ()):
        for name, index in zip(group["param_names"], group["params"], strict=True):
            if index in optimizer["state"]:
                yield name.removeprefix(PREFIX), optimizer["state"][index]
