"""Whole tensors from a sharded checkpoint: one process, no GPU, no engine, one tensor in memory.

Under ZeRO 1 and 2 each rank's file holds flat fp32 slices of the parameters it owns (masters,
moments, moving averages) and a map from names to slices. Dense parameters are cut over all ranks; a
routed expert's over the ranks that replicate it. Without ZeRO the values are whole in the model and
optimizer files. Either way the result has the rank-blind model's names, experts stacked in the
order of their global ids. Every value that the files hold must be read exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promoe_ds.checkpoint.coverage import Coverage
from promoe_ds.checkpoint.manifest import MANIFEST, Manifest
from promoe_ds.checkpoint.torch_file import copy_range, copy_tensor, load_torch
from promoe_ds.checkpoint.zero_files import (
    MODEL_STATES,
    PREFIX,
    Piece,
    add_frozen,
    find_slices,
    find_tensors,
    is_weights,
)
from promoe_ds.errors import CheckpointError, explaining, first_few
from promoe_ds.model.state import buffer_names, frozen_names, shape_problems, state_shapes


def check_progress(content: dict[str, Any], folder: Path, manifest: Manifest) -> None:
    """Compare DeepSpeed's own count of steps and samples, where there is one, with the manifest's.

    Raises: CheckpointError naming both.
    """
    expected = {"global_steps": manifest.step, "global_samples": manifest.samples_seen}
    for key, count in expected.items():
        if (found := content.get(key, count)) != count:
            raise CheckpointError(
                f"{folder}: {MANIFEST} says {count} where {MODEL_STATES} has {key}={found}: one of "
                "them is damaged"
            )


class ShardedCheckpoint:
    """A checkpoint as training wrote it, of any ranks, expert parallelism, ZeRO stage, precision.

    kinds: what it holds, of "weights", averages by name, "exp_avg", "exp_avg_sq", each with the
        rank-blind names that it has: parameters, and for weights the routers' running state.
    shapes: every parameter's and buffer's whole shape, by name.
    buffers: the routers' running state, in the files' own memory.
    optimizer_step: the updates that the moments have seen; None where there are none.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Map the files; no value is read yet.

        Args:
            folder: a checkpoint that was verified; manifest: its manifest.
        Raises: CheckpointError naming the file that is missing or damaged, or what does not fit the
            manifest.
        """

        def open_file(name: str) -> Any:
            if name not in manifest.files:
                raise CheckpointError(
                    f"{folder / MANIFEST}: does not list {name}, which its layout needs"
                )
            return load_torch(folder / name, is_mapped=True)

        self.folder = folder
        config, layout = manifest.run_config(folder), manifest.layout
        model = open_file(MODEL_STATES)
        with explaining(f"{folder}: its files are not what {MANIFEST} says of them, {layout}"):
            check_progress(model, folder, manifest)
            if layout.zero_stage > 0:
                contents = find_slices(open_file, layout, model, folder)
            else:
                contents = find_tensors(open_file, layout, model, config)
            self._frozen = frozenset(frozen_names(config))
            if self._frozen:
                add_frozen(self._frozen, contents, open_file, layout, model, config)
            self.buffers = {
                name: model["module"][f"{PREFIX}{name}"] for name in buffer_names(config)
            }
            self._tensors, self._pieces = contents.tensors, contents.pieces
            sizes = {name: math.prod(shape) for name, shape in contents.shapes.items()}
            if wrong := [
                f"{found} of {size} values of {name} ({kind})"
                for kind, pieces in self._pieces.items()
                for name, size in sizes.items()
                if (found := sum(count for *_, count in pieces.get(name, ()))) != size
            ]:
                raise CheckpointError(f"{folder}: the files hold {first_few(wrong)}")
            self.shapes = contents.shapes | {
                name: tuple(value.shape) for name, value in self.buffers.items()
            }
        if problems := shape_problems(self.shapes, state_shapes(config)):
            raise CheckpointError(
                f"{folder}: its files do not fit the config in {MANIFEST}: {first_few(problems)}"
            )
        self.kinds = {
            kind: [*contents.shapes, *(self.buffers if is_weights(kind) else ())]
            for kind in self._tensors
        }
        self.optimizer_step = contents.optimizer_step
        self._coverage = {
            kind: Coverage(
                f"{folder}, {kind}", {key: value.numel() for key, value in tensors.items()}
            )
            for kind, tensors in self._tensors.items()
        }

    def move_experts(self, sources: Mapping[str, list[int]]) -> None:
        """Read tensors of experts in another order from now on.

        Args:
            sources: name of such a tensor -> where each place's expert is in the checkpoint.
        """
        for name, places in sources.items():
            if name in self.buffers:
                self.buffers[name] = copy_tensor(self.buffers[name])[places]
                continue
            size = math.prod(self.shapes[name][1:])
            for pieces in self._pieces.values():
                pieces[name] = [
                    piece for place in places for piece in _cut(pieces[name], place * size, size)
                ]

    def read(self, kind: str, name: str) -> Tensor:
        """Return one whole tensor, fp32, in memory of its own.

        Raises: CheckpointError naming the file or tensor that is missing or does not fit.
        """
        if name in self.buffers:
            return copy_tensor(self.buffers[name]).float()
        out = torch.empty(self.shapes[name])
        self.read_into(out.view(-1), kind, name, 0)
        return out

    def read_into(self, out_N: Tensor, kind: str, name: str, start: int) -> None:
        """Fill a flat fp32 tensor with the values [start, start + N) of a whole parameter.

        Raises: CheckpointError naming the file or tensor that is missing or does not fit.
        """
        if name not in self._pieces.get(kind, {}):
            raise CheckpointError(
                f"{self.folder}: holds no {kind} of {name}, only {', '.join(self.kinds)}"
            )
        position = 0
        for key, first, count in _cut(self._pieces[kind][name], start, out_N.numel()):
            with explaining(f"{self.folder / key}: {kind} of {name} does not fit"):
                out = out_N[position : position + count]
                tensor = self._tensors[kind][key]
                if name in self._frozen:  # of the type that the network computes in
                    out.copy_(tensor.reshape(-1)[first : first + count])
                else:
                    copy_range(out, tensor, first)
            self._coverage[kind].add(key, first, first + count)
            position += count

    def check(self, kind: str) -> int:
        """Return how many values of `kind` were read; every value must be, exactly once.

        Raises: CheckpointError naming what was not read, or read twice.
        """

        def is_padding(key: str, start: int, stop: int) -> bool:
            return not self._tensors[kind][key].view(-1)[start:stop].any()

        return self._coverage[kind].check(is_padding)


def _cut(pieces: list[Piece], start: int, count: int) -> Iterator[Piece]:
    """Yield the pieces of the values [start, start + count) of what `pieces` are together."""
    position, stop = 0, start + count
    for key, first, size in pieces:
        low, high = max(start, position), min(stop, position + size)
        if low < high:
            yield key, first + low - position, high - low
        position += size
