"""What can be converted: every format behind one reader, one tensor at a time.

A kind is a set of tensors: "weights", moving averages by name, AdamW's "exp_avg", "exp_avg_sq".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from promoe_ds.checkpoint.conversion.pipeline_folder import (
    KEY_PREFIX,
    MODEL_INDEX,
    PIPELINE_STEM,
    TRANSFORMER,
    read_pipeline_config,
)
from promoe_ds.checkpoint.coverage import Coverage
from promoe_ds.checkpoint.manifest import (
    find_problems,
    manifest_checksum,
    named_checkpoints,
    read_manifest,
)
from promoe_ds.checkpoint.zero_files import MOMENTS, WEIGHTS, is_weights
from promoe_ds.checkpoint.zero_reader import ShardedCheckpoint
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import CheckpointError, first_few
from promoe_ds.model.export import (
    CONFIG_FILE,
    TRAINING_STEM,
    WEIGHTS_STEM,
    read_export_config,
)
from promoe_ds.model.shards import ShardReader
from promoe_ds.model.state import POSITIONS, buffer_names, shape_problems, state_shapes

#: safetensors' and torch's names of the types that our weights may have.
_HELD_BY_FP32 = ("F32", "BF16", "F16", "torch.float32", "torch.bfloat16", "torch.float16")

Shape = tuple[int, ...]
_Found = Mapping[str, tuple[Shape, Any]]
_Keys = Mapping[str, Mapping[str, Shape]]


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """What is known of a source beside its tensors.

    averages_since: the steps at which averages began that began later than training.
    largest_file: bytes, where the source is cut into files by training; it bounds a reader's
        memory.
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
    """A checkpoint of any format.

    kinds: the sets of tensors that it holds, each with the rank-blind names that it has.
    shapes: every tensor's whole shape, by name.
    optimizer_step: the updates that its optimizer's state has seen, None where it holds none.
    """

    info: SourceInfo
    kinds: dict[str, list[str]]
    shapes: dict[str, Shape]
    optimizer_step: int | None

    def read(self, kind: str, name: str) -> Tensor:
        """Return one whole tensor and note that it was read."""

    def check(self, kind: str) -> int:
        """Raise CheckpointError unless every value of `kind` was read once; return how many."""


def is_export(path: Path) -> bool:
    """Whether a folder is an export or a pipeline of diffusers, not a checkpoint of training."""
    return (path / MODEL_INDEX).is_file() or (path / CONFIG_FILE).is_file()


def open_folder(path: Path, *, check: bool = True) -> Source:
    """Recognise a folder's format and open it.

    Args:
        path: an export or pipeline folder, a checkpoint folder, or a run directory (its newest).
        check: whether tensors of exports and pipelines are compared with their checksums.
    Raises: CheckpointError if it is none of them, or damaged.
    """
    if is_export(path):
        return ExportSource(path, check=check)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: there is no such file or folder: name a run, checkpoint, export or .pth file"
        )
    return TrainingSource(named_checkpoints(path)[0])


class TrainingSource(ShardedCheckpoint):
    """A checkpoint as training wrote it."""

    def __init__(self, folder: Path) -> None:
        """Open a checkpoint whose files all match the manifest."""
        manifest = read_manifest(folder)
        if problems := find_problems(folder, manifest.files):
            raise CheckpointError(f"{folder}: {'; '.join(problems)}")
        super().__init__(folder, manifest)
        self.info = SourceInfo(
            path=folder,
            format="deepspeed",
            config=manifest.run_config(folder),
            step=manifest.step,
            samples_seen=manifest.samples_seen,
            largest_file=max(file.bytes for file in manifest.files.values()),
            averages_since=manifest.averages_since,
            origin={
                "layout": str(manifest.layout),
                "versions": manifest.versions,
                "manifest": manifest_checksum(folder),
            },
        )


