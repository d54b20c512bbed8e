"""Images and an autoencoder made on the spot: the same code path as real ones, nothing from the
network.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderRAE, AutoencoderTiny
from PIL import Image
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.data import LatentDataset, build_dataset
from promoe_ds.data.images import read_image
from promoe_ds.data.sources.packing import EncodeRequest
from promoe_ds.data.trees import scan_tree

from ..builders import small_config

#: Pixels per latent pixel, latent channels and scale of the tiny autoencoder.
DOWNSAMPLING, CHANNELS, SCALE = 2, 1, 0.5


def save_vae(folder: Path, seed: int = 0, kind: str = "kl", **config: Any) -> Path:
    """Save a tiny, randomly initialised autoencoder, by default an AutoencoderKL: 8x8 pixels to 4x4
    latents of one channel.
    """
    torch.manual_seed(seed)
    AUTOENCODERS[kind](**config).save_pretrained(folder)
    return folder


def _kl(**config: Any) -> AutoencoderKL:
    common = {"latent_channels": CHANNELS, "scaling_factor": SCALE}
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        sample_size=8,
        **{**common, **config},
    )


def _dc(**config: Any) -> AutoencoderDC:
    sides = {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8),
        "layers_per_block": (1, 1),
        "qkv_multiscales": ((), (5,)),
    }
    both = {f"{side}_{name}": sides[name] for side in ("encoder", "decoder") for name in sides}
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=4, downsample_block_type="Conv", **both, **config
    )


def _rae(**config: Any) -> AutoencoderRAE:
    return AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_patch_size=4,
        encoder_num_hidden_layers=1,
        encoder_input_size=16,
        patch_size=2,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        latents_mean=[[[0.1]]] * 64,
        latents_std=[[[0.9]]] * 64,
        **config,
    )


def _tiny(**config: Any) -> AutoencoderTiny:
    blocks = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    counts = {f"num_{side}_blocks": (1, 1) for side in ("encoder", "decoder")}
    return AutoencoderTiny(latent_channels=2, **blocks, **counts, **config)


#: Tiny autoencoders by kind; all make 4x4 latents of 8x8 pixels.
AUTOENCODERS = {"kl": _kl, "dc": _dc, "rae": _rae, "tiny": _tiny}


def save_images(
    root: Path,
    per_class: int = 5,
    classes: tuple[str, ...] = ("n01", "n02", "n03"),
    size: tuple[int, int] = (20, 17),
    suffix: str = "png",
) -> Path:
    """Save random images as class folders, every second one a folder deeper."""
    random = np.random.default_rng(0)
    for name in classes:
        for number in range(per_class):
            folder = root / name / ("deep" if number % 2 else "")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}_{number}.{suffix}")
    return root


def picture(
    mode: str = "RGB", form: str = "png", size: tuple[int, int] = (9, 9), **more: Any
) -> bytes:
    """Return the bytes of a picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 100, 0)).convert(mode).save(buffer, form, **more)
    return buffer.getvalue()


def labelled(taken: tuple[Tensor, ClassCondition]) -> tuple[Tensor, Tensor]:
    """Return latents and labels of what a class-conditional set has given."""
    latents, condition = taken
    return latents, condition.labels_B


def request(folder: Path, out: str | Path, **values: Any) -> EncodeRequest:
    """Return a request to encode `folder/images` by `folder/vae`, in shards of four."""
    common = EncodeRequest(
        source=folder / "images",
        out=folder / out,
        vae=str(folder / "vae"),
        vae_name="tiny",
        image_size=8,
        shard_size=4,
        batch_size=3,
        workers=2,
    )
    return replace(common, **values)


def open_set(path: Path, dataset: str = "latents", **data: Any) -> LatentDataset:
    """Open latents, or images, of the tiny autoencoder."""
    common = {"dataset": dataset, "path": str(path), "latent_scale": SCALE, "vae_dtype": "fp32"}
    return build_dataset(small_config(data={**common, **data}))


def true_moments(folder: Path, *, mirrored: bool = False) -> Tensor:
    """Encode image by image with diffusers itself."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False)
    tree, result = scan_tree(folder / "images"), []
    for name in tree.names:
        pixels = torch.from_numpy(read_image(tree.root / name, 8).copy()).permute(2, 0, 1)[None]
        pixels = pixels.float() / 127.5 - 1
        with torch.no_grad():
            result.append(vae.encode(pixels.flip(3) if mirrored else pixels).latent_dist.parameters)
    return torch.cat(result)


def copy_of(made: Path, target: Path) -> Path:
    """Copy the packed latents, to be damaged."""
    return shutil.copytree(made / "latents", target / "copy")


def save_parquet(
    images: Path, folder: Path, files: int = 2, *, rows_in_group: int = 3, **columns: list[Any]
) -> Path:
    """Write the images of a tree as the hub has them, `data/train-0000N-of-...`: image, label with
    the classes' names, and more columns.
    """
    tree = scan_tree(images)
    values = {
        "image": [{"bytes": (images / n).read_bytes(), "path": n} for n in tree.names],
        "label": tree.labels.tolist(),
        **columns,
    }
    names = {"info": {"features": {"label": {"names": list(tree.classes), "_type": "ClassLabel"}}}}
    table = pa.table(values).replace_schema_metadata({"huggingface": json.dumps(names)})
    (folder / "data").mkdir(parents=True)
    share = -(-len(table) // files)
    for number in range(files):
        path = folder / "data" / f"train-{number:05d}-of-{files:05d}.parquet"
        pq.write_table(table.slice(number * share, share), path, row_group_size=rows_in_group)
    return folder


def rows(**columns: Any) -> Callable[[Path], object]:
    """Return what writes a parquet file of some columns into a folder."""
    return lambda folder: pq.write_table(pa.table(columns), folder / "x.parquet")


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.DEFAULT_FORMAT) -> Path:
    """Write files into a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def save_tars(images: Path, folder: Path, files: int = 2, **texts: list[bytes]) -> Path:
    """Write the images of a tree as samples of tars, with their labels and other files."""
    tree = scan_tree(images)
    share = -(-len(tree) // files)
    for number in range(files):
        members = {}
        for row in range(number * share, min((number + 1) * share, len(tree))):
            members[f"{row:06d}.png"] = (images / tree.names[row]).read_bytes()
            members[f"{row:06d}.cls"] = str(tree.labels[row]).encode()
            members |= {f"{row:06d}.{name}": each[row] for name, each in texts.items()}
        write_tar(folder / f"train-{number:03d}.tar", members)
    return folder
