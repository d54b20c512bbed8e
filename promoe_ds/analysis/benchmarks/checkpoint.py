"""Conversion of a large sharded checkpoint, timed against a plain copy of its files, with the peak of resident memory.

The checkpoint is written file by file in the layout that training leaves (flat ZeRO slices, expert files), with random
values, so that models can be measured which this machine could not train.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from promoe_ds.analysis.benchmarks import machine_description
from promoe_ds.backends.expert_parallel import expert_file_key
from promoe_ds.checkpoint.engine import RecordingStorage, fragment_address
from promoe_ds.checkpoint.manifest import FileRecord, Layout, Manifest, checksum, step_folder
from promoe_ds.checkpoint.zero_reader import MODEL_STATES, MOMENTS, PREFIX
from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.config.optimizer import EMA
from promoe_ds.errors import CheckpointError
from promoe_ds.model.state import buffer_names, state_shapes
from promoe_ds.versions import package_versions

_STEP = 1
_MEGA = 10**6
#: Resident memory allowed beside 1.5 times the largest file.
_ALLOWANCE = 500 * _MEGA
_SAVED_BYTES, _SAVE_ROUNDS = 512 * _MEGA, 7


@dataclass(frozen=True, kw_only=True)
class CheckpointBenchmark:
    """Seconds, bytes and resident memory of a conversion and of a copy."""

    suite: str = "checkpoint"
    settings: dict[str, object]
    parameters: int
    checkpoint_bytes: int
    largest_file_bytes: int
    copy_seconds: float
    convert_seconds: float
    written_bytes: int
    peak_resident_bytes: int
    save_seconds: float
    plain_save_seconds: float
    machine: dict[str, object] = field(default_factory=machine_description)

    def lines(self) -> list[str]:
        """Return the result for a reader."""
        copied, converted = (self.checkpoint_bytes / seconds / _MEGA for seconds in (self.copy_seconds, self.convert_seconds))
        allowed = 1.5 * self.largest_file_bytes + _ALLOWANCE
        return [
            f"checkpoint: {self.settings}", f"{self.machine}",
            f"{self.parameters:,} parameters in {self.checkpoint_bytes / _MEGA:,.0f} MB, largest file "
            f"{self.largest_file_bytes / _MEGA:,.0f} MB",
            f"copy     {self.copy_seconds:8.1f} s {copied:8.0f} MB/s",
            f"convert  {self.convert_seconds:8.1f} s {converted:8.0f} MB/s of the checkpoint ({converted / copied:.2f} of the "
            f"copy), {self.written_bytes / _MEGA:,.0f} MB written and read back",
            f"peak resident memory {self.peak_resident_bytes / _MEGA:,.0f} MB, allowed {allowed / _MEGA:,.0f} MB",
            f"save of {_SAVED_BYTES / _MEGA:,.0f} MB {self.save_seconds:.2f} s, torch.save without checksum "
            f"{self.plain_save_seconds:.2f} s ({self.save_seconds / self.plain_save_seconds:.3f} of it, medians of {_SAVE_ROUNDS})",
        ]


def benchmark_checkpoint(config: RunConfig, folder: Path, *, ranks: int, with_optimizer: bool) -> CheckpointBenchmark:
    """Write a checkpoint of `ranks` ranks under `folder`, copy it, convert it to a single export, and clean up.

    Args:
        config: parallel.ep_size must divide ranks.
    """
    checkpoint = write_checkpoint(config, folder / "made", ranks=ranks)
    sizes = [path.stat().st_size for path in checkpoint.iterdir()]
    began = time.perf_counter()
    shutil.copytree(checkpoint, folder / "copy")
    _sync(folder / "copy")
    copied = time.perf_counter() - began
    shutil.rmtree(folder / "copy")
    tool = Path(__file__).parents[3] / "tools" / "convert_checkpoint.py"
    command = [sys.executable, str(tool), str(checkpoint), str(folder / "export"), "--to", "single",
               *(["--with-optimizer"] if with_optimizer else [])]
    saved, plain = time_saves(folder)
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    converted = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    written = sum(path.stat().st_size for path in (folder / "export").iterdir())
    result = CheckpointBenchmark(
        settings={"recipe": config.name, "ranks": ranks, "ep_size": config.parallel.ep_size, "zero_stage": 2,
                  "with_optimizer": with_optimizer}, parameters=sum(torch.Size(s).numel() for s in state_shapes(config).values()),
        checkpoint_bytes=sum(sizes), largest_file_bytes=max(sizes), copy_seconds=copied, convert_seconds=converted,
        written_bytes=written, peak_resident_bytes=peak, save_seconds=saved, plain_save_seconds=plain)
    shutil.rmtree(folder / "export")
    shutil.rmtree(folder / "made")
    return result


def time_saves(folder: Path) -> tuple[float, float]:
    """Return the median seconds of saving a file as training does, with its checksum, and of a plain torch.save; both flushed."""
    state, path, seconds = {"x": torch.rand(_SAVED_BYTES // 4)}, folder / "saved.pt", ([], [])
    for _ in range(_SAVE_ROUNDS):
        for times, save in zip(seconds, (_save_with_checksum, _save_plainly), strict=True):
            path.unlink(missing_ok=True)
            began = time.perf_counter()
            save(state, path)
            times.append(time.perf_counter() - began)
    path.unlink()
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _save_with_checksum(state: dict[str, torch.Tensor], path: Path) -> None:
    storage = RecordingStorage()
    storage.save(state, str(path))
    if storage.failure is not None:
        raise CheckpointError(storage.failure)


def _save_plainly(state: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def write_checkpoint(config: RunConfig, root: Path, *, ranks: int) -> Path:
    """Write a ZeRO 2 checkpoint of random fp32 values as training would leave it; one rank's values are in memory at a time."""
    ep_size = config.parallel.ep_size
    config = config_from_dict(config.model_dump(mode="json"), source="benchmark")
    folder = root / step_folder(_STEP)
    folder.mkdir(parents=True)
    shapes, buffers = state_shapes(config), set(buffer_names(config))
    routed = {name: (shape[0] // ep_size, *shape[1:]) for name, shape in shapes.items() if ".moe.routed." in name}
    dense = {name: shape for name, shape in shapes.items() if name not in routed and name not in buffers}
    groups = [(dense, ranks), (routed, ranks // ep_size)]
    torch.manual_seed(0)
    module = {f"{PREFIX}{name}": torch.rand(shape) for name, shape in shapes.items() if name not in routed}
    torch.save({"module": module, "param_shapes": [
        {f"{PREFIX}{name}": torch.Size(shape) for name, shape in group.items()} for group, _ in groups]}, folder / MODEL_STATES)
    del module
    _write_expert_files(folder, config, routed)
    for rank in range(ranks):
        _write_rank(folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", rank, groups, ep_size)
    files = {path.name: FileRecord(path.stat().st_size, checksum(path)) for path in folder.iterdir()}
    layout = Layout(world_size=ranks, ep_size=ep_size, dispatch=config.parallel.resolved_dispatch, zero_stage=2, precision="fp32")
    Manifest(step=_STEP, samples_seen=config.train.global_batch_size, layout=layout, config=config.model_dump(mode="json"),
             files=files, versions=package_versions()).write(folder)
    return folder


def _write_expert_files(folder: Path, config: RunConfig, routed: dict[str, tuple[int, ...]]) -> None:
    for layer, block in enumerate(config.moe_block_indices):
        own = {name: shape[1:] for name, shape in routed.items() if name.startswith(f"blocks.{block}.")}
        for expert in range(config.routing.num_experts):
            values = {expert_file_key(f"{PREFIX}{name}", expert): torch.rand(shape) for name, shape in own.items()}
            torch.save(values, folder / f"layer_{layer}_expert_{expert}_{MODEL_STATES}")


def _write_rank(path: Path, rank: int, groups: list, ep_size: int) -> None:
    flats, states, mappings = [], {}, []
    for index, (shapes, partitions) in enumerate(groups):
        total = sum(torch.Size(shape).numel() for shape in shapes.values())
        size = -(-total // partitions)
        low = (rank if index == 0 else rank // ep_size) * size
        mapping, position, used = {}, 0, 0
        for name, shape in shapes.items():
            numel = torch.Size(shape).numel()
            begin, end = max(low, position), min(low + size, position + numel)
            if begin < end:
                mapping[f"{PREFIX}{name}"] = fragment_address(start=begin - low, numel=end - begin)
                used = end - low
            position += numel
        values = [torch.rand(size) for _ in range(4)]
        for value in values:
            value[used:] = 0
        flats.append(values[0])
        states[index] = {"step": torch.tensor(1.0), **dict(zip((*MOMENTS, EMA), values[1:], strict=True))}
        mappings.append(mapping)
    torch.save({"optimizer_state_dict": {
        "single_partition_of_fp32_groups": flats, "base_optimizer_state": {"state": states, "param_groups": []},
        "param_slice_mappings": mappings, "partition_count": [partitions for _, partitions in groups]}}, path)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
