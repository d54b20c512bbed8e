"""Whole tensors from a sharded checkpoint: one process, no GPU, no engine, one tensor in memory at a time.

Under ZeRO 1 and 2 each rank's file holds flat fp32 slices of the parameters it owns (masters, moments, moving averages)
and a map from names to slices. Dense parameters are cut over all ranks; a routed expert's over the ranks that replicate
it. Without ZeRO the values lie whole in the model and optimizer files. Either way the result carries the rank-blind
model's names, experts stacked in the order of their global ids. A ledger holds every read against what the files contain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from promoe_ds.backends.expert_parallel import expert_file_key
from promoe_ds.checkpoint.coverage import Ledger
from promoe_ds.checkpoint.engine import ALLOWED_RECORDS
from promoe_ds.checkpoint.manifest import MANIFEST, Layout, Manifest, config_of
from promoe_ds.checkpoint.torch_file import TorchFile
from promoe_ds.config.optimizer import EMA
from promoe_ds.errors import CheckpointError
from promoe_ds.model.state import buffer_names, check_shapes
from promoe_ds.moe.experts import EXPERT_PARAMETERS

#: The fp32 weights; beside them a checkpoint may hold moving averages and the moments.
WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
MODEL_STATES = "mp_rank_00_model_states.pt"
PREFIX = "denoiser."


def check_progress(content: dict[str, Any], folder: Path, manifest: Manifest) -> None:
    """Hold DeepSpeed's own count of steps and samples, where a file has it, against the manifest's.

    Raises: CheckpointError naming both.
    """
    for key, told in (("global_steps", manifest.step), ("global_samples", manifest.samples_seen)):
        if (held := content.get(key, told)) != told:
            raise CheckpointError(f"{folder}: {MANIFEST} says {told} where {MODEL_STATES} has {key}={held}: one of them is damaged")


def is_weights(kind: str) -> bool:
    """Whether a kind is a set of weights, raw or averaged, which comes with the routers' running state."""
    return kind == WEIGHTS or kind.startswith(EMA)


class _Shards(Protocol):
    """Where a layout keeps its parameters."""

    shapes: dict[str, tuple[int, ...]]
    kinds: tuple[str, ...]
    optimizer_step: int | None

    def expected(self, kind: str) -> Iterator[tuple[str, int]]: ...

    def read_into(self, out_N: Tensor, kind: str, name: str, start: int, ledger: Ledger) -> None: ...

    def is_padding(self, tensor: str, start: int, stop: int) -> bool: ...

    def close(self) -> None: ...


