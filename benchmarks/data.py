"""How fast latents come from disk: packed shards, one npz file an image; opening a large index."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import torch

from benchmarks.processes import in_fresh_process, process_memory
from benchmarks.timing import Result, interleave, wall_clock
from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.data import LatentDataset, build_dataset, sample_indices
from promoe_ds.data.shards import LatentIndex, write_shard

IMAGENET_IMAGES = 1_281_167
_SHARD, _BATCH, _CLASSES = 4096, 256, 1000
_SHAPE, _EMPTY = (8, 32, 32), (8, 2, 2)
#: One npz file for so many packed records: they are slow, and an eighth of them is enough.
_NPZ_SHARE = 8


def benchmark_data(
    folder: Path, *, rounds: int = 7, records: int = 8192, index_records: int = IMAGENET_IMAGES
) -> Result:
    """Time the loaders on synthetic latents; all but one draw flips and posteriors as training
    does.

    Figures: medians over rounds, in records a second of one process: by the clock, and by the
    processor time of all its threads; and seconds and megabytes of a process of its own that opens
    an index of ImageNet's size, whose records are small.
    Args:
        folder: empty; takes records x 72 KB, and 0.5 GB for the index.
        rounds: of each candidate, in turn; the median counts.
        records: a multiple of 256.
    """
    candidates = _make_candidates(folder, records)
    # The first round fills the page cache.
    timings = interleave(
        {name: _epoch(*candidate) for name, candidate in candidates.items()},
        rounds=rounds,
        warmup=1,
    )
    wall = {name: 1e3 * len(candidates[name][0]) / one.wall_ms for name, one in timings.items()}
    cpu = {name: 1e3 * len(candidates[name][0]) / one.cpu_ms for name, one in timings.items()}
    shards = _write_packed(folder / "imagenet", index_records, _EMPTY)
    for _ in range(2):  # the first process waits for what was just written to reach the disk
        seconds, megabytes = in_fresh_process(_open, folder / "imagenet")
    over = [rates["packed"] / rates["npz, 8 threads"] for rates in (wall, cpu)]
    return Result(
        suite="data",
        settings={"rounds": rounds, "records": records},
        figures={
            "wall": wall,
            "cpu": cpu,
            "index_records": index_records,
            "index_shards": shards,
            "index_seconds": seconds,
            "index_megabytes": megabytes,
        },
        text=[
            (
                f"{records} records of {'x'.join(map(str, _SHAPE))} fp32, batches of {_BATCH} in "
                f"shuffled order, page cache warm, median of {rounds} rounds"
            ),
            f"{'records a second':32}{'by the clock':>14}{'by processor time':>20}",
            *(f"{name:32}{wall[name]:14,.0f}{cpu[name]:20,.0f}" for name in wall),
            f"{'packed over npz, 8 threads':32}{over[0]:14.1f}{over[1]:20.1f}",
            (
                f"opening {index_records:,} records in {shards} shards: {seconds:.2f} s, "
                f"{megabytes:.0f} MB in all for the process"
            ),
        ],
    )


def _make_candidates(folder: Path, records: int) -> dict[str, tuple[LatentDataset, bool]]:
    """Write the records and return their loaders by name, each with whether it draws."""
    _write_packed(folder / "packed", records, _SHAPE)
    _write_npz(folder / "npz", records // _NPZ_SHARE)
    packed, npz, one_thread = (
        build_dataset(_config(folder / kind, **more))
        for kind, more in (("packed", {}), ("npz", {}), ("npz", {"workers": 1}))
    )
    return {
        "packed, means": (packed, False),
        "packed": (packed, True),
        "npz, 8 threads": (npz, True),
        "npz, 1 thread": (one_thread, True),
    }


def _epoch(dataset: LatentDataset, draws: bool) -> Callable[[], None]:
    """Return what takes every record once, in another order at each call."""
    rounds, size = count(), len(dataset)

    def run() -> None:
        first = next(rounds) * size
        for start in range(first, first + size, _BATCH):
            indices = sample_indices(size, seed=0, start=start, count=_BATCH)
            dataset.take(indices, np.arange(start, start + _BATCH) if draws else None)

    return run


def _config(path: Path, *, size: int = 32, **data: object) -> RunConfig:
    return config_from_dict(
        {
            "name": "benchmark",
            "model": {"preset": "s", "num_classes": _CLASSES, "input_size": size},
            "train": {"max_steps": 1},
            "routing": {"method": "dense"},
            "data": {"dataset": "latents", "path": str(path), "latent_scale": 0.18215, **data},
        },
        source="benchmark",
    )


def _write_packed(folder: Path, records: int, shape: tuple[int, ...]) -> int:
    """Write packed shards and their index; return their number."""
    folder.mkdir()
    random, shards = np.random.default_rng(0), []
    for first in range(0, records, _SHARD):
        rows = range(first, min(first + _SHARD, records))
        pair = torch.from_numpy(random.standard_normal((2, len(rows), *shape), dtype=np.float32))
        labels = torch.tensor([row % _CLASSES for row in rows])
        names = [f"n{row % _CLASSES:05d}/{row}.JPEG" for row in rows]
        path = folder / f"shard-{first // _SHARD:05d}.safetensors"
        shards.append(write_shard(path, list(pair), labels, names))
    LatentIndex(
        count=records,
        kind="moments",
        shape=shape,
        dtype="float32",
        flipped=True,
        image_size=8 * shape[1],
        vae=None,
        classes=tuple(f"n{number:05d}" for number in range(_CLASSES)),
        class_counts=(0,) * _CLASSES,
        shards=tuple(shards),
    ).write(folder)
    return len(shards)


def _write_npz(folder: Path, records: int) -> None:
    """Write one file an image, compressed as the published code does."""
    random = np.random.default_rng(0)
    for row in range(records):
        path = folder / f"n{row % _CLASSES:05d}" / f"{row}.latent.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        plain, mirrored = random.standard_normal((2, *_SHAPE), dtype=np.float32)
        np.savez_compressed(path, latent=plain, latent_flip=mirrored)


def _open(folder: Path) -> tuple[float, float]:
    """Open a folder of latents; return the seconds, and the megabytes that the process, all imports
    included, ever held.
    """
    config, started = _config(folder, size=_EMPTY[1]), wall_clock()
    build_dataset(config)
    return wall_clock() - started, process_memory("VmHWM") / 2**20
