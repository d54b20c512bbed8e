"""Whole tensors from a sharded checkpoint: one process, no GPU, no engine, one tensor in memory.

Under ZeRO 1 and 2 each rank's file holds flat fp32 slices of the parameters it owns (masters,
moments, moving averages) and a map from names to slices. Dense parameters are cut over all ranks; a
routed expert's over the ranks that replicate it. Without ZeRO the values are whole in the model and
optimizer files. Either way the result has the rank-blind model's names, experts stacked in the
order of their global ids. Every value that the files hold must be read exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promoe_ds.backends.expert_parallel import expert_file_key
from promoe_ds.checkpoint.coverage import Coverage
from promoe_ds.checkpoint.engine import ALLOWED_RECORDS
from promoe_ds.checkpoint.manifest import MANIFEST, Layout, Manifest
from promoe_ds.checkpoint.torch_file import copy_range, copy_tensor, load_torch
from promoe_ds.config.optimizer import EMA
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import CheckpointError
from promoe_ds.model.state import buffer_names, check_shapes
from promoe_ds.moe.experts import EXPERT_PARAMETERS

#: The fp32 weights; beside them a checkpoint may hold moving averages and the moments.
WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
MODEL_STATES = "mp_rank_00_model_states.pt"
PREFIX = "denoiser."
#: What a damaged or foreign file's structure may raise.
_MISFITS = (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError)

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
    pieces: kind -> parameter -> (key, first value, number of values), which together are the whole.
    optimizer_step: updates that the moments have seen.
    """

    shapes: dict[str, tuple[int, ...]]
    tensors: dict[str, dict[str, Tensor]]
    pieces: dict[str, dict[str, list[tuple[str, int, int]]]]
    optimizer_step: int | None