class ShardedCheckpoint:
    """A checkpoint as training wrote it, of any ranks, expert parallelism, ZeRO stage and precision.

    kinds: what it holds, of "weights", averages by name, "exp_avg", "exp_avg_sq".
    shapes: every parameter's whole shape, by rank-blind name.
    optimizer_step: the updates that the moments have seen; None where there are none.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Open the files; no value is read yet.

        Args:
            folder: a sound checkpoint; manifest: its manifest.
        Raises: CheckpointError naming the file that is missing or damaged, or what does not fit the manifest.
        """
        self.folder = folder
        self._config = config_of(manifest, folder)
        self._manifest = manifest
        self._ledgers: dict[str, Ledger] = {}
        self._model_states = self._open(MODEL_STATES)
        shards = _ZeroShards if manifest.layout.zero_stage > 0 else _WholeTensors
        try:
            check_progress(self._model_states.content, folder, manifest)
            self._shards: _Shards = shards(self._open, manifest.layout, self._model_states, self._config)
            self.shapes, self.kinds = self._shards.shapes, self._shards.kinds
            self.optimizer_step = self._shards.optimizer_step
            self._buffers = self._find_buffers()
            for kind in self.kinds:
                self._ledger(kind)
            shapes = self.shapes | {name: tuple(value.shape) for name, value in self._buffers.items()}
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{folder}: its files are not what {MANIFEST} says of them, {manifest.layout} "
                                  f"({type(error).__name__}: {error})") from None
        try:
            check_shapes(shapes, self._config)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: its files do not fit the config in {MANIFEST}: {error}") from None

    def names(self, kind: str) -> list[str]:
        """Return the names that `kind` has: all parameters, and for weights of any kind the routers' running state."""
        return [*self.shapes, *(self._buffers if is_weights(kind) else ())]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a parameter's or a buffer's whole shape."""
        return self.shapes[name] if name in self.shapes else tuple(self._buffers[name].shape)

    def read(self, kind: str, name: str) -> Tensor:
        """Return one whole tensor, fp32, in memory of its own.

        Raises: CheckpointError naming the file or tensor that is missing or does not fit.
        """
        if name in self._buffers:
            return self._model_states.read(self._buffers[name]).float()
        out = torch.empty(self.shapes[name])
        self.read_into(out.view(-1), kind, name, 0)
        return out

    def read_into(self, out_N: Tensor, kind: str, name: str, start: int) -> None:
        """Fill a flat fp32 tensor with the values [start, start + N) of a whole parameter, reading no others.

        Raises: CheckpointError naming the file or tensor that is missing or does not fit.
        """
        if kind not in self.kinds:
            raise CheckpointError(f"{self.folder}: holds no {kind}, only {', '.join(self.kinds)}")
        if name not in self.shapes:
            raise CheckpointError(f"{self.folder}: holds no {name}")
        self._shards.read_into(out_N, kind, name, start, self._ledger(kind))

    def buffers(self) -> dict[str, Tensor]:
        """Return the routers' running state."""
        return {name: self.read(WEIGHTS, name) for name in self._buffers}

    def check(self, kind: str) -> int:
        """Close the account of `kind`: every value that the files hold was read exactly once; return how many.

        Raises: CheckpointError naming what was dropped or read twice.
        """
        return self._ledger(kind).check(self._shards.is_padding)

    def close(self) -> None:
        """Let go of the open files."""
        self._model_states.close()
        self._shards.close()

    def _open(self, name: str) -> TorchFile:
        if name not in self._manifest.files:
            raise CheckpointError(f"{self.folder / MANIFEST}: does not list {name}, which its layout needs")
        return TorchFile(self.folder / name, ALLOWED_RECORDS)

    def _ledger(self, kind: str) -> Ledger:
        if kind not in self._ledgers:
            ledger = self._ledgers[kind] = Ledger(f"{self.folder}, {kind}")
            for tensor, numel in self._shards.expected(kind):
                ledger.expect(tensor, numel)
        return self._ledgers[kind]

    def _find_buffers(self) -> dict[str, Tensor]:
        try:
            return {name: self._model_states.content["module"][f"{PREFIX}{name}"] for name in buffer_names(self._config)}
        except KeyError as error:
            raise CheckpointError(f"{self._model_states.path}: holds no {error.args[0]}") from None


@dataclass(frozen=True)
class _Slices:
    """Where a parameter lies: for every expert-parallel rank, slices (file, start, count) in order."""

    group: int
    shape: tuple[int, ...]
    by_ep_rank: list[list[tuple[int, int, int]]]


