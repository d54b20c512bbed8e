"""How fast latents come from disk: packed shards, one npz file an image, and opening an index of ImageNet's size."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from promoe_ds.analysis.benchmarks import machine_description
from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.data import build_dataset, sample_indices
from promoe_ds.data.index import LatentIndex, ShardRecord
from promoe_ds.data.shards import ShardContent, write_shard

IMAGENET_IMAGES = 1_281_167
_SHARD = 4096
_BATCH = 256
_SHAPE = (8, 32, 32)
_CLASSES = 1000
#: One npz file for so many packed records: they are slow, and an eighth of them tells as much.
_NPZ_SHARE = 8


@dataclass(frozen=True, kw_only=True)
class DataBenchmark:
    """Medians over rounds, in records a second of one process: by the clock, and by the processor time of all its threads.

    The index: seconds and megabytes of a process of its own.
    """

    suite: str = "data"
    rounds: int
    records: int
    wall: dict[str, float]
    cpu: dict[str, float]
    index_records: int
    index_shards: int
    index_seconds: float
    index_megabytes: float
    machine: dict[str, object] = field(default_factory=machine_description)

    def lines(self) -> list[str]:
        """Return the figures as lines of text."""
        over = [rates["packed"] / rates["npz, 8 threads"] for rates in (self.wall, self.cpu)]
        return [
            f"data: {self.machine}", f"{self.records} records of {'x'.join(map(str, _SHAPE))} fp32, batches of {_BATCH} in "
            f"shuffled order, page cache warm, median of {self.rounds} rounds", f"{'records a second':32}{'by the clock':>14}"
            f"{'by processor time':>20}",
            *(f"{name:32}{self.wall[name]:14,.0f}{self.cpu[name]:20,.0f}" for name in self.wall),
            f"{'packed over npz, 8 threads':32}{over[0]:14.1f}{over[1]:20.1f}",
            f"opening {self.index_records:,} records in {self.index_shards} shards: {self.index_seconds:.2f} s, "
            f"{self.index_megabytes:.0f} MB in all for the process"]


def benchmark_data(folder: Path, *, rounds: int = 7, records: int = 8192) -> DataBenchmark:
    """Time the loaders on made-up latents; all but one draw flips and posteriors as training does.

    Args:
        folder: empty; takes records x 72 KB, and 110 MB for a million empty records (sparse files of 84 GB).
        rounds: of each contender, in turn; the median counts.
        records: a multiple of 256.
    """
    _write_sets(folder, records)
    packed, npz = build_dataset(_config(folder / "packed")), build_dataset(_config(folder / "npz"))
    contenders = {"packed, means": (packed, False), "packed": (packed, True), "npz, 8 threads": (npz, True),
                  "npz, 1 thread": (build_dataset(_config(folder / "npz", workers=1)), True)}
    wall, cpu = ({name: [] for name in contenders} for _ in range(2))
    for number in range(rounds + 1):
        for name, (dataset, draws) in contenders.items():
            began, worked = time.perf_counter(), time.process_time()
            for start in range(number * len(dataset), (number + 1) * len(dataset), _BATCH):
                dataset.take(_order(start, len(dataset)), np.arange(start, start + _BATCH) if draws else None)
            if number:  # the first round fills the page cache
                wall[name].append(len(dataset) / (time.perf_counter() - began))
                cpu[name].append(len(dataset) / (time.process_time() - worked))
    medians = [{name: statistics.median(values) for name, values in rates.items()} for rates in (wall, cpu)]
    return DataBenchmark(rounds=rounds, records=records, wall=medians[0], cpu=medians[1], **_measure_opening(folder / "imagenet"))


def _order(start: int, records: int) -> np.ndarray:
    return sample_indices(records, seed=0, start=start, count=_BATCH)


def _config(path: Path, **data: object) -> RunConfig:
    values = {"name": "benchmark", "model": {"preset": "s", "num_classes": _CLASSES}, "train": {"max_steps": 1},
              "routing": {"method": "dense"}, "data": {"dataset": "latents", "path": str(path), "latent_scale": 0.18215, **data}}
    return config_from_dict(values, source="benchmark")


def _write_sets(folder: Path, records: int) -> None:
    """Write records as packed shards, and an eighth of them as npz files, compressed as the published code does."""
    random = np.random.default_rng(0)
    (folder / "packed").mkdir()
    shards = []
    for first in range(0, records, _SHARD):
        count = min(_SHARD, records - first)
        pair = torch.from_numpy(random.standard_normal((2, count, *_SHAPE), dtype=np.float32))
        names = [f"n{index % _CLASSES:05d}/{index}.JPEG" for index in range(first, first + count)]
        content = ShardContent(kind="moments", records=pair[0], flipped=pair[1], names=names,
                               labels=torch.tensor([index % _CLASSES for index in range(first, first + count)]))
        shards.append(write_shard(folder / "packed" / f"shard-{first // _SHARD:05d}.safetensors", content))
        for row in range(0, count, _NPZ_SHARE):
            path = (folder / "npz" / names[row]).with_suffix(".latent.npz")
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, latent=pair[0, row].numpy(), latent_flip=pair[1, row].numpy())
    _index(shards).write(folder / "packed")


def _index(shards: list[ShardRecord]) -> LatentIndex:
    return LatentIndex(kind="moments", shape=_SHAPE, dtype="float32", flipped=True, image_size=256, vae=None,
                       classes=tuple(f"n{number:05d}" for number in range(_CLASSES)), class_counts=(0,) * _CLASSES,
                       shards=tuple(shards))


def _measure_opening(folder: Path) -> dict[str, float]:
    """Make a folder of ImageNet's size, its records empty (sparse files), and open it in a fresh process."""
    folder.mkdir()
    shards = []
    for first in range(0, IMAGENET_IMAGES, _SHARD):
        count = min(_SHARD, IMAGENET_IMAGES - first)
        shards.append(_write_sparse(folder / f"shard-{first // _SHARD:05d}.safetensors", first, count))
    _index(shards).write(folder)
    for _ in range(2):  # the first process waits for what was just written to reach the disk
        done = subprocess.run([sys.executable, "-m", __name__, str(folder)], check=True, capture_output=True, text=True)
    return {"index_records": IMAGENET_IMAGES, "index_shards": len(shards), **json.loads(done.stdout.splitlines()[-1])}


