"""The autoencoder between images and latents: one of diffusers', frozen.

Letters: B images, Z latent channels, H, W size, C colour channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from promoe_ds.config.model import sides, size_name
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.normalization.values import LatentNormalization
from promoe_ds.data.reading import reading
from promoe_ds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from diffusers import ModelMixin

#: Images of a pass of the decoder: one alone has enough work for a GPU, and hundreds of megabytes
# of activations.
DECODED_AT_ONCE = 8
#: Whether figures and pixels are computed with TF32, for the files that state how they came about.
TF32 = False
#: Kinds of records: moments of posteriors, which have two channels for one of a latent, or latents.
MOMENTS, LATENTS = "moments", "latents"
#: What the name of the mirrored image's record ends with.
FLIP = "_flip"
#: Normalises its latents itself, by statistics of its own, and takes pixels in 0 ... 1.
_REPRESENTATION = "AutoencoderRAE"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which network something was encoded by: `name` is what the user calls it, `fingerprint` the
    checksum of its weights, where it is known.
    """

    name: str
    fingerprint: str | None = None

    def is_called(self, wanted: str) -> bool:
        """Whether `wanted` is its name or fingerprint."""
        return wanted in (self.name, self.fingerprint)

    def is_meant(self, wanted: str | None, load: Callable[[str], Any]) -> bool:
        """Whether it is what a recipe wants: its name, its fingerprint, a folder of the same
        weights, or nothing.

        Args:
            load: returns the network in a folder, with its `identity`.
        """
        if wanted is None or self.is_called(wanted):
            return True
        return Path(wanted).is_dir() and load(wanted).identity.fingerprint == self.fingerprint


