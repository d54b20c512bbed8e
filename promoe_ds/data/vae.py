"""The autoencoder between images and latents: diffusers' AutoencoderKL, frozen.

Letters: B images, Z latent channels, H, W size, C colour channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from diffusers import AutoencoderKL
from torch import Tensor

from promoe_ds.config.model import sides, size_name
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.reading import reading
from promoe_ds.errors import ConfigError, DataError

#: Images of a pass of the decoder: one alone has enough work for a GPU, and hundreds of megabytes
# of activations.
DECODED_AT_ONCE = 8
#: Whether figures and pixels are computed with TF32, for the files that state how they came about.
TF32 = False
#: Scales that differ by less are the same, written with fewer digits.
_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class VaeIdentity:
    """Which autoencoder latents belong to.

    `fingerprint` is the checksum of its weights; `name` what the user calls it; `downsampling`
    pixels per latent pixel. Of another trainer's cache only the name is known.
    """

    name: str
    latent_channels: int
    fingerprint: str | None = None
    scaling_factor: float | None = None
    downsampling: int | None = None

    def is_called(self, wanted: str | None) -> bool:
        """Whether `wanted` is its name or fingerprint."""
        return wanted is not None and wanted in (self.name, self.fingerprint)

    def pixels(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of the image that a latent of some size is made of."""
        height, width = latent_size
        return height * self.downsampling, width * self.downsampling

    def latents(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of the latents of images of some size.

        Raises: ConfigError for a size that the autoencoder would cut.
        """
        (height, width), factor = sides(image_size), self.downsampling
        if height % factor or width % factor:
            name = image_size if isinstance(image_size, int) else size_name(image_size)
            raise ConfigError(
                f"--image-size {name}: must be a multiple of the {factor} pixels that {self.name}"
                " makes one latent of"
            )
        return height // factor, width // factor

    def misfit(self, config: RunConfig) -> str:
        """Return how channels and scale, where it is known, differ from a recipe's, or nothing."""
        channels, scale = config.model.in_channels, config.data.latent_scale
        own = scale if self.scaling_factor is None else self.scaling_factor
        if self.latent_channels == channels and abs(own - scale) <= _TOLERANCE:
            return ""
        return (
            f"{self.latent_channels} latent channels scaled by {own}, the model's are {channels}"
            f" (model.in_channels) scaled by {scale} (data.latent_scale)"
        )


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolve and multiply fp32 in fp32, which cuDNN rounds to TF32 by default; afterwards as the
    process had it.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = TF32
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


class Vae:
    """A frozen autoencoder on a device."""

    def __init__(
        self,
        source: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        name: str | None = None,
    ) -> None:
        """Load it.

        Args:
            source: a folder or hub id with weights in safetensors.
            name: what to call it; `source` if left out.
        Raises: DataError if there is no AutoencoderKL, or one that shifts its latents.
        """
        if not Path(source).is_dir() and source.count("/") != 1:
            raise DataError(
                f"{source}: no such folder, and no hub id (owner/name) of an AutoencoderKL"
            )
        with reading(Path(source), "AutoencoderKL in safetensors"):
            network = AutoencoderKL.from_pretrained(
                source, use_safetensors=True, low_cpu_mem_usage=False
            )
        config = network.config
        if shift := config.get("shift_factor"):
            raise DataError(
                f"{source}: shifts its latents by shift_factor={shift}, this package only scales"
                " them (data.latent_scale): take an autoencoder without a shift"
            )
        self.identity = VaeIdentity(
            name=name or source,
            fingerprint=fingerprint_of(network),
            scaling_factor=float(config.scaling_factor),
            downsampling=2 ** (len(config.block_out_channels) - 1),
            latent_channels=int(config.latent_channels),
        )
        # torch's own cast: diffusers' warns of an empty list of modules.
        self._network = torch.nn.Module.to(
            network.requires_grad_(False).eval(), device=device, dtype=dtype
        )
        self._device, self._dtype = device, dtype

    @torch.no_grad()
    @without_tf32()
    def encode(self, images_BHWC: np.ndarray) -> Tensor:
        """Return the posteriors' moments (B, 2 Z, H, W) of uint8 images, fp32, on the device:
        means, then log variances.
        """
        pixels = (
            torch.from_numpy(images_BHWC).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        )
        return self._network.encode(pixels.to(self._dtype)).latent_dist.parameters.float()

    @torch.no_grad()
    @without_tf32()
    def decode(self, latents_BZHW: Tensor) -> Tensor:
        """Return images (B, C, H, W), about -1 ... 1, fp32, of unscaled latents; a few at a time,
        whatever B is.
        """
        parts = latents_BZHW.to(self._device, self._dtype).split(DECODED_AT_ONCE)
        return torch.cat([self._network.decode(part).sample.float() for part in parts])


def fingerprint_of(network: torch.nn.Module) -> str:
    """Return the checksum of a network's weights and buffers: names, shapes, types and values."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"xxh3_128:{digest.hexdigest()}"
