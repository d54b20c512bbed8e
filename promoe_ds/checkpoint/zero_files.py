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
#: Keys and tensors that together are one.
_Parts = list[tuple[str, Tensor]]
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
    pieces: kind -> parameter -> the pieces that together are it, in order.
    optimizer_step: updates that the moments have seen.
    """

    shapes: dict[str, tuple[int, ...]]
    tensors: dict[str, dict[str, Tensor]]
    pieces: dict[str, dict[str, list[Piece]]]
    optimizer_step: int | None

    def add(self, kind: str, name: str, parts: _Parts) -> None:
        """Add a parameter whose parts, one behind the other, are whole tensors."""
        self.tensors[kind].update(parts)
        self.pieces[kind][name] = [(key, 0, value.numel()) for key, value in parts]
        if kind == WEIGHTS:
            shape = parts[0][1].shape
            rows = [sum(len(value) for _, value in parts)] if shape else []
            self.shapes[name] = (*rows, *shape[1:])


def find_slices(open_file: Open, layout: Layout, model: Any, folder: Path) -> Contents:
    """Find parameters in the flat slices of ZeRO's files; the last of each may be padding."""
    prefix = "bf16_" if layout.precision == "bf16" else ""
    files = [
        f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        for rank in range(layout.world_size)
    ]
    shards = [open_file(file)["optimizer_state_dict"] for file in files]
    shapes: dict[str, Any] = {}
    pieces: dict[str, list[Piece]] = {}
    for group, group_shapes in enumerate(model["param_shapes"]):
        maps = [shard["param_slice_mappings"][group] for shard in shards]
        ep_size = layout.world_size // shards[0]["partition_count"][group]
        if left := {name for one in maps for name in one} - group_shapes.keys():
            raise CheckpointError(f"{folder}: {sorted(left)[0]} has values but no shape")
        # Ranks that replicate the same experts are behind each other: e apart, or neighbours.
        stride = 1 if layout.data_before_expert else ep_size
        ranks = sorted(range(layout.world_size), key=lambda rank: rank % stride)
        for key, shape in group_shapes.items():
            name = key.removeprefix(PREFIX)
            shapes[name] = (ep_size * shape[0], *shape[1:]) if ep_size > 1 else tuple(shape)
            pieces[name] = [
                (f"{files[rank]}:{group}", maps[rank][key].start, maps[rank][key].numel)
                for rank in ranks
                if key in maps[rank]
            ]
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
        pieces={kind: dict(pieces) for kind in tensors},
        optimizer_step=next((int(step) for step in steps.values()), None),
    )


def find_tensors(open_file: Open, layout: Layout, model: Any, config: RunConfig) -> Contents:
    """Find parameters whole in the model file; experts in files of their own where sharded."""
    found: dict[str, dict[str, _Parts]] = defaultdict(lambda: defaultdict(list))
    found[WEIGHTS] = _whole_weights(open_file, layout, model, config)
    files = [MODEL_STATES]
    if layout.dispatch == "deepspeed":
        files = [f"expp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(layout.ep_size)]
    for file in files:
        for name, state in _named_states(open_file(file).get("optimizer")):
            if file == files[0] or ROUTED in name:
                for kind, value in state.items():
                    found[kind][name].append((f"{file}:{name}", value))
    steps = found.pop("step", {})
    contents = Contents(
        shapes={},
        tensors=defaultdict(dict),
        pieces=defaultdict(dict),
        optimizer_step=next((int(values[0][1]) for values in steps.values()), None),
    )
    for kind, named in found.items():
        for name, parts in named.items():
            contents.add(kind, name, parts)
    return contents


def add_frozen(
    frozen: Collection[str],
    contents: Contents,
    open_file: Open,
    layout: Layout,
    model: Any,
    config: RunConfig,
) -> None:
    """Add parameters that no optimizer knows: their averages are their weights, their moments 0."""
    for name, parts in _whole_weights(open_file, layout, model, config).items():
        zeros = [(key, torch.zeros(1).expand(value.numel())) for key, value in parts]
        for kind, pieces in contents.pieces.items():
            if name in frozen and name not in pieces:
                contents.add(kind, name, parts if is_weights(kind) else zeros)


def _whole_weights(
    open_file: Open, layout: Layout, model: Any, config: RunConfig
) -> dict[str, _Parts]:
    """Return what model and expert files hold of each parameter: it, or expert after expert."""
    weights: dict[str, _Parts] = defaultdict(list)
    buffers = set(buffer_names(config))
    for key, value in model["module"].items():
        if (name := key.removeprefix(PREFIX)) not in buffers:
            weights[name].append((f"{MODEL_STATES}:{key}", value))
    experts = range(config.routing.num_experts) if layout.dispatch == "deepspeed" else ()
    for layer, block in enumerate(config.moe_block_indices):
        for expert in experts:
            file = f"layer_{layer}_expert_{expert}_{MODEL_STATES}"
            content = open_file(file)
            for parameter in EXPERT_PARAMETERS[config.routing.expert_type]:
                name = f"blocks.{block}{ROUTED}{parameter}"
                value = content[expert_file_key(f"{PREFIX}{name}", expert)]
                weights[name].append((f"{file}:{parameter}", value[None]))
    return weights


def _named_states(optimizer: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for group in (optimizer or {}).get("param_groups", ()):
        for name, index in zip(group["param_names"], group["params"], strict=True):
            if index in optimizer["state"]:
                yield name.removeprefix(PREFIX), optimizer["state"][index]