@dataclass(frozen=True, kw_only=True)
class VaeIdentity(Identity):
    """Which autoencoder latents belong to.

    `downsampling` is pixels per latent pixel; `scaling_factor` to `latents_std` what its config
    says of its latents. Of another trainer's cache only the name is known.
    """

    latent_channels: int
    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    downsampling: int | None = None

    def normalization(self, kind: str) -> LatentNormalization | None:
        """Return what its config says, None if that is nothing.

        Args:
            kind: of `data.latent_normalization`: auto or scale.
        """
        scale = 1.0 if self.scaling_factor is None else self.scaling_factor
        if kind == "auto" and self.latents_std:
            return LatentNormalization(
                latent_scale=scale,
                latents_mean=self.latents_mean or (),
                latents_std=self.latents_std,
            )
        if self.scaling_factor is None and not self.shift_factor:
            return None
        shift = (self.shift_factor,) if self.shift_factor else ()
        return LatentNormalization(latent_scale=scale, latents_mean=shift)

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
        """Return how channels and normalisation, where it is known, differ from a recipe's, or
        nothing.
        """
        channels, data = config.model.in_channels, config.data
        wanted = LatentNormalization.of(data)
        is_free = data.latent_normalization in ("channel", "none")
        own = (None if is_free else self.normalization(data.latent_normalization)) or wanted
        if self.latent_channels == channels and own.equals(wanted, channels):
            return ""
        return (
            f"{self.latent_channels} latent channels {own}, the model's are {channels}"
            f" (model.in_channels) {wanted} (data.latent_scale, latents_mean, latents_std)"
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
    """A frozen autoencoder on a device.

    kind: of the records that it makes: moments, or latents where it has no posterior.
    """

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
            source: see `load_autoencoder`.
            name: what to call it; `source` if left out.
        Raises: DataError if there is no autoencoder of images.
        """
        network = load_autoencoder(source)
        identity = identify(network, name or source)
        self.identity = replace(identity, fingerprint=fingerprint_of(network))
        # torch's own cast: diffusers' warns of an empty list of modules.
        self._network = torch.nn.Module.to(
            network.requires_grad_(False).eval(), device=device, dtype=dtype
        )
        self._device, self._dtype = device, dtype
        side = 2 * self.identity.downsampling
        with reading(Path(source), "autoencoder of images"):
            self.kind, records = self._encode(np.zeros((1, side, side, 3), dtype=np.uint8))
            if records.ndim != 4 or records.shape[1] != self.record_channels:
                raise ValueError(f"it makes {tuple(records.shape)} of an image")

    @property
    def record_channels(self) -> int:
        """C: channels of the records."""
        return self.identity.latent_channels * (2 if self.kind == MOMENTS else 1)

    def encode(self, images_BHWC: np.ndarray) -> Tensor:
        """Return records (B, C, H, W) of uint8 images, fp32, on the device: latents, or moments,
        means and then log variances.

        Raises: DataError for images of a size that it does not take.
        """
        records = self._encode(images_BHWC)[1]
        pixels = self.identity.downsampling
        if (found := [each * pixels for each in records.shape[2:]]) != list(images_BHWC.shape[1:3]):
            raise DataError(
                f"{self.identity.name}: takes images of {found[0]}x{found[1]} pixels, these have"
                f" {images_BHWC.shape[1]}x{images_BHWC.shape[2]}"
            )
        return records

    @torch.no_grad()
    @without_tf32()
    def decode(self, latents_BZHW: Tensor) -> Tensor:
        """Return images (B, C, H, W), about -1 ... 1, fp32, of latents as it makes them; a few at a
        time, whatever B is.

        Raises: DataError for latents of a size that it does not take.
        """
        parts = latents_BZHW.to(self._device, self._dtype).split(DECODED_AT_ONCE)
        return torch.cat([decode_latents(self._network, part).float() for part in parts])

    @torch.no_grad()
    @without_tf32()
    def _encode(self, images_BHWC: np.ndarray) -> tuple[str, Tensor]:
        """Return the kind of the records, and the records."""
        pixels = torch.from_numpy(images_BHWC).to(self._device).permute(0, 3, 1, 2).float() / 127.5
        pixels = pixels / 2 if _takes_unit_range(self._network) else pixels - 1.0
        encoded = self._network.encode(pixels.to(self._dtype))
        if hasattr(encoded, "latent_dist"):
            return MOMENTS, encoded.latent_dist.parameters.float()
        return LATENTS, encoded.to_tuple()[0].float()


def load_autoencoder(source: str) -> ModelMixin:
    """Return a diffusers autoencoder of the class that its config.json names.

    Args:
        source: a folder, or a hub id (owner/name or owner/name/subfolder), with weights in
            safetensors.
    Raises: DataError if there is none, or diffusers does not know its class.
    """
    import diffusers

    where, folder = source, None
    if not Path(source).is_dir():
        owner, *names = source.split("/", 2)
        if not names or not all((owner, *names)):
            raise DataError(
                f"{source}: no such folder, and no hub id (owner/name or owner/name/subfolder) of"
                " an autoencoder"
            )
        where, folder = f"{owner}/{names[0]}", names[1] if len(names) > 1 else None
    with reading(Path(source), "autoencoder in safetensors"):
        name = str(diffusers.AutoencoderKL.load_config(where, subfolder=folder).get("_class_name"))
        kind = getattr(diffusers, name, None)
        if not all(hasattr(kind, method) for method in ("from_pretrained", "encode", "decode")):
            raise DataError(
                f"{source}: its config.json says _class_name={name}, which is no autoencoder of"
                f" diffusers {diffusers.__version__}: another release may know it"
            )
        return kind.from_pretrained(
            where, subfolder=folder, use_safetensors=True, low_cpu_mem_usage=False
        )


def identify(network: ModelMixin, name: str) -> VaeIdentity:
    """Return what an autoencoder's config says, without a checksum of its weights.

    Raises: DataError if that is no autoencoder of single images.
    """
    config, kind = network.config, type(network).__name__
    if kind == _REPRESENTATION:
        return VaeIdentity(
            name=name,
            latent_channels=int(config.encoder_hidden_size),
            scaling_factor=1.0,
            downsampling=int(config.patch_size),
        )
    stages = config.get("block_out_channels") or config.get("encoder_block_out_channels") or ()
    downsampling = getattr(network, "spatial_compression_ratio", None) or 2 ** (len(stages) - 1)
    if "latent_channels" not in config or downsampling < 1:
        raise DataError(
            f"{name}: the config of this {kind} does not say its latent_channels and"
            " block_out_channels, as those of autoencoders of single images do"
        )

    def numbers(field: str) -> tuple[float, ...] | None:
        values = config.get(field)
        if values is not None and len(values) != config.latent_channels:
            raise DataError(
                f"{name}: its config has {len(values)} {field} of {config.latent_channels}"
                " latent_channels"
            )
        return None if values is None else tuple(map(float, values))

    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    return VaeIdentity(
        name=name,
        latent_channels=int(config.latent_channels),
        scaling_factor=None if scale is None else float(scale),
        shift_factor=None if shift is None else float(shift),
        latents_mean=numbers("latents_mean"),
        latents_std=numbers("latents_std"),
        downsampling=int(downsampling),
    )


def decode_latents(network: ModelMixin, latents_BZHW: Tensor) -> Tensor:
    """Return images (B, C, H, W), about -1 ... 1, of latents as the autoencoder makes them.

    Raises: DataError for latents of a size that it does not take.
    """
    images = network.decode(latents_BZHW).sample
    pixels = identify(network, type(network).__name__).downsampling
    wanted = [each * pixels for each in latents_BZHW.shape[2:]]
    if list(images.shape[2:]) != wanted:
        raise DataError(
            f"{type(network).__name__}: makes images of {images.shape[2]}x{images.shape[3]} pixels,"
            f" {wanted[0]}x{wanted[1]} were expected of latents of"
            f" {latents_BZHW.shape[2]}x{latents_BZHW.shape[3]}: it takes those of"
            f" {images.shape[2] // pixels}x{images.shape[3] // pixels} alone"
        )
    return images * 2.0 - 1.0 if _takes_unit_range(network) else images


def _takes_unit_range(network: ModelMixin) -> bool:
    return type(network).__name__ == _REPRESENTATION


def fingerprint_of(network: torch.nn.Module) -> str:
    """Return the checksum of a network's weights and buffers: names, shapes, types and values."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"xxh3_128:{digest.hexdigest()}"
