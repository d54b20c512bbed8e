"""What can be converted to: every format behind one writer, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from promoe_ds.checkpoint.conversion.pipeline_folder import (
    KEY_PREFIX,
    PIPELINE_STEM,
    TRANSFORMER,
    write_pipeline_configs,
)
from promoe_ds.checkpoint.manifest import (
    CONVERTED,
    FileRecord,
    Layout,
    Manifest,
    checksum,
    step_folder,
)
from promoe_ds.checkpoint.torch_file import TorchFileWriter
from promoe_ds.checkpoint.zero_files import MODEL_STATES, MOMENTS, PREFIX, WEIGHTS, is_weights
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import CheckpointError
from promoe_ds.files import replace_text
from promoe_ds.model.export import TRAINING_STEM, WEIGHTS_STEM, write_export_config
from promoe_ds.model.official import (
    POSITIONS,
    is_published_parameter,
    published_order,
    published_shapes,
    to_official,
)
from promoe_ds.model.shards import MAX_SHARD_BYTES, ShardWriter, digest
from promoe_ds.model.state import POSITIONS as OUR_POSITIONS
from promoe_ds.versions import versions_of


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a target will hold.

    kinds: kind -> name -> shape, in the order of writing; the first kind is the model's weights.
    """

    config: RunConfig
    step: int
    samples_seen: int
    optimizer_step: int | None
    dtype: torch.dtype
    kinds: dict[str, dict[str, tuple[int, ...]]]
    buffers: frozenset[str]
    origin: dict[str, Any]
    averages_since: dict[str, int]
    max_shard_bytes: int = MAX_SHARD_BYTES
    vae: str | None = None
    text_encoder: str | None = None

    def dtype_of(self, kind: str, name: str) -> torch.dtype:
        """Return the type that a tensor is written in: the moments and the routers' running state
        stay fp32.
        """
        return self.dtype if is_weights(kind) and name not in self.buffers else torch.float32

    def empty(self, kind: str, name: str) -> Tensor:
        """Return a tensor of the right shape and type that takes no memory until touched."""
        return torch.empty(self.kinds[kind][name], dtype=self.dtype_of(kind, name))


class Target(Protocol):
    """A checkpoint in the making."""

    def write(self, kind: str, name: str, value: Tensor) -> str:
        """Write one tensor; return `digest` of it."""

    def close(self) -> None:
        """Write what is left, flushed to the disk."""


class SingleTarget:
    """A single export."""

    def __init__(self, folder: Path, content: Content) -> None:
        """Begin an export in `folder`."""
        self._folder, self._content = folder, content
        self._model, *self._others = content.kinds
        self._weights, self._training = (
            ShardWriter(folder, stem, max_bytes=content.max_shard_bytes)
            for stem in (WEIGHTS_STEM, TRAINING_STEM)
        )

    def write(self, kind: str, name: str, value: Tensor) -> str:
        """Write one tensor; return `digest` of it."""
        if kind == self._model:
            return self._weights.write(name, value)
        self._weights.close()  # they came first; what it still held is memory
        return self._training.write(f"{kind}/{name}", value)

    def close(self) -> None:
        """Write the files that are not full yet, and the config last."""
        self._weights.close()
        if self._others:
            self._training.close()
        content = self._content
        origin = {
            **content.origin,
            "kind": self._model,
            "training_state": self._others,
            "step": content.step,
            "samples_seen": content.samples_seen,
            "optimizer_step": content.optimizer_step,
            "averages_since": content.averages_since,
        }
        write_export_config(self._folder, content.config, origin)


class PipelineTarget:
    """A diffusers pipeline's folder."""

    def __init__(self, folder: Path, content: Content) -> None:
        """Begin a pipeline in `folder`."""
        (folder / TRANSFORMER).mkdir()
        self._weights = ShardWriter(
            folder / TRANSFORMER, PIPELINE_STEM, max_bytes=content.max_shard_bytes
        )
        kind = next(iter(content.kinds))
        origin = {
            **content.origin,
            "kind": kind,
            "step": content.step,
            "samples_seen": content.samples_seen,
            "own_positions": OUR_POSITIONS in content.kinds[kind],
        }
        write_pipeline_configs(folder, content.config, origin, content.vae, content.text_encoder)

    def write(self, kind: str, name: str, value: Tensor) -> str:
        """Write one tensor; return `digest` of it."""
        return self._weights.write(f"{KEY_PREFIX}{name}", value)

    def close(self) -> None:
        """Write the files that are not full yet."""
        self._weights.close()