class _ZeroShards:
    """Flat slices over ZeRO's files."""

    def __init__(self, open_file: Callable[[str], TorchFile], layout: Layout, model_states: TorchFile, config: Any) -> None:
        prefix = "bf16_" if layout.precision == "bf16" else ""
        self._files = [open_file(f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") for rank in range(layout.world_size)]
        self._shards = [file.content["optimizer_state_dict"] for file in self._files]
        self._slices = dict(self._find_slices(layout, model_states.content["param_shapes"], model_states.path.parent))
        self.shapes = {name: (len(where.by_ep_rank) * where.shape[0], *where.shape[1:]) if len(where.by_ep_rank) > 1
                       else where.shape for name, where in self._slices.items()}
        state = self._shards[0]["base_optimizer_state"]["state"].get(0, {})
        self.kinds = (WEIGHTS, *(kind for kind in state if kind != "step"))
        self.optimizer_step = int(self._files[0].item(state["step"])) if "step" in state else None

    def expected(self, kind: str) -> Iterator[tuple[str, int]]:
        for rank, shard in enumerate(self._shards):
            for group in range(len(shard["single_partition_of_fp32_groups"])):
                yield self._key(rank, group, kind), self._flat(rank, group, kind).numel()

    def read_into(self, out_N: Tensor, kind: str, name: str, start: int, ledger: Ledger) -> None:
        where, position, stop = self._slices[name], 0, start + out_N.numel()
        for rank, begin, count in (piece for slices in where.by_ep_rank for piece in slices):
            low, high = max(start, position), min(stop, position + count)
            if low < high:
                offset = begin + low - position
                self._files[rank].read_into(out_N[low - start:high - start], self._flat(rank, where.group, kind), offset)
                ledger.take(self._key(rank, where.group, kind), offset, offset + high - low, name)
            position += count

    def is_padding(self, tensor: str, start: int, stop: int) -> bool:
        """Whether values that belong to no parameter are zero, as DeepSpeed fills up its slices."""
        rank, group, kind = self._parse(tensor)
        values = torch.empty(stop - start)
        self._files[rank].read_into(values, self._flat(rank, group, kind), start)
        return not values.any()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _find_slices(self, layout: Layout, param_shapes: list[dict], folder: Path) -> Iterator[tuple[str, _Slices]]:
        for group, shapes in enumerate(param_shapes):
            maps = [shard["param_slice_mappings"][group] for shard in self._shards]
            ep_size = layout.world_size // self._shards[0]["partition_count"][group]
            if left := {name for one in maps for name in one} - shapes.keys():
                raise CheckpointError(f"{folder}: {sorted(left)[0]} has values but no shape")
            for name, shape in shapes.items():
                by_ep_rank = []
                for ep_rank in range(ep_size):
                    owners = [rank for rank in range(layout.world_size) if _ep_rank(rank, layout, ep_size) == ep_rank]
                    slices = [(rank, maps[rank][name].start, maps[rank][name].numel) for rank in owners if name in maps[rank]]
                    if (held := sum(count for *_, count in slices)) != math.prod(shape):
                        raise CheckpointError(f"{folder}: the shards hold {held} of {math.prod(shape)} values of {name}")
                    by_ep_rank.append(slices)
                yield name.removeprefix(PREFIX), _Slices(group, tuple(shape), by_ep_rank)

    def _flat(self, rank: int, group: int, kind: str) -> Tensor:
        shard = self._shards[rank]
        if kind == WEIGHTS:
            return shard["single_partition_of_fp32_groups"][group]
        state = shard["base_optimizer_state"]["state"].get(group, {})
        if kind not in state:
            raise CheckpointError(f"{self._files[rank].path}: the optimizer state holds no {kind}")
        return state[kind]

    def _key(self, rank: int, group: int, kind: str) -> str:
        return f"{self._files[rank].path.name}:{kind}:{group}:{rank}"

    def _parse(self, key: str) -> tuple[int, int, str]:
        _, kind, group, rank = key.split(":")
        return int(rank), int(group), kind


class _WholeTensors:
    """Without ZeRO: parameters whole in the model file, experts in files of their own or in the model file."""

    def __init__(self, open_file: Callable[[str], TorchFile], layout: Layout, model_states: TorchFile, config: Any) -> None:
        self._is_sharded = layout.dispatch == "deepspeed"
        self._weights: dict[str, list[tuple[TorchFile, Tensor, str]]] = {}
        buffers = set(buffer_names(config))
        for key, value in model_states.content["module"].items():
            if (name := key.removeprefix(PREFIX)) not in buffers:
                self._weights[name] = [(model_states, value, key)]
        if self._is_sharded:
            self._add_expert_files(open_file, config)
        self._states = self._find_states(open_file, layout, model_states)
        self.shapes = {name: (len(parts), *parts[0][1].shape) if len(parts) > 1 or self._is_expert(name)
                       else tuple(parts[0][1].shape) for name, parts in self._weights.items()}
        held = [set(state) for _, states in self._states for state in states.values()]
        kinds = set.intersection(*held) if held else set()
        first = next((state for _, states in self._states for state in states.values()), {})
        self.kinds = (WEIGHTS, *(kind for kind in first if kind in kinds and kind != "step"))
        self.optimizer_step = int(self._states[0][0].item(first["step"])) if "step" in first else None

    def expected(self, kind: str) -> Iterator[tuple[str, int]]:
        if kind == WEIGHTS:
            for parts in self._weights.values():
                yield from ((key, value.numel()) for _, value, key in parts)
            return
        for index, (_, states) in enumerate(self._states):
            for name, state in states.items():
                if index == 0 or self._is_expert(name):
                    yield f"{index}:{name}", state[kind].numel()

    def read_into(self, out_N: Tensor, kind: str, name: str, start: int, ledger: Ledger) -> None:
        """Fill a flat tensor with values [start, start + N) of a parameter, booking what was taken from which file."""
        if kind == WEIGHTS:
            parts = [(file, value, key) for file, value, key in self._weights[name]]
        else:
            files = self._states if self._is_expert(name) else self._states[:1]
            if lacking := [file.path for file, states in files if name not in states]:
                raise CheckpointError(f"{lacking[0]}: holds no {kind} of {name}")
            parts = [(file, states[name][kind], f"{index}:{name}") for index, (file, states) in enumerate(files)]
        if (held := sum(value.numel() for _, value, _ in parts)) != math.prod(self.shapes[name]):
            raise CheckpointError(f"{parts[0][0].path}: {kind} of {name} has {held} of {math.prod(self.shapes[name])} values")
        position, stop = 0, start + out_N.numel()
        for file, value, key in parts:
            low, high = max(start, position), min(stop, position + value.numel())
            if low < high:
                file.read_into(out_N[low - start:high - start], value, low - position)
                ledger.take(key, low - position, high - position, name)
            position += value.numel()

    def is_padding(self, tensor: str, start: int, stop: int) -> bool:
        return False

    def close(self) -> None:
        for file in (file for parts in self._weights.values() for file, *_ in parts):
            file.close()
        for file, _ in self._states:
            file.close()

    def _is_expert(self, name: str) -> bool:
        return self._is_sharded and ".moe.routed." in name

    def _add_expert_files(self, open_file: Callable[[str], TorchFile], config: Any) -> None:
        for layer, block in enumerate(config.moe_block_indices):
            files = [open_file(f"layer_{layer}_expert_{expert}_{MODEL_STATES}") for expert in range(config.routing.num_experts)]
            for parameter in EXPERT_PARAMETERS[config.routing.expert_type]:
                name = f"blocks.{block}.moe.routed.{parameter}"
                keys = [expert_file_key(f"{PREFIX}{name}", expert) for expert in range(len(files))]
                self._weights[name] = [(file, file.content[key], key) for file, key in zip(files, keys, strict=True)]

    def _find_states(self, open_file: Callable[[str], TorchFile], layout: Layout,
                     model_states: TorchFile) -> list[tuple[TorchFile, dict[str, dict]]]:
        files = [model_states]
        if self._is_sharded:
            files = [open_file(f"expp_rank_{rank}_mp_rank_00_optim_states.pt") for rank in range(layout.ep_size)]
        return [(file, dict(_named_states(file.content.get("optimizer") or {}))) for file in files]


def _ep_rank(rank: int, layout: Layout, ep_size: int) -> int:
    return rank // (layout.world_size // ep_size) if layout.data_before_expert else rank % ep_size


def _named_states(optimizer: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for group in optimizer.get("param_groups", ()):
        for name, index in zip(group["param_names"], group["params"], strict=True):
            if index in optimizer["state"]:
                yield name.removeprefix(PREFIX), optimizer["state"][index]
