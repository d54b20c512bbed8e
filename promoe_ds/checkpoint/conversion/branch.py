"""A run that starts from weights of a model like its own: a run, an export or a published file.

The model may have other classes, another resolution or another number of experts. What is the same
is copied, weights and averages bit for bit; what is not is made new, as at the start of a run. The
result is a checkpoint of step 0 without moments, from which training resumes as from any other.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from promoe_ds.checkpoint.conversion.convert import (
    Request,
    convert_source,
    open_source,
    with_latents_of,
)
from promoe_ds.checkpoint.conversion.sources import Source, is_export
from promoe_ds.checkpoint.load import differing_fields
from promoe_ds.checkpoint.manifest import list_checkpoints, named_checkpoints, read_manifest
from promoe_ds.checkpoint.torch_file import load_torch
from promoe_ds.checkpoint.zero_files import MOMENTS, ROUTED
from promoe_ds.config.schema import RunConfig
from promoe_ds.config.section import read_yaml
from promoe_ds.errors import CheckpointError, ConfigError, explaining
from promoe_ds.logs import get_logger
from promoe_ds.model.init import fill_parameter
from promoe_ds.model.official import POSITIONS as PUBLISHED_POSITIONS
from promoe_ds.model.state import state_shapes
from promoe_ds.routing import ROUTERS

_LOG = get_logger("checkpoint")

#: What may differ between the model that is there and the one that is trained.
_MODEL_FIELDS = (
    "num_classes",
    "input_size",
    "buckets",
    "position_scale",
    "condition",
    "text_width",
    "text_pooled_width",
    "text_length",
)
_LABELS = "label_embedding.table.weight"
_TEXT_VECTOR = "text_embedding.pooled.weight"
_PUBLISHED_LABELS = "y_embedder.embedding_table.weight"
#: Tells the router's rows of an expert and of its copy apart, relative to their spread.
_NOISE = 0.1
_LABEL_MAP = TypeAdapter(dict[int, int | Literal["new"]])


def find_start(
    path: Path, config: RunConfig, folder: Path, label_map: Path | None = None
) -> list[Path]:
    """Return the checkpoints, newest first, that a new run can start from.

    They are those at `path` if they fit the run as they are; else one that is made of them, under
    `folder`.
    Args:
        path: a checkpoint, a run, an export, or a file of the published code.
        label_map: YAML file, new label: old label, or `new`.
    Raises: CheckpointError or ConfigError for a path, a map or a difference that cannot be.
    """
    if path.is_file() and path.name == "latest":
        (path,) = named_checkpoints(path)
    if path.is_dir() and not is_export(path):
        found = named_checkpoints(path)
        saved = next(filter(None, map(_saved_config, found)), None)
        if saved is None:
            return found  # what is damaged, resuming says
        fits = not _differs(saved, config) and label_map is None
        if fits or _differs(saved, _with_own_fields(config, saved)):
            return found  # whatever else differs, loading says
    architecture = _published_architecture(path, config) if path.is_file() else None
    source = open_source(path, architecture)
    there = source.info.config
    if wrong := _differs(there, _with_own_fields(config, there)):
        raise CheckpointError(
            f"{path}: is of another architecture or objective: {'; '.join(wrong)}. A branch may"
            " change classes, input_size, position_scale, condition and number of experts"
        )
    shutil.rmtree(folder, ignore_errors=True)
    adapted = AdaptedSource(source, config, _read_label_map(label_map, path, there, config))
    convert_source(adapted, Request(destination=folder, to="deepspeed"))
    for line in adapted.report():
        _LOG.info("resume: %s", line)
    return list_checkpoints(folder)


def _saved_config(checkpoint: Path) -> RunConfig | None:
    """Return a checkpoint's config, None where its manifest cannot be read."""
    try:
        return read_manifest(checkpoint).run_config(checkpoint)
    except CheckpointError:
        return None


def _differs(saved: RunConfig, config: RunConfig) -> list[str]:
    return differing_fields(saved.model_dump(mode="json"), config, architecture_only=True)


def _with_own_fields(config: RunConfig, saved: RunConfig) -> RunConfig:
    """Return the run's config with what a branch may change as it was saved."""
    model = {name: getattr(saved.model, name) for name in _MODEL_FIELDS}
    experts = {"num_experts": saved.routing.num_experts}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "routing": config.routing.model_copy(update=experts),
        }
    )


def _config_of_start(saved: RunConfig, config: RunConfig) -> RunConfig:
    """Return the saved config, which loading compares with the run's, with those of the run's
    sections that must fit its model: the saved data set, say, may have other classes. Of the saved
    ones, loading asks for the experts' order and what latents were normalised by.
    """
    is_as_many = saved.routing.num_experts == config.routing.num_experts
    order = saved.parallel.expert_order if is_as_many else None
    return saved.model_copy(
        update={
            "model": config.model,
            "routing": config.routing,
            "parallel": config.parallel.model_copy(update={"expert_order": order}),
            "precision": config.precision,
            "data": with_latents_of(config, saved).data,
            "logging": config.logging,
        }
    )


def _published_architecture(path: Path, config: RunConfig) -> RunConfig:
    """Return the recipe with the classes and the resolution that a published file has."""
    content = load_torch(path, is_mapped=True)
    with explaining(f"{path}: is not laid out as the published code does it"):
        sections = [value for value in content.values() if isinstance(value, dict)]
        state = {
            key.split("module.")[-1]: value
            for section in (*sections, content)
            for key, value in section.items()
        }
        labels, positions = state[_PUBLISHED_LABELS], state[PUBLISHED_POSITIONS]
    # All published models are of square images.
    grid = round(positions.shape[-2] ** 0.5)
    model = {
        "num_classes": len(labels) - config.model.null_row,
        "input_size": grid * config.model.patch_size,
        "buckets": (),
        "position_scale": 1.0,
    }
    return config.model_copy(update={"model": config.model.model_copy(update=model)})


