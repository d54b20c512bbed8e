"""Images and an autoencoder made on the spot: the same code path as real ones, nothing from the
network.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from promoe_ds.condition import ClassCondition

#: Pixels per latent pixel, latent channels and scale of the tiny autoencoder.
DOWNSAMPLING, CHANNELS, SCALE = 2, 1, 0.5


def save_vae(folder: Path, seed: int = 0) -> Path:
    """Save a tiny, randomly initialised AutoencoderKL: 8x8 pixels to 4x4 latents of one channel."""
    torch.manual_seed(seed)
    AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=CHANNELS,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        sample_size=8,
        scaling_factor=SCALE,
    ).save_pretrained(folder)
    return folder


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


def labelled(taken: tuple[torch.Tensor, ClassCondition]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents and labels of what a class-conditional set has given."""
    latents, condition = taken
    return latents, condition.labels_B