class ShardedCheckpoint:
    """A checkpoint as training wrote it, of any ranks, expert parallelism, ZeRO stage, precision.

    kinds: what it holds, of "weights", averages by name, "exp_avg", "exp_avg_sq".
    shapes: every parameter's whole shape, by rank-blind name.
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
            return load_torch(folder / name, ALLOWED_RECORDS, is_mapped=True)

        self.folder = folder
        config, layout = manifest.run_config(folder), manifest.layout
        model = open_file(MODEL_STATES)
        try:
            check_progress(model, folder, manifest)
            if layout.zero_stage > 0:
                self._contents = _find_slices(open_file, layout, model, folder)
            else:
                self._contents = _find_tensors(open_file, layout, model, config)
            self.shapes, self.kinds = self._contents.shapes, tuple(self._contents.tensors)
            self.optimizer_step = self._contents.optimizer_step
            module = model["module"]
            self._buffers = {name: module[f"{PREFIX}{name}"] for name in buffer_names(config)}
            self._check_sizes()
            buffer_shapes = {name: tuple(value.shape) for name, value in self._buffers.items()}
        except _MISFITS as error:
            raise CheckpointError(
                f"{folder}: its files are not what {MANIFEST} says of them, {layout} "
                f"({type(error).__name__}: {error})"
            ) from None
        try:
            check_shapes(self.shapes | buffer_shapes, config)
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder}: its files do not fit the config in {MANIFEST}: {error}"
            ) from None

    def names(self, kind: str) -> list[str]:
        """Return the names of `kind`: parameters, and for weights the routers' running state."""
        return [*self.shapes, *(self._buffers if is_weights(kind) else ())]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a parameter's or a buffer's whole shape."""
        return self.shapes[name] if name in self.shapes else tuple(self._buffers[name].shape)

    def read(self, kind: str, name: str) -> Tensor:
        """Return one whole tensor, fp32, in memory of its own.

        Raises: CheckpointError naming the file or tensor that is missing or does not fit.
        """
        if name in self._buffers:
            return copy_tensor(self._buffers[name]).float()
        out = torch.empty(self.shapes[name])
        self.read_into(out.view(-1), kind, name, 0)
        return out

    def read_into(self, out_N: Tensor, kind: str, name: str, start: int) -> None:
        """Fill a flat fp32 tensor with the values [start, start + N) of a whole parameter.

        Raises: CheckpointError naming the file or tensor that is missing or does not fit.
        """
        if kind not in self.kinds:
            raise CheckpointError(f"{self.folder}: holds no {kind}, only {', '.join(self.kinds)}")
        if name not in self.shapes:
            raise CheckpointError(f"{self.folder}: holds no {name}")
        position, stop = 0, start + out_N.numel()
        for key, begin, count in self._contents.pieces[kind][name]:
            low, high = max(start, position), min(stop, position + count)
            if low < high:
                first = begin + low - position
                try:
                    copy_range(
                        out_N[low - start : high - start], self._contents.tensors[kind][key], first
                    )
                except ValueError as error:
                    raise CheckpointError(
                        f"{self.folder / key}: {kind} of {name}: {error}"
                    ) from None
                self._coverage[kind].add(key, first, first + high - low)
            position += count

    def buffers(self) -> dict[str, Tensor]:
        """Return the routers' running state."""
        return {name: self.read(WEIGHTS, name) for name in self._buffers}

    def check(self, kind: str) -> int:
        """Return how many values of `kind` were read; every value must be, exactly once.

        Raises: CheckpointError naming what was not read, or read twice.
        """

        def is_padding(key: str, start: int, stop: int) -> bool:
            return not self._contents.tensors[kind][key].view(-1)[start:stop].any()

        return self._coverage[kind].check(is_padding)

    def _check_sizes(self) -> None:
        """Compare the files' pieces with the shapes, and start to note what is read."""
        self._coverage: dict[str, Coverage] = {}
        for kind, tensors in self._contents.tensors.items():
            for name, shape in self.shapes.items():
                found = sum(count for *_, count in self._contents.pieces[kind].get(name, ()))
                if found != math.prod(shape):
                    raise CheckpointError(
                        f"{self.folder}: the files hold {found} of {math.prod(shape)} values of "
                        f"{name} ({kind})"
                    )
            sizes = {key: value.numel() for key, value in tensors.items()}
            self._coverage[kind] = Coverage(f"{self.folder}, {kind}", sizes)


def _find_slices(open_file: _Open, layout: Layout, model: Any, folder: Path) -> _Contents:
    """Find parameters in the flat slices of ZeRO's files; the last of each may be padding."""
    prefix = "bf16_" if layout.precision == "bf16" else ""
    files = [
        f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        for rank in range(layout.world_size)
    ]
    shards = [open_file(file)["optimizer_state_dict"] for file in files]
    shapes: dict[str, Any] = {}
    pieces: dict[str, Any] = {}
    for group, group_shapes in enumerate(model["param_shapes"]):
        maps = [shard["param_slice_mappings"][group] for shard in shards]
        ep_size = layout.world_size // shards[0]["partition_count"][group]
        if left := {name for one in maps for name in one} - group_shapes.keys():
            raise CheckpointError(f"{folder}: {sorted(left)[0]} has values but no shape")
        for key, shape in group_shapes.items():
            name = key.removeprefix(PREFIX)
            shapes[name] = (ep_size * shape[0], *shape[1:]) if ep_size > 1 else tuple(shape)
            pieces[name] = []
            for ep_rank in range(ep_size):
                owned = [
                    (f"{file}:{group}", slices[key].start, slices[key].numel)
                    for rank, (file, slices) in enumerate(zip(files, maps, strict=True))
                    if _ep_rank(rank, layout, ep_size) == ep_rank and key in slices
                ]
                if (found := sum(count for *_, count in owned)) != math.prod(shape):
                    raise CheckpointError(
                        f"{folder}: the files hold {found} of {math.prod(shape)} values of {name}"
                    )
                pieces[name] += owned
    states = [shard["base_optimizer_state"]["state"] for shard in shards]
    first = states[0].get(0, {})
    tensors: dict[str, dict[str, Tensor]] = {}
    for kind in (WEIGHTS, *(kind for kind in first if kind != "step")):
        tensors[kind] = {}
        for file, shard, state in zip(files, shards, states, strict=True):
            for group, flat in enumerate(shard["single_partition_of_fp32_groups"]):
                if kind != WEIGHTS and kind not in state.get(group, {}):
                    raise CheckpointError(f"{folder / file}: the optimizer state holds no {kind}")
                tensors[kind][f"{file}:{group}"] = flat if kind == WEIGHTS else state[group][kind]
    return _Contents(
        shapes=shapes,
        tensors=tensors,
        pieces=dict.fromkeys(tensors, pieces),
        optimizer_step=int(first["step"]) if "step" in first else None,
    )


