"""What can be converted: every format behind one reader, one tensor at a time.

A kind is a set of tensors: "weights", moving averages by name, AdamW's "exp_avg" and "exp_avg_sq".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from promoe_ds.config import config_from_dict
from promoe_ds.config.optimizer import EMA
from promoe_ds.config.schema import RunConfig
from promoe_ds.engine.conversion.pipeline_folder import MODEL_INDEX, PIPELINE_STEM, TRANSFORMER, name_of_key, read_pipeline_config
from promoe_ds.engine.ledger import Ledger
from promoe_ds.engine.manifest import MANIFEST, find_checkpoint, find_problems, read_manifest
from promoe_ds.engine.reconstruct import MOMENTS, WEIGHTS, ShardedCheckpoint, is_weights
from promoe_ds.engine.torch_file import TorchFile
from promoe_ds.errors import CheckpointError
from promoe_ds.model.export import CONFIG_FILE, TRAINING_STEM, WEIGHTS_STEM, read_export_config, read_export_origin
from promoe_ds.model.official import POSITIONS, is_published_parameter, published_keys, rename_official
from promoe_ds.model.shards import ShardReader
from promoe_ds.model.state import state_shapes


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a source beside its tensors.

    largest_file: bytes, where the source is cut into files of training's making; a reader's memory is measured by it.
    """

    path: Path
    format: str
    config: RunConfig
    step: int
    samples_seen: int
    origin: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    largest_file: int | None = None


class Source(Protocol):
    """A checkpoint of any format."""

    facts: Facts
    kinds: tuple[str, ...]
    optimizer_step: int | None

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


def open_source(path: Path, config: RunConfig | None = None) -> Source:
    """Recognise a checkpoint's format and open it.

    Args:
        path: a published `.pth` file, an export or pipeline folder, a checkpoint folder, or a run directory (its newest).
        config: the architecture of a published file, which holds none.
    Raises: CheckpointError if it is none of them, or not sound.
    """
    if path.is_file():
        if config is None:
            raise CheckpointError(f"{path} does not hold its architecture: name a recipe of it with --recipe")
        return OfficialSource(path, config)
    if (path / MODEL_INDEX).is_file():
        return PipelineSource(path)
    if (path / CONFIG_FILE).is_file():
        return ExportSource(path)
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
            path=folder, format="deepspeed", config=config_from_dict(manifest.config, source=str(folder / MANIFEST)),
            step=manifest.step, samples_seen=manifest.samples_seen, largest_file=max(f.bytes for f in manifest.files.values()),
            origin={"layout": str(manifest.layout), "versions": manifest.versions})


class _SafetensorsSource:
    """Kinds in safetensors files, each under keys of its own."""

    facts: Facts
    optimizer_step: int | None

    def __init__(self, facts: Facts, optimizer_step: int | None) -> None:
        self.facts, self.optimizer_step = facts, optimizer_step
        self._shapes = state_shapes(facts.config)
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
        Raises: CheckpointError naming what is missing, left over or misshapen.
        """
        buffers = () if is_weights(kind) else state_shapes(self.facts.config, buffers_only=True)
        expected = {name: shape for name, shape in self._shapes.items() if name not in buffers}
        found = {name: key for key, name in keys.items()}
        problems = [f"{name} is missing" for name in expected if name not in found]
        problems += [f"{key} has no place in this architecture" for key, name in keys.items() if name not in expected]
        problems += [f"{key} has shape {reader.shapes[key]} instead of {expected[name]}" for key, name in keys.items()
                     if name in expected and reader.shapes[key] != expected[name]]
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

    def __init__(self, folder: Path) -> None:
        """Open an export."""
        config, origin = read_export_config(folder), read_export_origin(folder)
        step = int(origin.get("step", 0))
        super().__init__(Facts(path=folder, format="single", config=config, step=step,
                               samples_seen=int(origin.get("samples_seen", step * config.train.global_batch_size)), origin=origin),
                         origin.get("optimizer_step"))
        reader = ShardReader(folder, WEIGHTS_STEM)
        self._add(origin.get("kind", WEIGHTS), reader, {key: key for key in reader.shapes})
        kinds = origin.get("training_state", ())
        state = ShardReader(folder, TRAINING_STEM) if kinds else None
        for kind in kinds:
            prefix = f"{kind}/"
            self._add(kind, state, {key: key.removeprefix(prefix) for key in state.shapes if key.startswith(prefix)})


class PipelineSource(_SafetensorsSource):
    """A diffusers pipeline's folder."""

    def __init__(self, folder: Path) -> None:
        """Open a pipeline folder."""
        config, origin = read_pipeline_config(folder)
        super().__init__(Facts(path=folder, format="diffusers", config=config, origin=origin, step=int(origin.get("step", 0)),
                               samples_seen=int(origin.get("samples_seen", 0))), None)
        reader = ShardReader(folder / TRANSFORMER, PIPELINE_STEM)
        self._add(origin.get("kind", WEIGHTS), reader, {key: name_of_key(key) for key in reader.shapes})