def _write_sparse(path: Path, first: int, count: int) -> ShardRecord:
    """Write a shard of `write_shard`'s layout whose records are holes: only labels, checksums and names take place."""
    names = "\n".join(f"n{i % _CLASSES:05d}/n{i % _CLASSES:05d}_{i}.JPEG" for i in range(first, first + count)).encode()
    labels, size = np.arange(first, first + count) % _CLASSES, count * int(np.prod(_SHAPE)) * 4
    header, at = {}, 0
    for name, kind, shape, length in (("labels", "I64", [count], 8 * count), ("checksums", "I64", [count, 2], 16 * count),
                                      ("names", "U8", [len(names)], len(names)), ("moments", "F32", [count, *_SHAPE], size),
                                      ("moments_flip", "F32", [count, *_SHAPE], size)):
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + labels.astype(np.int64).tobytes() + bytes(16 * count) + names)
        file.truncate(8 + len(text) + at)
    return ShardRecord(file=path.name, count=count, bytes=path.stat().st_size, checksum="")


def open_and_measure(folder: Path) -> dict[str, float]:
    """Open a folder of latents; return the seconds, and the megabytes that the process, all imports included, ever held."""
    config, started = _config(folder), time.perf_counter()
    dataset = build_dataset(config)
    seconds = time.perf_counter() - started
    assert len(dataset) == IMAGENET_IMAGES
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"index_seconds": seconds, "index_megabytes": peak / 1024}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(open_and_measure(Path(sys.argv[1]))) + "\n")
