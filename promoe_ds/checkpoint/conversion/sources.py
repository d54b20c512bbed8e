"""What can be converted: every format behind one reader, one tensor at a time.

A kind is a set of tensors: "weights", moving averages by name, AdamW's "exp_avg" and "exp_avg_sq".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from promoe_ds.checkpoint.conversion.pipeline_folder import (
    MODEL_INDEX,
    PIPELINE_STEM,
    TRANSFORMER,
    name_of_key,
    read_pipeline_config,
)
from promoe_ds.checkpoint.coverage import Ledger
from promoe_ds.checkpoint.manifest import find_checkpoint, find_problems, read_manifest
from promoe_ds.checkpoint.zero_reader import MOMENTS, WEIGHTS, ShardedCheckpoint, is_weights
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import CheckpointError
from promoe_ds.model.export import CONFIG_FILE, TRAINING_STEM, WEIGHTS_STEM, read_export_config, read_export_origin
from promoe_ds.model.shards import ShardReader
from promoe_ds.model.state import POSITIONS, state_shapes

#: safetensors' names of the types that our weights may have.
_HELD_BY_FP32 = ("F32", "BF16", "F16")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a source beside its tensors.

    averages_since: the steps at which averages began that began later than training.
    largest_file: bytes, where the source is cut into files of training's making; a reader's memory is measured by it.
    """

    path: Path
    format: str
    config: RunConfig
    step: int
    samples_seen: int
    origin: dict[str, Any] = field(default_factory=dict)
    averages_since: dict[str, int] = field(default_factory=dict)
    note: str = ""
    largest_file: int | None = None


class Source(Protocol):
    """A checkpoint of any format."""

    facts: Facts

    @property
    def kinds(self) -> tuple[str, ...]:
        """The sets of weights that it holds."""

    @property
    def optimizer_step(self) -> int | None:
        """The updates that its optimizer's state has seen, None where it holds none."""

    def names(self, kind: str) -> list[str]:
        """Return the rank-blind names that `kind` has."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's whole shape."""

    def read(self, kind: str, name: str) -> Tensor:
        """Return one whole tensor, booking what was taken."""

    def check(self, kind: str) -> int:
        """Raise CheckpointError unless every value of `kind` was taken exactly once; return how many."""

    def close(self) -> None:
        """Let go of open files."""


def open_folder(path: Path, *, check: bool = True) -> Source:
    """Recognise a folder's format and open it.

    Args:
        path: an export or pipeline folder, a checkpoint folder, or a run directory (its newest).
        check: whether tensors of exports and pipelines are held against their checksums as they are read.
    Raises: CheckpointError if it is none of them, or not sound.
    """
    if (path / MODEL_INDEX).is_file():
        return PipelineSource(path, check=check)
    if (path / CONFIG_FILE).is_file():
        return ExportSource(path, check=check)
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such file or folder")
    return TrainingSource(find_checkpoint(path))


class TrainingSource(ShardedCheckpoint):
    """A checkpoint as training wrote it."""

    def __init__(self, folder: Path) -> None:
        """Open a checkpoint whose files all match the manifest."""
        manifest = read_manifest(folder)
        if problems := find_problems(folder, manifest.files):
            raise CheckpointError(f"{folder}: {'; '.join(problems)}")
        super().__init__(folder, manifest)
        self.facts = Facts(
            path=folder, format="deepspeed", config=manifest.run_config(folder),
            step=manifest.step, samples_seen=manifest.samples_seen, largest_file=max(f.bytes for f in manifest.files.values()),
            averages_since=manifest.averages_since, origin={"layout": str(manifest.layout), "versions": manifest.versions})