def _ep_rank(rank: int, layout: Layout, ep_size: int) -> int:
    if layout.data_before_expert:
        return rank // (layout.world_size // ep_size)
    return rank % ep_size


def _find_tensors(open_file: _Open, layout: Layout, model: Any, config: RunConfig) -> _Contents:
    """Find parameters whole in the model file; experts in files of their own where sharded."""
    is_sharded = layout.dispatch == "deepspeed"
    buffers = set(buffer_names(config))
    parts: dict[str, dict[str, list[tuple[str, Tensor]]]] = {WEIGHTS: {}}
    for key, value in model["module"].items():
        if (name := key.removeprefix(PREFIX)) not in buffers:
            parts[WEIGHTS][name] = [(f"{MODEL_STATES}:{key}", value)]
    experts = dict(_expert_tensors(open_file, config)) if is_sharded else {}
    parts[WEIGHTS] |= experts
    files = {MODEL_STATES: model}
    if is_sharded:
        names = [f"expp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(layout.ep_size)]
        files = {name: open_file(name) for name in names}
    states = {
        file: dict(_named_states(content.get("optimizer"))) for file, content in files.items()
    }
    every = [state for named in states.values() for state in named.values()]
    for kind in every[0] if every else ():
        if kind != "step" and all(kind in state for state in every):
            parts[kind] = {}
            for index, (file, named) in enumerate(states.items()):
                for name, state in named.items():
                    if index == 0 or name in experts:
                        parts[kind].setdefault(name, []).append((f"{file}:{name}", state[kind]))
    return _Contents(
        shapes={
            name: (
                (len(values), *values[0][1].shape) if name in experts else tuple(values[0][1].shape)
            )
            for name, values in parts[WEIGHTS].items()
        },
        tensors={
            kind: dict(part for values in named.values() for part in values)
            for kind, named in parts.items()
        },
        pieces={
            kind: {
                name: [(key, 0, value.numel()) for key, value in values]
                for name, values in named.items()
            }
            for kind, named in parts.items()
        },
        optimizer_step=int(every[0]["step"]) if every and "step" in every[0] else None,
    )


def _expert_tensors(
    open_file: _Open, config: RunConfig
) -> Iterator[tuple[str, list[tuple[str, Tensor]]]]:
    for layer, block in enumerate(config.moe_block_indices):
        files = [
            f"layer_{layer}_expert_{expert}_{MODEL_STATES}"
            for expert in range(config.routing.num_experts)
        ]
        contents = [open_file(file) for file in files]
        for parameter in EXPERT_PARAMETERS[config.routing.expert_type]:
            name = f"blocks.{block}.moe.routed.{parameter}"
            yield (
                name,
                [
                    (f"{file}:{parameter}", content[expert_file_key(f"{PREFIX}{name}", expert)])
                    for expert, (file, content) in enumerate(zip(files, contents, strict=True))
                ],
            )


def _named_states(optimizer: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for group in (optimizer or {}).get("param_groups", ()):
        for name, index in zip(group["param_names"], group["params"], strict=True):
            if index in optimizer["state"]:
                yield name.removeprefix(PREFIX), optimizer["state"][index]