class StateSource:
    """Kinds whose tensors are whole, under keys of the format's own."""

    optimizer_step: int | None = None

    def __init__(self, info: SourceInfo) -> None:
        """Start without a kind."""
        self.info, self.shapes = info, state_shapes(info.config, own_positions=True)
        self.kinds: dict[str, list[str]] = {}
        self._coverage: dict[str, Coverage] = {}

    def check(self, kind: str) -> int:
        """Raise CheckpointError unless every value of `kind` was read once; return how many."""
        return self._coverage[kind].check()

    def _add_kind(self, kind: str, found: _Found, keys: _Keys) -> None:
        """Take a kind.

        Args:
            found: key -> shape and type, of the kind's tensors; keys: name -> its keys -> shapes.
        Raises: CheckpointError naming what is missing, left over, misshapen, or of a type that fp32
            does not hold.
        """
        left_out = {*()} if is_weights(kind) else {*buffer_names(self.info.config)}
        if not is_weights(kind) or keys[POSITIONS].keys().isdisjoint(found):
            left_out.add(POSITIONS)
        self.kinds[kind] = [name for name in self.shapes if name not in left_out]
        shapes = {key: shape for key, (shape, _) in found.items()}
        expected = {key: shape for name in self.kinds[kind] for key, shape in keys[name].items()}
        problems = shape_problems(shapes, expected) + [
            f"{key} is of type {dtype}, which fp32 does not hold"
            for key, (_, dtype) in found.items()
            if str(dtype) not in _HELD_BY_FP32
        ]
        source = f"{self.info.path}: {kind}"
        if problems:
            raise CheckpointError(f"{source}: {first_few(problems)}")
        sizes = {key: math.prod(shape) for key, shape in shapes.items()}
        self._coverage[kind] = Coverage(source, sizes)


class ExportSource(StateSource):
    """A single export, with the state of training where that was kept, or a diffusers pipeline."""

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        """Open an export's or a pipeline's folder."""
        is_pipeline = (folder / MODEL_INDEX).is_file()
        weights = folder / TRANSFORMER if is_pipeline else folder
        stem, prefix = (PIPELINE_STEM, KEY_PREFIX) if is_pipeline else (WEIGHTS_STEM, "")
        read_config = read_pipeline_config if is_pipeline else read_export_config
        config, origin = read_config(folder)
        _check_origin(weights / CONFIG_FILE, origin)
        # A pipeline has weights alone, though it may come from an export that had more.
        training = {} if is_pipeline else origin
        step = origin.get("step", 0)
        info = SourceInfo(
            path=folder,
            format="diffusers" if is_pipeline else "single",
            config=config,
            step=step,
            samples_seen=origin.get("samples_seen", step * config.train.global_batch_size),
            origin=origin,
            averages_since=training.get("averages_since", {}),
        )
        super().__init__(info)
        self._readers: dict[str, tuple[ShardReader, str]] = {}
        self.optimizer_step = training.get("optimizer_step")
        reader = ShardReader(weights, stem, check=check)
        self._add(origin.get("kind", WEIGHTS), reader, prefix, reader.shapes)
        if kinds := training.get("training_state", ()):
            state = ShardReader(folder, TRAINING_STEM, check=check)
            if left := [key for key in state.shapes if key.split("/")[0] not in kinds]:
                raise CheckpointError(
                    f"{folder}: {TRAINING_STEM}: {left[0]} belongs to none of {', '.join(kinds)}, "
                    f"which {CONFIG_FILE} names"
                )
            for kind in kinds:
                own = [key for key in state.shapes if key.startswith(f"{kind}/")]
                self._add(kind, state, f"{kind}/", own)

    def read(self, kind: str, name: str) -> Tensor:
        """Return one whole tensor, mapped from its file, and note that it was read."""
        reader, prefix = self._readers[kind]
        self._coverage[kind].add(f"{prefix}{name}")
        return reader.read(f"{prefix}{name}")

    def check(self, kind: str) -> int:
        """Raise CheckpointError unless every value of `kind` was read once; return how many."""
        self._readers[kind][0].close()  # what it has mapped counts as memory
        return super().check(kind)

    def _add(self, kind: str, reader: ShardReader, prefix: str, keys: Iterable[str]) -> None:
        """Take those keys of a reader as a kind; raises as `_add_kind`."""
        self._readers[kind] = (reader, prefix)
        found = {key: (reader.shapes[key], reader.dtypes[key]) for key in keys}
        places = {name: {f"{prefix}{name}": shape} for name, shape in self.shapes.items()}
        self._add_kind(kind, found, places)


def _check_origin(path: Path, origin: dict[str, Any]) -> None:
    """Raise CheckpointError naming an entry of a weights' origin that cannot be."""

    def is_count(value: object) -> bool:
        return type(value) is int and value >= 0

    def is_kind(value: object) -> bool:
        return isinstance(value, str) and is_weights(value)

    rules = {
        "step": is_count,
        "samples_seen": is_count,
        "kind": is_kind,
        "optimizer_step": lambda value: value is None or is_count(value),
        "averages_since": lambda value: (
            isinstance(value, dict) and all(map(is_count, value.values()))
        ),
        "training_state": lambda value: (
            isinstance(value, list)
            and all(is_kind(kind) or kind in MOMENTS for kind in value)
            and origin.get("kind", WEIGHTS) not in value
        ),
    }
    for name, holds in rules.items():
        if name in origin and not holds(origin[name]):
            raise CheckpointError(f"{path}: origin.{name}={origin[name]!r} cannot be understood")
