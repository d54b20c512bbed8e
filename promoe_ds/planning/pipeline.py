"""What the steps from raw images to published figures take: disk, time, memory; not measured.

Bytes and operations are counted; how fast a cluster works through them is assumed, and every
assumption is a field here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm, prod

from promoe_ds.backends.devices import DEVICES, Device
from promoe_ds.config import RunConfig, count_parameters, training_flops_per_image
from promoe_ds.config.accounting import forward_flops_per_image
from promoe_ds.data.vae import DECODED_AT_ONCE
from promoe_ds.planning.cluster import ClusterLayout
from promoe_ds.planning.zero import states_of_config

#: Published sizes of ILSVRC 2012: images for training, bytes of the two archives.
TRAIN_IMAGES = 1_281_167
TRAIN_BYTES, VAL_BYTES = 147_897_477_120, 6_744_924_160
#: Floating-point operations of Stable Diffusion's AutoencoderKL for one image of 256 pixels, by
# torch's counter.
ENCODER_FLOPS, DECODER_FLOPS = 272.722e9, 622.187e9
#: Bytes alive at its fullest moment for one such image, fp32, no gradient: counted on tensors
# without memory.
ENCODER_BYTES, DECODER_BYTES = 167.8e6, 205.5e6
_VAE_WEIGHTS = 4 * 83_653_863
#: Of Inception v3 for one image of 299 pixels: 5.7e9 multiply-adds (Szegedy et al., 2016).
INCEPTION_FLOPS = 11.4e9
INCEPTION_FEATURES, SPATIAL_FEATURES = 2048, 2023
#: Samples that are drawn, with guidance, and images of ADM's reference that precision and recall
# look at.
SAMPLES, REFERENCE_IMAGES = 50_000, 10_000
_PIXELS = 256**2


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """How fast the machines are taken to be."""

    device: Device = DEVICES["h100"]
    training_share: float = (
        0.25  # of the peak, of training; 0.20 follows from the published 285 images/s of DiT-XL/2
    )
    inference_share: float = 0.25  # of the peak, of sampling
    convolution_share: float = 0.5  # of the fp32 peak, of autoencoder and Inception: TF32 is off
    fp64_flops: float = 30e12  # of matrix products, reached by an H100
    images_per_core: float = (
        200.0  # JPEG files of ImageNet a processor core decodes and crops in a second
    )
    cores_per_gpu: int = 8
    disk_bytes_per_second: float = 500e6  # of one process
    encode_batch: int = 32  # images, as promoe-encode has it

    @property
    def convolution_flops(self) -> float:
        """FLOP/s of fp32 convolutions."""
        return self.device.flops["fp32"] * self.convolution_share


@dataclass(frozen=True, kw_only=True)
class PipelineStep:
    """One step: bytes left on disk, seconds, bytes on each GPU and in each process's memory.

    Memory is weights, buffers and the autoencoder's activations; not the other networks', nor
    frameworks.
    """

    name: str
    disk: float
    seconds: float
    device: float
    host: float


def plan_pipeline(config: RunConfig, gpus: int, rates: Assumptions) -> list[PipelineStep]:
    """Compute the steps from ImageNet's archives to the figures of one model.

    Args:
        config: of a model of latents.
        gpus: that work at each step.
    """
    return [
        _unpack(rates),
        _encode(config, gpus, rates),
        _train(config, gpus, rates),
        _convert(config, rates),
        _sample(config, gpus, rates),
        _evaluate(gpus, rates),
    ]


def pipeline_lines(steps: list[PipelineStep]) -> list[str]:
    """Return the plan as a table."""
    return [
        f"{'step':10}{'disk':>12}{'time':>10}{'GPU memory':>14}{'host memory':>14}",
        *(
            f"{step.name:10}{step.disk / 1e9:9,.1f}"
            f" GB{_duration(step.seconds):>10}{step.device / 1e9:11,.1f}"
            f" GB{step.host / 1e9:11,.1f} GB"
            for step in steps
        ),
    ]


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _unpack(rates: Assumptions) -> PipelineStep:
    size = TRAIN_BYTES + VAL_BYTES
    return PipelineStep(
        name="unpack",
        disk=2 * size,
        seconds=2 * size / rates.disk_bytes_per_second,
        device=0,
        host=0,
    )


def _encode(config: RunConfig, gpus: int, rates: Assumptions) -> PipelineStep:
    model = config.model
    # Plain and mirrored, mean and variance, fp32.
    record = 2 * 2 * model.in_channels * prod(model.latent_size) * 4
    decoding = TRAIN_IMAGES / (rates.images_per_core * rates.cores_per_gpu * gpus)
    encoding = (
        2 * TRAIN_IMAGES * ENCODER_FLOPS * _pixel_ratio(config) / (gpus * rates.convolution_flops)
    )
    return PipelineStep(
        name="encode",
        disk=TRAIN_IMAGES * record,
        seconds=decoding + encoding,
        device=_VAE_WEIGHTS + rates.encode_batch * ENCODER_BYTES * _pixel_ratio(config),
        host=2 * 4096 * record,
    )


def _train(config: RunConfig, gpus: int, rates: Assumptions) -> PipelineStep:
    images = config.train.max_steps * config.train.global_batch_size
    seconds = (
        images
        * training_flops_per_image(config, config.model.longest_text)
        / (gpus * rates.device.flops["bf16"] * rates.training_share)
    )
    states = states_of_config(
        config, ClusterLayout(world_size=gpus, zero_stage=2, precision="bf16")
    )
    # A checkpoint: bf16 weights; fp32 masters, two moments and the averages.
    numbers = 2 + 4 * (3 + len(config.optimizer.averages))
    train = config.train
    kept = train.keep_last
    if train.keep_every is not None:
        kept += train.max_steps // lcm(train.checkpoint_every, train.keep_every)
    disk = kept * numbers * count_parameters(config).trainable
    return PipelineStep(name="train", disk=disk, seconds=seconds, device=states.total, host=0)


def _convert(config: RunConfig, rates: Assumptions) -> PipelineStep:
    size = 4 * count_parameters(config).trainable
    return PipelineStep(
        name="convert",
        disk=size,
        seconds=3 * size / rates.disk_bytes_per_second,
        device=0,
        host=2e9,
    )


def _sample(config: RunConfig, gpus: int, rates: Assumptions) -> PipelineStep:
    # Guidance computes each image twice.
    drawing = (
        SAMPLES
        * 2
        * config.sampling.steps
        * forward_flops_per_image(config, config.model.longest_text)
        / (gpus * rates.device.flops["bf16"] * rates.inference_share)
    )
    decoding = SAMPLES * DECODER_FLOPS * _pixel_ratio(config) / (gpus * rates.convolution_flops)
    pixels = SAMPLES * 3 * _PIXELS * _pixel_ratio(config)
    # The npz, and PNG files that noise-free images keep below the size of their pixels.
    return PipelineStep(
        name="sample",
        disk=2 * pixels,
        seconds=drawing + decoding + pixels / rates.disk_bytes_per_second,
        device=2 * count_parameters(config).total  # bf16, as GPUs sample
        + _VAE_WEIGHTS
        + DECODED_AT_ONCE * DECODER_BYTES * _pixel_ratio(config),
        host=pixels / SAMPLES,
    )


def _evaluate(gpus: int, rates: Assumptions) -> PipelineStep:
    images = SAMPLES + REFERENCE_IMAGES
    features = images * INCEPTION_FLOPS / (gpus * rates.convolution_flops)
    distances = 2 * INCEPTION_FEATURES * images**2 / (gpus * rates.fp64_flops)
    roots = (
        2 * 60 * INCEPTION_FEATURES**3 / 50e9
    )  # two matrix roots and singular values each, on one processor
    matrices = 8 * (INCEPTION_FEATURES**2 + SPATIAL_FEATURES**2) * 4
    return PipelineStep(
        name="evaluate",
        disk=0,
        seconds=features + distances + roots,
        device=4 * 24e6 + 8 * images * INCEPTION_FEATURES,
        host=2 * 8 * images * INCEPTION_FEATURES + matrices,
    )


def _pixel_ratio(config: RunConfig) -> float:
    """Pixels of an image, eight a side for each latent pixel, over those of 256 x 256."""
    return 8**2 * prod(config.model.latent_size) / _PIXELS
