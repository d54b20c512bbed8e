"""Conversion of a large sharded checkpoint, timed against a plain copy of its files, with the peak
of resident memory.

The checkpoint is written file by file in the layout that training leaves (flat ZeRO slices, expert
files), with random values, so that models can be measured which this machine could not train.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.processes import in_fresh_process
from benchmarks.timing import Result, interleave, wall_clock
from promoe_ds.backends.deepspeed_private import fragment_address
from promoe_ds.backends.expert_parallel import expert_file_key
from promoe_ds.checkpoint.engine import RecordingStorage
from promoe_ds.checkpoint.manifest import FileRecord, Layout, Manifest, checksum, step_folder
from promoe_ds.checkpoint.zero_files import MODEL_STATES, MOMENTS, PREFIX, ROUTED
from promoe_ds.config import RunConfig, change_config
from promoe_ds.config.optimizer import EMA
from promoe_ds.errors import CheckpointError, ConfigError
from promoe_ds.model.state import buffer_names, state_shapes
from promoe_ds.versions import versions_of

_MEGA = 10**6
#: Resident memory allowed beside 1.5 times the largest file.
_ALLOWANCE = 500 * _MEGA
_SAVED_BYTES, _SAVE_ROUNDS = 512 * _MEGA, 7
_TOOL = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"
_Shapes = dict[str, tuple[int, ...]]


def benchmark_checkpoint(
    config: RunConfig, folder: Path, *, ranks: int, with_optimizer: bool
) -> Result:
    """Write a checkpoint of `ranks` ranks under `folder`, copy it, convert it to a single export,
    and clean up.

    Raises: ConfigError for ranks that parallel.ep_size does not divide.
    """
    ep_size = config.parallel.ep_size
    if ranks < 1 or ranks % ep_size:
        raise ConfigError(f"--ranks {ranks}: must be a multiple of --ep-size {ep_size}")
    checkpoint, export = write_checkpoint(config, folder, ranks=ranks), folder / "export"
    sizes = [path.stat().st_size for path in checkpoint.iterdir()]
    began = wall_clock()
    for path in Path(shutil.copytree(checkpoint, folder / "copy")).iterdir():
        _flush(path)
    copied = wall_clock() - began
    shutil.rmtree(folder / "copy")
    command = [sys.executable, str(_TOOL), str(checkpoint), str(export), "--to", "single"]
    converted, peak = in_fresh_process(_run, command + ["--with-optimizer"] * with_optimizer)
    figures = {
        "parameters": sum(math.prod(shape) for shape in state_shapes(config).values()),
        "checkpoint_bytes": sum(sizes),
        "largest_file_bytes": max(sizes),
        "copy_seconds": copied,
        "convert_seconds": converted,
        "written_bytes": sum(path.stat().st_size for path in export.iterdir()),
        "peak_resident_bytes": peak,
        **time_saves(folder),
    }
    shutil.rmtree(export)
    shutil.rmtree(checkpoint)
    settings = {
        "recipe": config.name,
        "ranks": ranks,
        "ep_size": ep_size,
        "zero_stage": 2,
        "with_optimizer": with_optimizer,
    }
    return Result(suite="checkpoint", settings=settings, figures=figures, text=_lines(figures))


def _run(command: list[str]) -> tuple[float, int]:
    """Return seconds and peak memory of a command; not in a process that held much itself, whose
    peak a child inherits.
    """
    began = wall_clock()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = wall_clock() - began
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _lines(figures: dict[str, Any]) -> list[str]:
    mega = {name: value / _MEGA for name, value in figures.items()}
    copied, converted = (
        mega["checkpoint_bytes"] / figures[f"{kind}_seconds"] for kind in ("copy", "convert")
    )
    saved, plain = figures["save_seconds"], figures["plain_save_seconds"]
    allowed = 1.5 * mega["largest_file_bytes"] + _ALLOWANCE / _MEGA
    return [
        (
            f"{figures['parameters']:,} parameters in {mega['checkpoint_bytes']:,.0f} MB, largest"
            f" file {mega['largest_file_bytes']:,.0f} MB"
        ),
        f"copy     {figures['copy_seconds']:8.1f} s {copied:8.0f} MB/s",
        (
            f"convert  {figures['convert_seconds']:8.1f} s {converted:8.0f} MB/s of the checkpoint"
            f" ({converted / copied:.2f} of the copy), {mega['written_bytes']:,.0f} MB written and"
            " read back"
        ),
        f"peak resident memory {mega['peak_resident_bytes']:,.0f} MB, allowed {allowed:,.0f} MB",
        (
            f"save of {_SAVED_BYTES / _MEGA:,.0f} MB {saved:.2f} s, torch.save without checksum"
            f" {plain:.2f} s ({saved / plain:.3f} of it, medians of {_SAVE_ROUNDS})"
        ),
    ]


def time_saves(folder: Path) -> dict[str, float]:
    """Return the median seconds of saving a file as training does, with its checksum, and of a
    plain torch.save; both flushed.
    """
    state, path = {"x": torch.rand(_SAVED_BYTES // 4)}, folder / "saved.pt"

    def with_checksum() -> None:
        path.unlink(missing_ok=True)
        storage = RecordingStorage()
        storage.save(state, str(path))
        if storage.failure is not None:
            raise CheckpointError(storage.failure)

    def plainly() -> None:
        path.unlink(missing_ok=True)
        torch.save(state, path)
        _flush(path)

    timings = interleave(
        {"plain_save_seconds": plainly, "save_seconds": with_checksum},
        rounds=_SAVE_ROUNDS,
        warmup=0,
    )
    path.unlink()
    return {name: timing.wall_ms / 1e3 for name, timing in timings.items()}


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_checkpoint(config: RunConfig, root: Path, *, ranks: int) -> Path:
    """Write a ZeRO 2 checkpoint of random fp32 values as training would leave it; one rank's values
    are in memory at a time.
    """
    config, ep_size = change_config(config), config.parallel.ep_size
    folder = root / step_folder(1)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    dense, routed = _write_model(config, folder)
    for rank in range(ranks):
        groups = [_slice(dense, ranks, rank), _slice(routed, ranks // ep_size, rank // ep_size)]
        flats, states, mappings = zip(*groups, strict=True)
        state = {
            "single_partition_of_fp32_groups": list(flats),
            "param_slice_mappings": list(mappings),
            "base_optimizer_state": {"state": dict(enumerate(states)), "param_groups": []},
            "partition_count": [ranks, ranks // ep_size],
        }
        file = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, file)
    Manifest(
        step=1,
        samples_seen=config.train.global_batch_size,
        config=config.model_dump(mode="json"),
        layout=Layout(
            world_size=ranks,
            ep_size=ep_size,
            dispatch=config.parallel.resolved_dispatch,
            zero_stage=2,
            precision="fp32",
        ),
        versions=versions_of("deepspeed"),
        files={
            path.name: FileRecord(path.stat().st_size, checksum(path)) for path in folder.iterdir()
        },
    ).write(folder)
    return folder


def _write_model(config: RunConfig, folder: Path) -> tuple[_Shapes, _Shapes]:
    """Write the model's and the experts' files; return the shapes of a rank's dense and routed
    parameters by their names in files.
    """
    shapes = {f"{PREFIX}{name}": shape for name, shape in state_shapes(config).items()}
    experts = {name: shape for name, shape in shapes.items() if ROUTED in name}
    kept = experts.keys() | {f"{PREFIX}{name}" for name in buffer_names(config)}
    dense = {name: shape for name, shape in shapes.items() if name not in kept}
    ep_size = config.parallel.ep_size
    routed = {name: (shape[0] // ep_size, *shape[1:]) for name, shape in experts.items()}
    groups = [{name: torch.Size(shape) for name, shape in one.items()} for one in (dense, routed)]
    module = {name: torch.rand(shape) for name, shape in shapes.items() if name not in experts}
    torch.save({"module": module, "param_shapes": groups}, folder / MODEL_STATES)
    for layer, block in enumerate(config.moe_block_indices):
        own = {name: shape for name, shape in experts.items() if f"blocks.{block}." in name}
        for expert in range(config.routing.num_experts):
            content = {
                expert_file_key(name, expert): torch.rand(shape[1:]) for name, shape in own.items()
            }
            torch.save(content, folder / f"layer_{layer}_expert_{expert}_{MODEL_STATES}")
    return dense, routed


def _slice(shapes: _Shapes, partitions: int, index: int) -> tuple[Tensor, dict, dict]:
    """Return one partition of a parameter group: flat values, their state, where each parameter
    is.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    size = -(-sum(sizes.values()) // partitions)
    low, position, mapping = index * size, 0, {}
    for name, numel in sizes.items():
        begin, end = max(low, position), min(low + size, position + numel)
        if begin < end:
            mapping[name] = fragment_address(start=begin - low, numel=end - begin)
        position += numel
    values = [torch.rand(size) for _ in range(4)]
    for value in values:
        value[max(0, position - low) :] = 0  # the padding of the last partition
    state = dict(zip((*MOMENTS, EMA), values[1:], strict=True))
    return values[0], {"step": torch.tensor(1.0), **state}, mapping
