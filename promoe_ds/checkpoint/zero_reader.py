"""Whole tensors from a sharded checkpoint: one process, no GPU, no engine, one tensor in memory.

Under ZeRO 1 and 2 each rank's file holds flat fp32 slices of the parameters it owns (masters,
moments, moving averages) and a map from names to slices. Dense parameters are cut over all ranks; a
routed expert's over the ranks that replicate it. Without ZeRO the values are whole in the model and
optimizer files. Either way the result has the rank-blind model's names, experts stacked in the
order of their global ids. Every value that the files hold must be read exactly once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promoe_ds.backends.expert_parallel import expert_file_key
from promoe_ds.checkpoint.coverage import Coverage
from promoe_ds.checkpoint.manifest import MANIFEST, Layout, Manifest
from promoe_ds.checkpoint.torch_file import copy_range, copy_tensor, load_torch
from promoe_ds.config.optimizer import EMA
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import CheckpointError, explaining, first_few
from promoe_ds.model.state import buffer_names, shape_problems, state_shapes
from promoe_ds.moe.experts import EXPERT_PARAMETERS

#: The fp32 weights; beside them a checkpoint may hold moving averages and the moments.
WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
MODEL_STATES = "mp_rank_00_model_states.pt"
PREFIX = "denoiser."
#: In the names of the stacked experts' tensors.
ROUTED = ".moe.routed."
#: A key, its first value, and how many.
_Piece = tuple[str, int, int]
_Open = Callable[[str], Any]


def check_progress(content: dict[str, Any], folder: Path, manifest: Manifest) -> None:
    """Compare DeepSpeed's own count of steps and samples, where there is one, with the manifest's.

    Raises: CheckpointError naming both.
    """
    expected = {"global_steps": manifest.step, "global_samples": manifest.samples_seen}
    for key, count in expected.items():
        if (found := content.get(key, count)) != count:
            raise CheckpointError(
                f"{folder}: {MANIFEST} says {count} where {MODEL_STATES} has {key}={found}: one of "
                "them is damaged"
            )


def is_weights(kind: str) -> bool:
    """Whether a kind is a set of weights, raw or averaged; those have the routers' running
    state.
    """
    return kind == WEIGHTS or kind.startswith(EMA)


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """Where the files keep parameters.

    tensors: kind -> key -> tensor of a file.
    pieces: kind -> parameter -> equal parts of it in order, each of pieces that together are it.
    optimizer_step: updates that the moments have seen.
    """

    shapes: dict[str, tuple[int, ...]]
    tensors: dict[str, dict[str, Tensor]]
    pieces: dict[str, dict[str, list[list[_Piece]]]]
    optimizer_step: int | None


class ShardedCheckpoint:
    """A checkpoint as training wrote it, of any ranks, expert parallelism, ZeRO stage, precision.

    kinds: what it holds, of "weights", averages by name, "exp_avg", "exp_avg_sq", each with the
        rank-blind names that it has: parameters, and for weights the routers' running state.
    shapes: every parameter's and buffer's whole shape, by name.
    buffers: the routers' running state, in the files' own memory.
    optimizer_step: the updates that the moments have seen; None where there are none.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Map the files; no value is read yet.

        Args:
            folder: a checkpoint that was verified; manifest: its manifest.
        Raises: CheckpointError naming the file that is missing or damaged, or what does not fit the
            manifest.
        """

        def open_file(name: str) -> Any:
            if name not in manifest.files:
                raise CheckpointError(
                    f"{folder / MANIFEST}: does not list {name}, which its layout needs"
                )
            return load_torch(folder / name, is_mapped=True)

        self.folder = folder
        config, layout = manifest.run_config(folder), manifest.layout
        model = open_file(MODEL_STATES)
        with explaining(f"{folder}: its files are not what {MANIFEST} says of them, {layout}"):
            check_progress(model, folder, manifest)
            if layout.zero_stage > 0:
                contents = _find_slices(open_file, layout, model, folder)
            else:
                contents = _find_tensors(open_file, layout, model, config)
            self.buffers = {
                name: model["module"][f"{PREFIX}{name}"] for name in buffer_names(config)
            }
            self._tensors = contents.tensors
            self._pieces = {
                kind: {
                    name: self._joined(pieces.get(name, [[]]), shape, f"{name} ({kind})")
                    for name, shape in contents.shapes.items()
                }
                for kind, pieces in contents.pieces.items()
            }
            self.shapes = contents.shapes | {
                name: tuple(value.shape) for name, value in self.buffers.items()
            }
        if problems := shape_problems(self.shapes, state_shapes(config)):
            raise CheckpointError(
                f"{folder}: its files do not fit the config in {MANIFEST}: {first_few(problems)}"
            )
        self.kinds = {
            kind: [*contents.shapes, *(self.buffers if is_weights(kind) else ())]
            for kind in self._tensors
        }
        self.optimizer_step = contents.optimizer_step
        self._coverage = {
            kind: Coverage(
                f"{folder}, {kind}", {key: value.numel() for key, value in tensors.items()}
            )
            for kind, tensors in self._tensors.items()
        }

    def move_experts(self, sources: Mapping[str, list[int]]) -> None:
        """Read tensors of experts in another order from now on.

        Args:
            sources: name of such a tensor -> where each place's expert is in the checkpoint.
        """
        for name, places in sources.items():
            if name in self.buffers:
                self.buffers[name] = copy_tensor(self.buffers[name])[places]
                continue
            size = math.prod(self.shapes[name][1:])
            for pieces in self._pieces.values():
                pieces[name] = [
                    piece for place in places for piece in _cut(pieces[name], place * size, size)
                ]

    def read(self, kind: str, name: str) -> Tensor:
        """Return one whole tensor, fp32, in memory of its own.

        Raises: CheckpointError naming the file or tensor that is missing or does not fit.
        """
        if name in self.buffers:
            return copy_tensor(self.buffers[name]).float()
        out = torch.empty(self.shapes[name])
        self.read_into(out.view(-1), kind, name, 0)
        return out

    def read_into(self, out_N: Tensor, kind: str, name: str, start: int) -> None:
        """Fill a flat fp32 tensor with the values [start, start + N) of a whole parameter.

        Raises: CheckpointError naming the file or tensor that is missing or does not fit.
        """
        if name not in self._pieces.get(kind, {}):
            raise CheckpointError(
                f"{self.folder}: holds no {kind} of {name}, only {', '.join(self.kinds)}"
            )
        position = 0
        for key, first, count in _cut(self._pieces[kind][name], start, out_N.numel()):
            with explaining(f"{self.folder / key}: {kind} of {name} does not fit"):
                out = out_N[position : position + count]
                copy_range(out, self._tensors[kind][key], first)
            self._coverage[kind].add(key, first, first + count)
            position += count

    def check(self, kind: str) -> int:
        """Return how many values of `kind` were read; every value must be, exactly once.

        Raises: CheckpointError naming what was not read, or read twice.
        """

        def is_padding(key: str, start: int, stop: int) -> bool:
            return not self._tensors[kind][key].view(-1)[start:stop].any()

        return self._coverage[kind].check(is_padding)

    def _joined(self, parts: list[list[_Piece]], shape: tuple[int, ...], name: str) -> list[_Piece]:
        """Return the pieces of a parameter's equal parts, each of which must be whole."""
        expected = math.prod(shape)
        for part in parts:
            if (found := len(parts) * sum(count for *_, count in part)) != expected:
                raise CheckpointError(
                    f"{self.folder}: the files hold {found} of {expected} values of {name}"
                )
        return [piece for part in parts for piece in part]


