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
from promoe_ds.checkpoint.manifest import find_checkpoint, find_problems, read_manifest
from promoe_ds.checkpoint.zero_reader import MOMENTS, WEIGHTS, ShardedCheckpoint, is_weights
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import CheckpointError, first_few
from promoe_ds.model.export import (
    CONFIG_FILE,
    TRAINING_STEM,
    WEIGHTS_STEM,
    read_export_config,
    read_export_origin,
)
from promoe_ds.model.shards import ShardReader
from promoe_ds.model.state import POSITIONS, buffer_names, shape_problems, state_shapes

#: safetensors' and torch's names of the types that our weights may have.
_HELD_BY_FP32 = ("F32", "BF16", "F16", "torch.float32", "torch.bfloat16", "torch.float16")

_Shape = tuple[int, ...]
_Found = Mapping[str, tuple[_Shape, Any]]
_Keys = Mapping[str, Mapping[str, _Shape]]


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
    """A checkpoint of any format."""

    info: SourceInfo

    @property
    def kinds(self) -> tuple[str, ...]:
        """The sets of tensors that it holds."""

    @property
    def optimizer_step(self) -> int | None:
        """The updates that its optimizer's state has seen, None where it holds none."""

    def names(self, kind: str) -> list[str]:
        """Return the rank-blind names that `kind` has."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's whole shape."""

    def read(self, kind: str, name: str) -> Tensor:
        """Return one whole tensor and note that it was read."""

    def check(self, kind: str) -> int:
        """Raise CheckpointError unless every value of `kind` was read once; return how many."""


def open_folder(path: Path, *, check: bool = True) -> Source:
    """Recognise a folder's format and open it.

    Args:
        path: an export or pipeline folder, a checkpoint folder, or a run directory (its newest).
        check: whether tensors of exports and pipelines are compared with their checksums.
    Raises: CheckpointError if it is none of them, or damaged.
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
        self.info = SourceInfo(
            path=folder,
            format="deepspeed",
            config=manifest.run_config(folder),
            step=manifest.step,
            samples_seen=manifest.samples_seen,
            largest_file=max(file.bytes for file in manifest.files.values()),
            averages_since=manifest.averages_since,
            origin={"layout": str(manifest.layout), "versions": manifest.versions},
        )


class StateSource:
    """Kinds whose tensors are whole, under keys of the format's own."""

    optimizer_step: int | None = None

    def __init__(self, info: SourceInfo) -> None:
        """Start without a kind."""
        self.info = info
        self._shapes = state_shapes(info.config, own_positions=True)
        self._names: dict[str, list[str]] = {}
        self._coverage: dict[str, Coverage] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it holds."""
        return tuple(self._names)

    def names(self, kind: str) -> list[str]:
        """Return the rank-blind names that `kind` has."""
        return self._names[kind]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's whole shape."""
        return self._shapes[name]

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
        names = [name for name in self._shapes if name not in left_out]
        shapes = {key: shape for key, (shape, _) in found.items()}
        expected = {key: shape for name in names for key, shape in keys[name].items()}
        problems = shape_problems(shapes, expected) + [
            f"{key} is of type {dtype}, which fp32 does not hold"
            for key, (_, dtype) in found.items()
            if str(dtype) not in _HELD_BY_FP32
        ]
        source = f"{self.info.path}: {kind}"
        if problems:
            raise CheckpointError(f"{source}: {first_few(problems)}")
        self._names[kind] = names
        sizes = {key: math.prod(shape) for key, shape in shapes.items()}
        self._coverage[kind] = Coverage(source, sizes)


class _SafetensorsSource(StateSource):
    """Kinds in safetensors files, under prefixed names."""

    def __init__(self, info: SourceInfo) -> None:
        super().__init__(info)
        self._readers: dict[str, tuple[ShardReader, str]] = {}

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
        places = {name: {f"{prefix}{name}": shape} for name, shape in self._shapes.items()}
        self._add_kind(kind, found, places)


class ExportSource(_SafetensorsSource):
    """A single export, with the state of training where that was kept."""

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        """Open an export."""
        config, origin = read_export_config(folder), read_export_origin(folder)
        _check_origin(folder / CONFIG_FILE, origin)
        step = origin.get("step", 0)
        super().__init__(
            SourceInfo(
                path=folder,
                format="single",
                config=config,
                step=step,
                samples_seen=origin.get("samples_seen", step * config.train.global_batch_size),
                origin=origin,
                averages_since=origin.get("averages_since", {}),
            )
        )
        self.optimizer_step = origin.get("optimizer_step")
        reader = ShardReader(folder, WEIGHTS_STEM, check=check)
        self._add(origin.get("kind", WEIGHTS), reader, "", reader.shapes)
        if not (kinds := origin.get("training_state", ())):
            return
        state = ShardReader(folder, TRAINING_STEM, check=check)
        if left := [key for key in state.shapes if key.split("/")[0] not in kinds]:
            raise CheckpointError(
                f"{folder}: {TRAINING_STEM}: {left[0]} belongs to none of {', '.join(kinds)}, "
                f"which {CONFIG_FILE} names"
            )
        for kind in kinds:
            prefix = f"{kind}/"
            self._add(kind, state, prefix, [key for key in state.shapes if key.startswith(prefix)])


class PipelineSource(_SafetensorsSource):
    """A diffusers pipeline's folder."""

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        """Open a pipeline folder."""
        config, origin = read_pipeline_config(folder)
        _check_origin(folder / TRANSFORMER / CONFIG_FILE, origin)
        super().__init__(
            SourceInfo(
                path=folder,
                format="diffusers",
                config=config,
                origin=origin,
                step=origin.get("step", 0),
                samples_seen=origin.get("samples_seen", 0),
            )
        )
        reader = ShardReader(folder / TRANSFORMER, PIPELINE_STEM, check=check)
        self._add(origin.get("kind", WEIGHTS), reader, KEY_PREFIX, reader.shapes)


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
