"""Files of the published code, behind the reader that all formats share."""

from __future__ import annotations

import re
from argparse import Namespace
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
from promoe_ds.model.state import POSITIONS as OUR_POSITIONS
from promoe_ds.model.state import state_shapes

#: The published code's name of each set of weights, and those of DiT and other relatives.
_SECTIONS = {WEIGHTS: ("model_state_dict", "model", "state_dict"), EMA: ("ema_model_state_dict", "ema")}
#: What DistributedDataParallel and torch.compile put in front of names, in any order; the latter also within.
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
_HELD_BY_FP32 = (torch.float32, torch.bfloat16, torch.float16)
#: Longer lists are cut in messages.
_SHOWN = 5


class OfficialSource:
    """A file of the published code: any of `model_state_dict`, `ema_model_state_dict`, or a bare state dict.

    Beside them `step` and `optimizer_state_dict`, where they are kept.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        """Open a published file of the architecture `config`."""
        self._file, self._config = TorchFile(path, [Namespace]), config
        self._file.check_records()
        self._shapes = state_shapes(config, own_positions=True)
        self._keys = {name: published_shapes(name, shape, config) for name, shape in self._shapes.items()}
        self._buffers = state_shapes(config, buffers_only=True).keys()
        content = self._file.content
        try:
            self._tensors, note = _read_sections(path, content)
            for kind in self._tensors:
                self._check_positions(kind)
                self._check_tensors(kind)
            self.optimizer_step = self._add_moments(content.get("optimizer_state_dict") or {})
            step = int(self._file.item(content.get("step", 0)))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: is not laid out as the published code does it ({type(error).__name__}: "
                                  f"{error})") from None
        self.facts = Facts(path=path, format="official", config=config, step=step, note=note,
                           samples_seen=step * config.train.global_batch_size)
        self._ledgers = {kind: self._new_ledger(kind) for kind in self._tensors}

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the file holds."""
        return tuple(self._tensors)

    def names(self, kind: str) -> list[str]:
        """Return the rank-blind names that `kind` has."""
        return [name for name in self._shapes
                if (is_weights(kind) or name not in self._buffers)
                and (name != OUR_POSITIONS or POSITIONS in self._tensors[kind])]

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

    def _check_positions(self, kind: str) -> None:
        """Compare the fixed table with the computed one; where they are equal it is no tensor of the kind."""
        state = self._tensors[kind]
        if POSITIONS not in state:
            raise CheckpointError(f"{self._file.path}: {POSITIONS} is missing")
        if not rename_official({POSITIONS: self._file.read(state[POSITIONS])}, self._config):
            del state[POSITIONS]

    def _check_tensors(self, kind: str) -> None:
        """Hold names, shapes and types of a kind against the architecture."""
        state = self._tensors[kind]
        known = {key: shape for name in self.names(kind) for key, shape in self._keys[name].items()}
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
        weights = next(iter(self._tensors.values()))
        order = [POSITIONS, *(key for key in weights if is_published_parameter(key) and key != POSITIONS)]
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


def _read_sections(path: Path, content: Any) -> tuple[dict[str, dict[str, Tensor]], str]:
    """Find the sets of weights, without the prefixes of wrappers; also say what was done.

    A state dict without a name is taken as the raw weights.
    """
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds no state dict, but a {type(content).__name__}")
    sections = {kind: content[name] for kind, names in _SECTIONS.items() for name in names if name in content}
    notes = []
    if not sections and all(isinstance(value, Tensor) for value in content.values()):
        sections = {WEIGHTS: content}
        notes.append("a bare state dict, taken as the raw weights")
    if not sections:
        names = [name for names in _SECTIONS.values() for name in names]
        raise CheckpointError(f"{path}: is no checkpoint of the published code: it has none of {', '.join(names)}, "
                              f"only {', '.join(map(str, list(content)[:_SHOWN]))}")
    for kind, state in sections.items():
        if wrong := [key for key, value in dict(state).items() if not isinstance(value, Tensor)]:
            raise CheckpointError(f"{path}: {kind}: {wrong[0]} is no tensor")
        sections[kind] = {_PREFIXES.sub("", key): value for key, value in state.items()}
        if len(sections[kind]) < len(state):
            raise CheckpointError(f"{path}: {kind}: the same parameter is there with and without a prefix "
                                  "(module., _orig_mod.): save one model's state dict")
        if removed := sorted({match[0] for key in state for match in _PREFIXES.finditer(key)}):
            notes.append(f"{kind}: removed the prefixes {', '.join(removed)}")
    return sections, "; ".join(notes)