def _read_label_map(
    path: Path | None, source: Path, there: RunConfig, here: RunConfig
) -> dict[int, int] | None:
    """Return new label -> old label of the classes that keep their row; None: no map was given.

    Raises: ConfigError for a map that misses a class or names one that is not there.
    """
    if path is None:
        return None
    where = f"{source}: --label-map {path}"
    old, new = there.model.num_classes, here.model.num_classes
    try:
        given = _LABEL_MAP.validate_python(read_yaml(path.read_bytes(), str(path)))
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"{where}: expected lines as «0: 207» or «1: new», new label and old label:"
            f" {' '.join(str(error).split()[:20])}"
        ) from None
    missing = [label for label in range(new) if label not in given]
    wrong = [
        f"{label}: {source}"
        for label, source in given.items()
        if not 0 <= label < new or (source != "new" and not 0 <= source < old)
    ]
    if missing or wrong:
        problem = f"misses class {missing[0]}" if missing else f"has «{wrong[0]}»"
        raise ConfigError(
            f"{where}: {problem}: it must name each of the {new} classes of this run once, with"
            f" one of 0 ... {old - 1} or new"
        )
    return {label: source for label, source in given.items() if source != "new"}


class AdaptedSource:
    """A source seen through the config of a run whose model may differ."""

    optimizer_step: int | None = None

    def __init__(
        self, source: Source, config: RunConfig, label_map: dict[int, int] | None = None
    ) -> None:
        """Compare the shapes; no value is read yet.

        Args:
            label_map: new label -> old label; None keeps the rows of as many classes.
        """
        self._source, self._config, self._map = source, config, label_map
        self._dropped = set(source.shapes)
        self._counts: Counter[tuple[str, str]] = Counter()
        # Training computes the positions itself, whatever a file brings.
        self.shapes = state_shapes(config)
        self.kinds = {kind: list(self.shapes) for kind in source.kinds if kind not in MOMENTS}
        self._per_expert = {
            f"blocks.{index}.moe.router.{name}"
            for index in config.moe_block_indices
            for name in ROUTERS[config.routing.method].per_expert
        }
        self.info = replace(source.info, config=_config_of_start(source.info.config, config))

    def read(self, kind: str, name: str) -> Tensor:
        """Return one whole tensor of the run's model, fp32."""
        if name not in self._source.shapes:
            return self._new(name)
        value, shape = self._source.read(kind, name).float(), self.shapes[name]
        self._dropped.discard(name)
        is_same = tuple(value.shape) == shape
        if name == _LABELS and (self._map is not None or not is_same):
            return self._labels(value)
        if is_same:
            self._counts[_pattern(name), "copied"] += 1
            return value
        if ROUTED in name or name in self._per_expert:
            return self._experts(name, value)
        raise CheckpointError(
            f"{self.info.path}: {name} has shape {tuple(value.shape)} instead of {shape}"
        )

    def check(self, kind: str) -> int:
        """Raise CheckpointError unless every value of a kind was read, or is named as dropped."""
        for name in self._source.kinds[kind]:
            if name not in self.shapes:
                self._source.read(kind, name)
        return self._source.check(kind)

    def report(self) -> list[str]:
        """Return what was copied, made new or dropped, a line each; `*` is a block's number."""
        lines = []
        kinds = len(self.kinds)
        for done in sorted({done for _, done in self._counts}, key=lambda done: done != "copied"):
            names = sorted(name for name, how in self._counts if how == done)
            count = sum(self._counts[name, done] for name in names) // kinds
            lines.append(f"{count} tensors {done}: {', '.join(names)}")
        if dropped := sorted({_pattern(name) for name in self._dropped}):
            lines.append(f"dropped: {', '.join(dropped)}")
        return lines

    def _new(self, name: str) -> Tensor:
        """Return a tensor that was not there; what a text adds to the network starts at zero."""
        self._counts[_pattern(name), "made new"] += 1
        value = self._initial(name)
        if name.endswith("attention.text_kv.weight"):
            value[len(value) // 2 :] = 0.0  # values
        return value.zero_() if name == _TEXT_VECTOR else value

    def _initial(self, name: str) -> Tensor:
        value = torch.empty(self.shapes[name])
        fill_parameter(value, name, self._config.train.seed, self._config.routing)
        return value

    def _labels(self, table: Tensor) -> Tensor:
        """Return rows of the label map, new ones, and the null row, which is the last, if any."""
        kept, model = self._map or {}, self._config.model
        self._counts[_LABELS, f"with {len(kept)} old rows of {model.num_classes}"] += 1
        value = self._initial(_LABELS)
        for label, source in kept.items():
            value[label] = table[source]
        if model.null_row:
            value[-1] = table[-1]
        return value

    def _experts(self, name: str, value: Tensor) -> Tensor:
        """Return the experts that there were, again and again; a copy's router row is moved."""
        before, after = len(value), self.shapes[name][0]
        self._counts[_pattern(name), f"with {after} experts of {before}"] += 1
        result = value[torch.arange(after) % before].clone()
        if name in self._per_expert and after > before:
            initial = self._initial(name)
            if (spread := initial.std()) > 0:
                result[before:] += initial[before:] * (_NOISE * value.std() / spread)
        return result


def _pattern(name: str) -> str:
    return re.sub(r"(?<=blocks\.)\d+", "*", name)