class OfficialTarget:
    """A file as the published code writes it, `ckpt_step_N.pth`."""

    def __init__(self, folder: Path, content: Content) -> None:
        """Write the file's structure, and the position table where it is the computed one."""
        self._config = content.config
        self._tensors = {kind: _published_tensors(content, kind) for kind in content.kinds}
        raw, average, *moments = content.kinds
        skeleton: dict[str, Any] = {
            "step": content.step,
            "model_state_dict": self._tensors[raw],
            "ema_model_state_dict": self._tensors[average],
        }
        counted = [key for key in self._tensors[raw] if is_published_parameter(key)]
        states: dict[int, dict[str, Tensor]] = {}
        if moments:
            states = {
                index: {
                    "step": torch.empty(()),
                    **{kind: self._tensors[kind][key] for kind in moments},
                }
                for index, key in enumerate(counted)
                if key != POSITIONS
            }
            group = {**_optimizer_settings(content.config), "params": list(range(len(counted)))}
            skeleton["optimizer_state_dict"] = {"state": states, "param_groups": [group]}
        self._writer = TorchFileWriter(folder / f"ckpt_step_{content.step}.pth", skeleton)
        for kind in (raw, average):
            if OUR_POSITIONS not in content.kinds[kind]:
                table = to_official({}, content.config)[POSITIONS]
                self._writer.write(self._tensors[kind][POSITIONS], table)
        for state in states.values():  # one each: an optimizer counts in them
            self._writer.write(state["step"], torch.tensor(float(content.optimizer_step or 0)))

    def write(self, kind: str, name: str, value: Tensor) -> str:
        """Write one tensor, an expert stack to as many places as it has experts; return `digest` of
        it.
        """
        for key, piece in to_official({name: value}, self._config).items():
            if key != POSITIONS or name == OUR_POSITIONS:
                self._writer.write(self._tensors[kind][key], piece)
        return digest(value)

    def close(self) -> None:
        """Flush to the disk."""
        self._writer.close()


def _published_tensors(content: Content, kind: str) -> dict[str, Tensor]:
    """Return a kind's tensors under their published names, in order, untouched in memory."""
    table = {} if kind in MOMENTS else to_official({}, content.config)
    tensors = {key: torch.empty(value.shape) for key, value in table.items()}
    for name, shape in content.kinds[kind].items():
        for key, piece in published_shapes(name, shape, content.config).items():
            tensors[key] = torch.empty(piece, dtype=content.dtype_of(kind, name))
    return {key: tensors[key] for key in sorted(tensors, key=published_order)}


def _optimizer_settings(config: RunConfig) -> dict[str, Any]:
    """Return what the published optimizer, torch's AdamW, keeps of its settings."""
    settings = config.optimizer
    return {
        "lr": settings.lr,
        "betas": tuple(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": True,
        "decoupled_weight_decay": True,
    }


class TrainingTarget:
    """A checkpoint that training continues or starts from, on any ranks: whole tensors in one file,
    and a manifest.
    """

    def __init__(self, folder: Path, content: Content) -> None:
        """Write the file's structure."""
        self._content, self._folder = content, folder / step_folder(content.step)
        self._folder.mkdir()
        self._running_state: dict[str, Tensor] = {}
        self._tensors = {
            kind: {name: content.empty(kind, name) for name in named}
            for kind, named in content.kinds.items()
        }
        _, *states = content.kinds
        parameters = [name for name in content.kinds[WEIGHTS] if name not in content.buffers]
        skeleton: dict[str, Any] = {
            "module": {f"{PREFIX}{name}": place for name, place in self._tensors[WEIGHTS].items()}
        }
        step = {} if content.optimizer_step is None else {"step": torch.empty(())}
        if states:
            group = {
                "params": list(range(len(parameters))),
                "param_names": [f"{PREFIX}{name}" for name in parameters],
            }
            state = {
                index: step | {kind: self._tensors[kind][name] for kind in states}
                for index, name in enumerate(parameters)
            }
            skeleton["optimizer"] = {"param_groups": [group], "state": state}
        self._writer = TorchFileWriter(self._folder / MODEL_STATES, skeleton)
        for place in step.values():
            self._writer.write(place, torch.tensor(float(content.optimizer_step)))

    def write(self, kind: str, name: str, value: Tensor) -> str:
        """Write one tensor; return `digest` of it. The routers' running state belongs to the
        weights alone.

        Raises: CheckpointError if an average comes with another running state: the layout has room
            for one.
        """
        if name in self._content.buffers:
            known = self._running_state.setdefault(name, value)
            if not torch.equal(known, value):
                raise CheckpointError(
                    f"{name} of {kind} differs from that of the weights, and a deepspeed checkpoint"
                    " holds one: take one set of weights with --weights"
                )
        if kind == WEIGHTS or name not in self._content.buffers:
            self._writer.write(self._tensors[kind][name], value)
        return digest(value)

    def close(self) -> None:
        """Flush, then write the manifest and the pointer to it."""
        self._writer.close()
        path = self._folder / MODEL_STATES
        layout = Layout(world_size=1, ep_size=1, dispatch=CONVERTED, zero_stage=0, precision="fp32")
        Manifest(
            step=self._content.step,
            samples_seen=self._content.samples_seen,
            layout=layout,
            config=self._content.config.model_dump(mode="json"),
            versions=versions_of("deepspeed"),
            averages_since=self._content.averages_since,
            files={MODEL_STATES: FileRecord(path.stat().st_size, checksum(path))},
        ).write(self._folder)
        replace_text(self._folder.parent / "latest", self._folder.name)


TARGETS: dict[str, Callable[[Path, Content], Target]] = {
    "single": SingleTarget,
    "diffusers": PipelineTarget,
    "official": OfficialTarget,
    "deepspeed": TrainingTarget,
}
