"""Watching a model route a batch at several noise levels.

Letters: M noise levels, B images, S tokens per image, D width, E routed experts, n tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from promoe_ds.data.build import LatentDataset
from promoe_ds.diffusion import DiffusionBatch, build_objective
from promoe_ds.errors import DataError
from promoe_ds.model.dit import DiT
from promoe_ds.routing.assignment import Assignment, expert_of_rows

_IMAGES_A_PASS = 16


@dataclass(frozen=True)
class Batch:
    """Images (B, Z, H, W), their classes (B,) and the noise that all levels share."""

    clean_BZHW: Tensor
    labels_B: Tensor
    noise_BZHW: Tensor


@dataclass(frozen=True)
class Observations:
    """What one layer did.

    experts_MBS: each token's expert with the largest gate, -1 for none; tokens_MnD: some tokens as they enter the layer, the
    same places at every level; places_n: their places in the flattened (B, S).
    """

    experts_MBS: np.ndarray
    tokens_MnD: np.ndarray
    places_n: np.ndarray


def draw_images(dataset: LatentDataset, count: int, seed: int) -> Batch:
    """Take images at random, the same for the same seed.

    Raises: DataError if the set has fewer.
    """
    if count > len(dataset):
        raise DataError(f"--images {count}: the data set has {len(dataset)}: ask for fewer")
    random = np.random.default_rng(seed)
    clean, labels = dataset.take(np.sort(random.permutation(len(dataset))[:count]))
    return Batch(clean, labels, torch.from_numpy(random.standard_normal(clean.shape, dtype=np.float32)))


@torch.no_grad()
def observe(network: DiT, batch: Batch, sigmas: list[float], *, kept: int, seed: int) -> dict[int, Observations]:
    """Route the batch at every noise level, conditional on its classes.

    Args:
        network: in evaluation mode; kept: tokens to keep of each level and layer.
    Returns: by layer.
    """
    tokens_per_image = network.config.model.tokens_per_image
    total = len(batch.labels_B) * tokens_per_image
    places = np.sort(np.random.default_rng(seed).permutation(total)[:kept])
    seen: dict[int, list[Tensor]] = {}
    hooks = [layer.router.register_forward_pre_hook(lambda _, given, index=index: seen.setdefault(index, []).append(given[0]))
             for index, layer in network.moe_layers().items()]
    experts: dict[int, list[np.ndarray]] = {index: [] for index in network.moe_layers()}
    tokens: dict[int, list[np.ndarray]] = {index: [] for index in network.moe_layers()}
    try:
        for sigma in sigmas:
            plans_of_parts = [_plans(network, batch, sigma, start) for start in range(0, len(batch.labels_B), _IMAGES_A_PASS)]
            for index in experts:
                chosen = [best_expert(plans[index].assignment, count * tokens_per_image) for plans, count in plans_of_parts]
                experts[index].append(np.concatenate(chosen).reshape(-1, tokens_per_image))
                tokens[index].append(torch.cat(seen[index]).flatten(0, 1)[torch.from_numpy(places)].float().cpu().numpy())
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return {index: Observations(np.stack(experts[index]), np.stack(tokens[index]), places) for index in experts}


def _plans(network: DiT, batch: Batch, sigma: float, start: int):
    part = slice(start, start + _IMAGES_A_PASS)
    device = network.positions.device
    labels_B = batch.labels_B[part]
    one = DiffusionBatch(batch.clean_BZHW[part], batch.noise_BZHW[part], torch.full((len(labels_B),), sigma), labels_B).to(device)
    objective = build_objective(network.config.diffusion)
    return network.denoise(objective.noised(one), objective.timestep(one), one.labels_B).plans, len(labels_B)


def best_expert(assignment: Assignment, num_tokens: int) -> np.ndarray:
    """Return the expert that weighs most in each token, int64 (T,); -1 for a token without expert."""
    tokens_N, gates_N = assignment.token_ids_N.cpu().numpy(), assignment.gates_N.float().cpu().numpy()
    order_N = np.lexsort((gates_N, tokens_N))
    last_N = np.append(np.diff(tokens_N[order_N]) != 0, True)[:len(order_N)]
    chosen_T = np.full(num_tokens, -1)
    chosen_T[tokens_N[order_N][last_N]] = expert_of_rows(assignment).cpu().numpy()[order_N][last_N]
    return chosen_T
