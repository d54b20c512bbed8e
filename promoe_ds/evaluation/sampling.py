"""Sampling latents: image i depends on (seed, i) and its condition, up to rounding.

The first noise of an image and the noise that a solver adds are functions of (seed, i), to the bit.
The arithmetic between them is not: a matrix product of another number of rows, or on another number
of threads, may round its last digit otherwise, and an expert's rows come from whatever images share
the batch. In batches, the default, images therefore agree to rounding for any batch size, number of
ranks and threads. (Where a router pools the batch, as DiffMoE's, neighbours matter by design.)

Sampling is *exact*, equal to the bit, where every pass of the network holds one image (two rows
under guidance), on one thread, weights start at whole cache lines (products round by the alignment,
too, and a file is mapped anywhere), and experts compute the rows of each rank apart: then every
product has the shape that it has for this image alone. That costs small models and GPUs much time.
Letters: B images of a pass, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from promoe_ds.condition import Condition
from promoe_ds.config import RunConfig
from promoe_ds.data.normalization.values import LatentNormalization
from promoe_ds.data.reading import warn_once
from promoe_ds.diffusion import check_guided, check_interval, choose_scale
from promoe_ds.diffusion.sampler import (
    SamplingPlan,
    image_generators,
    initial_noise,
    sample_latents,
)
from promoe_ds.errors import ConfigError
from promoe_ds.model import DiT


def plan_sampling(
    config: RunConfig,
    name_of: Callable[[str], str],
    *,
    steps: int | None = None,
    solver: str | None = None,
    cfg_scale: float | None = None,
    cfg_interval: Sequence[float] | None = None,
    **others: Any,
) -> SamplingPlan:
    """Return how to sample a model: what the user asks for over the recipe's defaults.

    Args:
        name_of: what the user calls steps, solver, cfg_scale and cfg_interval, for messages.
        others: further fields of the plan.
    Raises: ConfigError for what the model cannot be sampled with.
    """
    if problem := config.diffusion.sampling_problem(solver=solver, steps=steps):
        field, _, rest = problem.partition("=")
        raise ConfigError(f"{name_of(field)}={rest}")
    if steps is not None and steps < 1:
        raise ConfigError(f"{name_of('steps')}={steps}: must be at least 1")
    scale, why = choose_scale(config, cfg_scale, name_of("cfg_scale"))
    if why:
        warn_once("%s", why)
    interval = check_interval(cfg_interval, name_of("cfg_interval"))
    check_guided(scale, name_of("cfg_interval"), interval)
    return SamplingPlan.of(
        config,
        steps=steps,
        solver=config.diffusion.solvers[0] if solver == "auto" else solver,
        cfg_scale=scale,
        cfg_interval=interval,
        **others,
    )


class LatentSampler:
    """Samples latents of a network."""

    def __init__(
        self,
        network: DiT,
        config: RunConfig,
        plan: SamplingPlan,
        *,
        seed: int,
        device: torch.device,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Sample from `network`, in evaluation mode on `device`.

        Args:
            size: of the latents, (H, W); the model's own if left out.
        """
        self._network, self._plan, self._seed, self._device = network, plan, seed, device
        self._size = size or config.model.latent_size
        self._shape = (config.model.in_channels, *self._size)
        self._normalization = LatentNormalization.of(config.data)

    def sample(
        self, indices: Sequence[int], condition: Condition, negative: Condition | None = None
    ) -> Tensor:
        """Return the latents (B, Z, H, W), fp32, of some images, as their autoencoder makes them;
        all in one pass.

        Args:
            condition, negative: of each of them, on the host; see `GuidedDenoiser`.
        """
        latents = sample_latents(
            self._network,
            initial_noise(self._shape, seed=self._seed, indices=indices).to(self._device),
            condition.counted().to(self._device),
            self._plan,
            image_generators(seed=self._seed, indices=indices),
            negative=None if negative is None else negative.counted().to(self._device),
            prepare=partial(self._network.prepare, latent_size=self._size),
        )
        return self._normalization.denormalize(latents)


def sampling_dtype(device: torch.device) -> torch.dtype:
    """Return in which dtype networks sample unless told otherwise: bf16 on CUDA, else fp32, for a
    GPU multiplies fp32 without TF32 at a fifteenth of its speed.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: more would cut the products, and launchers give various numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def align_weights(network: nn.Module) -> None:
    """Copy weights to memory that torch allocates, at whole cache lines."""
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone()


def even_passes(samples: int, *, batch_size: int, world_size: int) -> tuple[int, int]:
    """Return how many passes each rank makes for its share, and of how many images: the fewest."""
    share = -(-samples // world_size)
    passes = -(-share // batch_size)
    return passes, -(-share // passes)


def aligned_passes(indices: Sequence[int], *, size: int, num: int) -> list[range]:
    """Return the passes that make `indices`: aligned blocks of `size` of 0 ... num - 1."""
    starts = sorted({index // size * size for index in indices})
    return [range(first, min(first + size, num)) for first in starts]