class _SafetensorsSource:
    """Kinds in safetensors files, each under keys of its own."""

    facts: Facts
    optimizer_step: int | None

    def __init__(self, facts: Facts, optimizer_step: int | None) -> None:
        self.facts, self.optimizer_step = facts, optimizer_step
        self._shapes = state_shapes(facts.config, own_positions=True)
        self._places: dict[str, dict[str, tuple[ShardReader, str]]] = {}
        self._ledgers: dict[str, Ledger] = {}
        self._reading: ShardReader | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self._places)

    def names(self, kind: str) -> list[str]:
        return list(self._places[kind])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, kind: str, name: str) -> Tensor:
        reader, key = self._places[kind][name]
        if self._reading is not None and self._reading is not reader:
            self._reading.close()  # what it has mapped counts as memory
        self._reading = reader
        self._ledgers[kind].take_all(key, name)
        return reader.read(key)

    def check(self, kind: str) -> int:
        return self._ledgers[kind].check()

    def close(self) -> None:
        for reader in {id(reader): reader for places in self._places.values() for reader, _ in places.values()}.values():
            reader.close()

    def _add(self, kind: str, reader: ShardReader, keys: dict[str, str]) -> None:
        """Take a kind from a reader.

        Args:
            keys: key -> name.
        Raises: CheckpointError naming what is missing, left over, misshapen, or of a type that fp32 does not hold.
        """
        found = {name: key for key, name in keys.items()}
        left_out = {*()} if is_weights(kind) else {*state_shapes(self.facts.config, buffers_only=True, own_positions=True)}
        left_out |= {POSITIONS} - found.keys()
        expected = {name: shape for name, shape in self._shapes.items() if name not in left_out}
        problems = [f"{name} is missing" for name in expected if name not in found]
        problems += [f"{key} has no place in this architecture" for key, name in keys.items() if name not in expected]
        problems += [f"{key} has shape {reader.shapes[key]} instead of {expected[name]}" for key, name in keys.items()
                     if name in expected and reader.shapes[key] != expected[name]]
        problems += [f"{key} is of type {reader.dtypes[key]}, which fp32 does not hold" for key in keys
                     if reader.dtypes[key] not in _HELD_BY_FP32]
        if problems:
            raise CheckpointError(f"{self.facts.path}: {kind}: {'; '.join(problems[:5])}"
                                  f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}")
        ledger = self._ledgers[kind] = Ledger(f"{self.facts.path}, {kind}")
        for key, shape in reader.shapes.items():
            if key in keys:
                ledger.expect(key, torch.Size(shape).numel())
        self._places[kind] = {name: (reader, found[name]) for name in expected}


class ExportSource(_SafetensorsSource):
    """A single export, with the state of training where that was kept."""

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        """Open an export."""
        config, origin = read_export_config(folder), read_export_origin(folder)
        _check_origin(folder / CONFIG_FILE, origin)
        step = origin.get("step", 0)
        super().__init__(Facts(path=folder, format="single", config=config, step=step,
                               samples_seen=origin.get("samples_seen", step * config.train.global_batch_size), origin=origin,
                               averages_since=origin.get("averages_since", {})),
                         origin.get("optimizer_step"))
        reader = ShardReader(folder, WEIGHTS_STEM, check=check)
        self._add(origin.get("kind", WEIGHTS), reader, {key: key for key in reader.shapes})
        kinds = origin.get("training_state", ())
        if not kinds:
            return
        state = ShardReader(folder, TRAINING_STEM, check=check)
        if foreign := [key for key in state.shapes if key.split("/")[0] not in kinds]:
            raise CheckpointError(f"{folder}: {TRAINING_STEM}: {foreign[0]} belongs to none of {', '.join(kinds)}, which "
                                  f"{CONFIG_FILE} names")
        for kind in kinds:
            prefix = f"{kind}/"
            self._add(kind, state, {key: key.removeprefix(prefix) for key in state.shapes if key.startswith(prefix)})


class PipelineSource(_SafetensorsSource):
    """A diffusers pipeline's folder."""

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        """Open a pipeline folder."""
        config, origin = read_pipeline_config(folder)
        _check_origin(folder / TRANSFORMER / CONFIG_FILE, origin)
        super().__init__(Facts(path=folder, format="diffusers", config=config, origin=origin, step=origin.get("step", 0),
                               samples_seen=origin.get("samples_seen", 0)), None)
        reader = ShardReader(folder / TRANSFORMER, PIPELINE_STEM, check=check)
        self._add(origin.get("kind", WEIGHTS), reader, {key: name_of_key(key) for key in reader.shapes})


def _check_origin(path: Path, origin: dict[str, Any]) -> None:
    """Raise CheckpointError naming what a config says of its weights' origin and cannot be."""
    def is_count(value: object) -> bool:
        return type(value) is int and value >= 0

    def is_kind(value: object) -> bool:
        return isinstance(value, str) and is_weights(value)

    rules = {
        "step": is_count, "samples_seen": is_count, "kind": is_kind,
        "optimizer_step": lambda value: value is None or is_count(value),
        "averages_since": lambda value: isinstance(value, dict) and all(map(is_count, value.values())),
        "training_state": lambda value: isinstance(value, list) and all(is_kind(kind) or kind in MOMENTS for kind in value)
        and origin.get("kind", WEIGHTS) not in value,
    }
    for name, holds in rules.items():
        if name in origin and not holds(origin[name]):
            raise CheckpointError(f"{path}: origin.{name}={origin[name]!r} cannot be understood")
