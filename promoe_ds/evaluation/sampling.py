"""Drawing latents so that image i depends on (seed, i) and its label only: on no rank, no batch, no neighbour.

Noise is a function of (seed, i) by itself. The arithmetic is not: a matrix product of another number of rows may round its
last digit otherwise, and an expert's rows come from whatever images share the batch. Drawing is therefore *exact* where every
pass of the network holds one image (two rows under guidance), on one thread, weights start at whole cache lines (products
round by the alignment, too, and what is mapped from a file lies anywhere), and experts compute the rows of each rank apart:
then every product is what it would be alone. On CPUs that costs large models nothing and is the default; on GPUs
it costs much, and images then agree to the rounding of the arithmetic.
Letters: B images of a pass, Z latent channels, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from promoe_ds.condition import ClassCondition
from promoe_ds.config import RunConfig
from promoe_ds.diffusion.sampler import SamplingPlan, image_generators, initial_noise, sample_latents


class Drawer:
    """Draws latents of a network."""

    def __init__(self, network: nn.Module, config: RunConfig, plan: SamplingPlan, *, seed: int, device: torch.device) -> None:
        """Draw from `network`, in evaluation mode on `device`."""
        self._network, self._plan, self._seed, self._device = network, plan, seed, device
        self._shape = (config.model.in_channels, config.model.input_size, config.model.input_size)
        self._scale, self._null = config.data.latent_scale, config.model.null_label

    def draw(self, indices: Sequence[int], labels_B: np.ndarray) -> Tensor:
        """Return the unscaled latents (B, Z, H, W), fp32, of some images, all in one pass."""
        noise = initial_noise(self._shape, seed=self._seed, indices=indices).to(self._device)
        condition = ClassCondition(torch.from_numpy(labels_B).to(self._device), self._null)
        latents = sample_latents(self._network, noise, condition, self._plan,
                                 image_generators(seed=self._seed, indices=indices))
        return latents / self._scale


def is_exact(asked: bool | None, config: RunConfig, device: torch.device) -> bool:
    """Resolve whether every pass holds one image: on CPUs unless the method mixes samples, where nobody asked for either."""
    if asked is not None:
        return asked
    return device.type == "cpu" and not config.routing.traits.mixes_samples


@contextmanager
def threads_of(*, exact: bool) -> Iterator[None]:
    """Compute on one thread where drawing is exact: more would cut the products, and launchers differ in how many they give."""
    before = torch.get_num_threads()
    if exact:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def align_weights(network: nn.Module) -> nn.Module:
    """Copy weights to memory that torch allocates, at whole cache lines; return the network."""
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone()
    return network


def even_passes(samples: int, *, batch_size: int, world_size: int) -> tuple[int, int]:
    """Return how many passes each rank makes for its share of some samples, and of how many images: as few as will do."""
    share = -(-samples // world_size)
    passes = -(-share // batch_size)
    return passes, -(-share // passes)


def units(indices: Sequence[int], *, size: int, num: int) -> list[range]:
    """Return the passes that draw `indices`: aligned blocks of `size` of 0 ... num - 1, whoever draws them."""
    return [range(first, min(first + size, num)) for first in sorted({index // size * size for index in indices})]
