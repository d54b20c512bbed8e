"""Files of the published code and its relatives, behind the reader that all formats share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from promoe_ds.checkpoint.conversion.sources import SourceInfo, StateSource
from promoe_ds.checkpoint.torch_file import check_records, copy_tensor, load_torch
from promoe_ds.checkpoint.zero_files import MOMENTS, WEIGHTS
from promoe_ds.config.optimizer import EMA
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import CheckpointError, explaining
from promoe_ds.model.official import (
    POSITIONS,
    is_published_parameter,
    published_shapes,
    rename_official,
)

#: The published code's name of each set of weights, and those of DiT and other relatives.
_SECTIONS = {
    WEIGHTS: ("model_state_dict", "model", "state_dict"),
    EMA: ("ema_model_state_dict", "ema"),
}
#: The optimizer's, likewise; DiT's, SiT's and DiffMoE's files have it beside `args`, and no `step`.
_OPTIMIZERS = ("optimizer_state_dict", "opt")
#: What DistributedDataParallel and torch.compile put before names, in any order; the latter also
#: within.
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
#: Longer lists are cut in messages.
_SHOWN = 5


class OfficialSource(StateSource):
    """A file of the published code: `model_state_dict`, `ema_model_state_dict`, or a state dict.

    Beside them `step` and `optimizer_state_dict`, where they are kept. DiffMoE's own files, like
    DiT's and SiT's, have `model`, `ema` and `opt`, whose updates are the step.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        """Open a published file of the architecture `config`."""
        content = load_torch(path, is_mapped=True)
        check_records(path)
        with explaining(f"{path}: is not laid out as the published code does it"):
            self._tensors, note = _read_sections(path, content)
            for state in self._tensors.values():
                _drop_fixed_positions(path, state, config)
            found = filter(None, (content.get(name) for name in _OPTIMIZERS))
            optimizer: dict[str, Any] = next(found, {})
            if states := optimizer.get("state"):
                self._tensors |= _read_moments(path, next(iter(self._tensors.values())), states)
                self.optimizer_step = int(next(iter(states.values()))["step"])
            step = int(content.get("step", self.optimizer_step or 0))
            note = "; ".join(filter(None, [note, _time_note(content, config)]))
            info = SourceInfo(
                path=path,
                format="official",
                config=config,
                step=step,
                note=note,
                samples_seen=step * config.train.global_batch_size,
            )
            super().__init__(info)
            self._keys = {
                name: published_shapes(name, shape, config) for name, shape in self.shapes.items()
            }
            for kind, tensors in self._tensors.items():
                types = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
                self._add_kind(kind, types, self._keys)

    def read(self, kind: str, name: str) -> Tensor:
        """Return one whole tensor and note that it was read."""
        values = {key: copy_tensor(self._tensors[kind][key]) for key in self._keys[name]}
        for key in values:
            self._coverage[kind].add(key)
        return rename_official(values, self.info.config)[name]


def _drop_fixed_positions(path: Path, state: dict[str, Tensor], config: RunConfig) -> None:
    """Drop the position table of a set of weights where it is the computed one."""
    if POSITIONS not in state:
        raise CheckpointError(f"{path}: {POSITIONS} is missing")
    if not rename_official({POSITIONS: copy_tensor(state[POSITIONS])}, config):
        del state[POSITIONS]


def _read_moments(
    path: Path, weights: dict[str, Tensor], states: dict[int, Any]
) -> dict[str, dict[str, Tensor]]:
    """Find moments by their numbers: the published optimizer counts as modules register."""
    counted = [key for key in weights if is_published_parameter(key) and key != POSITIONS]
    named = {key: states[index] for index, key in enumerate(counted, 1) if index in states}
    if not len(named) == len(states) == len(counted):
        raise CheckpointError(
            f"{path}: its optimizer holds the state of {len(states)} parameters, expected"
            f" {len(counted)}"
        )
    return {kind: {key: state[kind] for key, state in named.items()} for kind in MOMENTS}


def _time_note(content: dict[str, Any], config: RunConfig) -> str:
    """Return what to know of a file without the published code's own names, if it is a flow's."""
    is_flow = config.diffusion.objective == "rectified_flow"
    if not (is_flow and "ema" in content and "opt" in content and config.model.time == "noise"):
        return ""
    return (
        "taken as a flow whose network sees noise at 1000; SiT's and DiffMoE's see data at 1:"
        " --set model.time=data"
    )


def _read_sections(path: Path, content: Any) -> tuple[dict[str, dict[str, Tensor]], str]:
    """Find the sets of weights, without the prefixes of wrappers; also say what was done.

    A state dict without a name is taken as the raw weights.
    """
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a state dict: save the model's"
            " state_dict()"
        )
    sections = {
        kind: content[name]
        for kind, names in _SECTIONS.items()
        for name in names
        if name in content
    }
    notes = []
    if not sections and all(isinstance(value, Tensor) for value in content.values()):
        sections = {WEIGHTS: content}
        notes.append("a bare state dict, taken as the raw weights")
    if not sections:
        names = [name for names in _SECTIONS.values() for name in names]
        raise CheckpointError(
            f"{path}: is no checkpoint of the published code: it has none of {', '.join(names)}, "
            f"only {', '.join(map(str, list(content)[:_SHOWN]))}"
        )
    for kind, state in sections.items():
        if wrong := [key for key, value in state.items() if not isinstance(value, Tensor)]:
            raise CheckpointError(f"{path}: {kind}: {wrong[0]} is no tensor")
        sections[kind] = {_PREFIXES.sub("", key): value for key, value in state.items()}
        if len(sections[kind]) < len(state):
            raise CheckpointError(
                f"{path}: {kind}: the same parameter is there with and without a prefix "
                "(module., _orig_mod.): save one model's state dict"
            )
        if removed := sorted({match[0] for key in state for match in _PREFIXES.finditer(key)}):
            notes.append(f"{kind}: removed the prefixes {', '.join(removed)}")
    return sections, "; ".join(notes)
