"""How fast latents come from disk: packed shards, one npz file an image; opening a large index; and
how fast images come from folders, parquet and tars.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.processes import in_fresh_process, process_memory
from benchmarks.timing import Result, interleave, wall_clock
from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.data import LatentDataset, build_dataset, sample_indices
from promoe_ds.data.shards import LatentIndex, write_shard
from promoe_ds.data.sources.formats import IMAGES, open_samples
from promoe_ds.data.sources.samples import Columns, SampleReader

IMAGENET_IMAGES = 1_281_167
_SHARD, _BATCH, _CLASSES = 4096, 256, 1000
_SHAPE, _EMPTY = (8, 32, 32), (8, 2, 2)
#: One npz file for so many packed records: they are slow, and an eighth of them is enough.
_NPZ_SHARE = 8
#: Of the images that are decoded: width and height, side after the crop, images a class and file.
_PIXELS, _SIDE, _IMAGES_A_FILE = (500, 375), 256, 512
#: Rows of a row group, as `datasets` writes images.
_ROWS = 100


def benchmark_data(
    folder: Path,
    *,
    rounds: int = 7,
    records: int = 8192,
    images: int = 2048,
    index_records: int = IMAGENET_IMAGES,
) -> Result:
    """Time the loaders on synthetic latents; all but one draw flips and posteriors as training
    does. Time what reads and decodes the same synthetic JPEGs in class folders, parquet and tars,
    two threads each.

    Figures: medians over rounds, in records a second of one process: by the clock, and by the
    processor time of all its threads; and seconds and megabytes of a process of its own that opens
    an index of ImageNet's size, whose records are small.
    Args:
        folder: empty; takes records x 72 KB, images x 0.3 MB, and 0.5 GB for the index.
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
    decoded = interleave(_image_readers(folder / "images", images), rounds=rounds, warmup=1)
    speeds = {
        name: {"wall": 1e3 * images / one.wall_ms, "cpu": 1e3 * images / one.cpu_ms}
        for name, one in decoded.items()
    }
    shards = _write_packed(folder / "imagenet", index_records, _EMPTY)
    for _ in range(2):  # the first process waits for what was just written to reach the disk
        seconds, megabytes = in_fresh_process(_open, folder / "imagenet")
    over = [rates["packed"] / rates["npz, 8 threads"] for rates in (wall, cpu)]
    return Result(
        suite="data",
        settings={"rounds": rounds, "records": records, "images": images},
        figures={
            "wall": wall,
            "cpu": cpu,
            "images": speeds,
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
                f"{images} JPEGs of {_PIXELS[0]} x {_PIXELS[1]} pixels, decoded and cropped to "
                f"{_SIDE}, 2 threads"
            ),
            *(f"{name:32}{of['wall']:14,.1f}{of['cpu']:20,.1f}" for name, of in speeds.items()),
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


def _image_readers(folder: Path, images: int) -> dict[str, Callable[[], None]]:
    """Write JPEGs in each format; return what reads all of them, by format."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    for name in ("tree", "parquet", "tar"):
        (folder / name).mkdir(parents=True)
    for number, first in enumerate(range(0, images, _IMAGES_A_FILE)):
        blobs = [_jpeg(random) for _ in range(first, min(first + _IMAGES_A_FILE, images))]
        (folder / "tree" / f"{number:04d}").mkdir()
        with tarfile.open(folder / "tar" / f"{number:04d}.tar", "w") as archive:
            for row, blob in enumerate(blobs):
                (folder / "tree" / f"{number:04d}" / f"{row:06d}.jpg").write_bytes(blob)
                for name, content in ((f"{row:06d}.jpg", blob), (f"{row:06d}.cls", b"0")):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        table = pa.table({"image": [{"bytes": blob, "path": None} for blob in blobs]})
        pq.write_table(table, folder / "parquet" / f"{number:04d}.parquet", row_group_size=_ROWS)
    return {name: partial(_decode, folder / name) for name in ("tree", "parquet", "tar")}


def _jpeg(random: np.random.Generator) -> bytes:
    """Return a picture with large shapes and some noise, about 100 KB."""
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(_PIXELS, Image.Resampling.BICUBIC), dtype=np.float32)
    noise = random.standard_normal((_PIXELS[1], _PIXELS[0], 1), dtype=np.float32)
    buffer = io.BytesIO()
    noisy = (pixels + 12 * noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def _decode(path: Path) -> None:
    samples, found = open_samples(path, IMAGES, Columns(), split="train")
    reader = SampleReader(samples, partial(found.read, size=_SIDE), workers=2)
    for start in range(0, len(samples), 32):
        reader.read(range(start, min(start + 32, len(samples))))


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
