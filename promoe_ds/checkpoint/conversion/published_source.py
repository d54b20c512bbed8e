"""Files of the published code, behind the reader that all formats share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promoe_ds.checkpoint.conversion.sources import Facts
from promoe_ds.checkpoint.coverage import Ledger
from promoe_ds.checkpoint.torch_file import TorchFile
from promoe_ds.checkpoint.zero_reader import MOMENTS, WEIGHTS, is_weights
from promoe_ds.config.optimizer import EMA
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import CheckpointError
from promoe_ds.model.official import POSITIONS, is_published_parameter, published_shapes, rename_official
from promoe_ds.model.state import state_shapes

_SECTIONS = {WEIGHTS: "model_state_dict", EMA: "ema_model_state_dict"}
_HELD_BY_FP32 = (torch.float32, torch.bfloat16, torch.float16)
#: Longer lists are cut in messages.
_SHOWN = 5


class OfficialSource:
    """A file of the published code: `step`, `model_state_dict`, `ema_model_state_dict`, `optimizer_state_dict`."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        """Open a published file of the architecture `config`."""
        self._file, self._config = TorchFile(path), config
        self._file.check_records()
        self._shapes = state_shapes(config)
        self._keys = {name: published_shapes(name, shape, config) for name, shape in self._shapes.items()}
        self._buffers = state_shapes(config, buffers_only=True).keys()
        content = self._file.content
        try:
            self._tensors = _read_sections(path, content)
            for kind, state in self._tensors.items():
                self._check_positions(state)
                self._check_tensors(kind)
            self.optimizer_step = self._add_moments(content.get("optimizer_state_dict") or {})
            step = int(self._file.item(content.get("step", 0)))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: is not laid out as the published code does it ({type(error).__name__}: "
                                  f"{error})") from None
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

    def _check_positions(self, state: dict[str, Tensor]) -> None:
        """Hold the fixed table against the computed one; it is no weight."""
        if POSITIONS not in state:
            raise CheckpointError(f"{self._file.path}: {POSITIONS} is missing")
        rename_official({POSITIONS: self._file.read(state.pop(POSITIONS))}, self._config)

    def _check_tensors(self, kind: str) -> None:
        """Hold names, shapes and types of a kind against the architecture."""
        state = self._tensors[kind]
        known = {key: shape for name, shapes in self._keys.items() if is_weights(kind) or name not in self._buffers
                 for key, shape in shapes.items()}
        problems = [f"{key} is missing" for key in sorted(known.keys() - state.keys())]
        problems += [f"{key} has no place in this architecture" for key in sorted(state.keys() - known.keys())]
        problems += [f"{key} has shape {tuple(state[key].shape)} instead of {shape}" for key, shape in known.items()
                     if key in state and tuple(state[key].shape) != shape]
        problems += [f"{key} is of type {value.dtype}, which fp32 does not hold" for key, value in state.items()
                     if value.dtype not in _HELD_BY_FP32]
        if problems:
            more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise CheckpointError(f"{self._file.path}: {kind}: {'; '.join(problems[:_SHOWN])}{more}")

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
            self._check_tensors(kind)
        return int(self._file.item(next(iter(named.values()))["step"]))

    def _new_ledger(self, kind: str) -> Ledger:
        ledger = Ledger(f"{self._file.path}, {kind}")
        for key, value in self._tensors[kind].items():
            ledger.expect(key, value.numel())
        return ledger


def _read_sections(path: Path, content: Any) -> dict[str, dict[str, Tensor]]:
    if not isinstance(content, dict) or _SECTIONS[WEIGHTS] not in content:
        raise CheckpointError(f"{path}: is no checkpoint of the published code: it has no {_SECTIONS[WEIGHTS]}")
    sections = {kind: dict(content[section]) for kind, section in _SECTIONS.items() if section in content}
    for kind, state in sections.items():
        if wrong := [key for key, value in state.items() if not isinstance(value, Tensor)]:
            raise CheckpointError(f"{path}: {_SECTIONS[kind]}: {wrong[0]} is no tensor")
    return sections