class OfficialSource:
    """A file of the published code: `step`, `model_state_dict`, `ema_model_state_dict`, `optimizer_state_dict`."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        """Open a published file of the architecture `config`."""
        self._file, self._config = TorchFile(path), config
        content = self._file.content
        sections = {WEIGHTS: "model_state_dict", EMA: "ema_model_state_dict"}
        if not isinstance(content, dict) or sections[WEIGHTS] not in content:
            raise CheckpointError(f"{path}: is no checkpoint of the published code: it has no {sections[WEIGHTS]}")
        self._tensors = {kind: dict(content[section]) for kind, section in sections.items() if section in content}
        for state in self._tensors.values():
            self._check_positions(state, path)
        self._shapes = state_shapes(config)
        self._keys = {name: published_keys(name, shape, config) for name, shape in self._shapes.items()}
        self._check_keys(path)
        self._buffers = state_shapes(config, buffers_only=True).keys()
        self.optimizer_step = self._add_moments(content.get("optimizer_state_dict") or {})
        step = int(self._file.item(content.get("step", 0)))
        self.facts = Facts(path=path, format="official", config=config, step=step,
                           samples_seen=step * config.train.global_batch_size)
        self._ledgers = {kind: self._new_ledger(kind) for kind in self._tensors}

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the file holds."""
        return tuple(self._tensors)

    def names(self, kind: str) -> list[str]:
        """Return the rank-blind names that `kind` has."""
        return [name for name in self._shapes if is_weights(kind) or name not in self._buffers]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's whole shape."""
        return self._shapes[name]

    def read(self, kind: str, name: str) -> Tensor:
        """Return one whole tensor, booking what was taken."""
        values = {}
        for key in self._keys[name]:
            values[key] = self._file.read(self._tensors[kind][key])
            self._ledgers[kind].take_all(key, name)
        return rename_official(values, self._config)[name]

    def check(self, kind: str) -> int:
        """Raise CheckpointError unless every value of `kind` was taken exactly once; return how many."""
        return self._ledgers[kind].check()

    def close(self) -> None:
        """Let go of open files."""
        self._file.close()

    def _check_positions(self, state: dict[str, Tensor], path: Path) -> None:
        """Hold the fixed table against the computed one; it is no weight."""
        if POSITIONS not in state:
            raise CheckpointError(f"{path}: {POSITIONS} is missing")
        rename_official({POSITIONS: self._file.read(state.pop(POSITIONS))}, self._config)

    def _check_keys(self, path: Path) -> None:
        known = {key for keys in self._keys.values() for key in keys}
        for kind, state in self._tensors.items():
            problems = [f"{key} is missing" for key in sorted(known - state.keys())]
            problems += [f"{key} has no place in this architecture" for key in sorted(state.keys() - known)]
            if problems:
                more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
                raise CheckpointError(f"{path}: {kind}: {'; '.join(problems[:5])}{more}")

    def _add_moments(self, optimizer: dict[str, Any]) -> int | None:
        """Find each parameter's moments by its number: the published optimizer counts in the order of registration."""
        states = optimizer.get("state") or {}
        if not states:
            return None
        order = [POSITIONS, *(key for key in self._tensors[WEIGHTS] if is_published_parameter(key))]
        named = {key: states[index] for index, key in enumerate(order) if index in states}
        if len(named) != len(states) or len(named) != len(order) - 1:
            raise CheckpointError(f"{self._file.path}: optimizer_state_dict holds the state of {len(states)} parameters, "
                                  f"expected {len(order) - 1}")
        for kind in MOMENTS:
            self._tensors[kind] = {key: state[kind] for key, state in named.items()}
        return int(self._file.item(next(iter(named.values()))["step"]))

    def _new_ledger(self, kind: str) -> Ledger:
        ledger = Ledger(f"{self._file.path}, {kind}")
        for key, value in self._tensors[kind].items():
            ledger.expect(key, value.numel())
        return ledger