def _cut(pieces: list[_Piece], start: int, count: int) -> Iterator[_Piece]:
    """Yield the pieces of the values [start, start + count) of what `pieces` are together."""
    position, stop = 0, start + count
    for key, first, size in pieces:
        low, high = max(start, position), min(stop, position + size)
        if low < high:
            yield key, first + low - position, high - low
        position += size


def _find_slices(open_file: _Open, layout: Layout, model: Any, folder: Path) -> _Contents:
    """Find parameters in the flat slices of ZeRO's files; the last of each may be padding."""
    prefix = "bf16_" if layout.precision == "bf16" else ""
    files = [
        f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        for rank in range(layout.world_size)
    ]
    shards = [open_file(file)["optimizer_state_dict"] for file in files]
    shapes: dict[str, Any] = {}
    pieces: dict[str, list[list[_Piece]]] = {}
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
    return _Contents(
        shapes=shapes,
        tensors=tensors,
        pieces=dict.fromkeys(tensors, pieces),
        optimizer_step=next((int(step) for step in steps.values()), None),
    )


def _ep_rank(rank: int, layout: Layout, ep_size: int) -> int:
    if layout.data_before_expert:
        return rank // (layout.world_size // ep_size)
    return rank % ep_size


def _find_tensors(open_file: _Open, layout: Layout, model: Any, config: RunConfig) -> _Contents:
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
    return _Contents(
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


def _expert_tensors(open_file: _Open, config: RunConfig) -> Iterator[tuple[str, str, Tensor]]:
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
