"""Watching a model route a batch at several noise levels.

Letters: M noise levels, B images, S tokens per image, D width, E routed experts, n tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.data import LatentDataset
from promoe_ds.diffusion import DiffusionBatch, build_objective
from promoe_ds.errors import DataError
from promoe_ds.model.dit import DiT
from promoe_ds.routing.assignment import Assignment, expert_of_rows

_IMAGES_A_PASS = 16


@dataclass(frozen=True)
class Batch:
    """Images (B, Z, H, W), their conditions and the noise that all levels share."""

    clean_BZHW: Tensor
    condition: ClassCondition
    noise_BZHW: Tensor

    @property
    def labels_B(self) -> Tensor:
        """The images' classes."""
        return self.condition.labels_B


@dataclass(frozen=True)
class Observations:
    """What one layer did.

    experts_MBS: each token's expert with the largest gate, -1 for none; tokens_MnD: some tokens as
    they enter the layer, the same places at every level; places_n: their places in the flattened
    (B, S).
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
    clean, condition = dataset.take(np.sort(random.permutation(len(dataset))[:count]))
    assert isinstance(condition, ClassCondition)
    return Batch(
        clean, condition, torch.from_numpy(random.standard_normal(clean.shape, dtype=np.float32))
    )


@torch.no_grad()
def observe(
    network: DiT, batch: Batch, sigmas: list[float], *, kept: int, seed: int
) -> dict[int, Observations]:
    """Route the batch at every noise level, conditional on its classes.

    Args:
        network: in evaluation mode; kept: tokens to keep of each level and layer.
    Returns: by layer.
    """
    tokens_per_image, images = network.config.model.tokens_per_image, len(batch.labels_B)
    places_n = np.sort(np.random.default_rng(seed).permutation(images * tokens_per_image)[:kept])
    experts: dict[int, list[np.ndarray]] = {index: [] for index in network.moe_layers()}
    tokens: dict[int, list[np.ndarray]] = {index: [] for index in network.moe_layers()}
    for sigma in sigmas:
        parts = [
            _route(network, batch, sigma, slice(start, start + _IMAGES_A_PASS), places_n)
            for start in range(0, images, _IMAGES_A_PASS)
        ]
        for index in experts:
            experts[index].append(
                np.concatenate([chosen[index] for chosen, _ in parts]).reshape(-1, tokens_per_image)
            )
            tokens[index].append(np.concatenate([entering[index] for _, entering in parts]))
    return {
        index: Observations(np.stack(experts[index]), np.stack(tokens[index]), places_n)
        for index in experts
    }


def _route(
    network: DiT, batch: Batch, sigma: float, part: slice, places_n: np.ndarray
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Route some images; return, by layer, each token's best expert and the tokens of the places
    that lie in them.
    """
    device, condition, entering = network.positions.device, batch.condition.select(part), {}
    one = DiffusionBatch(
        batch.clean_BZHW[part],
        batch.noise_BZHW[part],
        torch.full((len(condition),), sigma),
        condition,
    ).to(device)
    rows_n = places_n - part.start * network.config.model.tokens_per_image
    num_tokens = len(condition) * network.config.model.tokens_per_image
    rows_n = torch.from_numpy(rows_n[(rows_n >= 0) & (rows_n < num_tokens)]).to(device)

    def keep(index: int, tokens_BSD: Tensor) -> None:
        entering[index] = tokens_BSD.flatten(0, 1)[rows_n].float().cpu().numpy()

    hooks = [
        layer.router.register_forward_pre_hook(lambda _, given, index=index: keep(index, given[0]))
        for index, layer in network.moe_layers().items()
    ]
    objective = build_objective(network.config.diffusion)
    try:
        plans = network.denoise(objective.noised(one), objective.timestep(one), one.condition).plans
    finally:
        for hook in hooks:
            hook.remove()
    return {
        index: best_expert(plan.assignment, num_tokens) for index, plan in plans.items()
    }, entering


def best_expert(assignment: Assignment, num_tokens: int) -> np.ndarray:
    """Return the expert that weighs most in each token, int64 (T,); -1 for a token without
    expert.
    """
    tokens_N, gates_N = (
        assignment.token_ids_N.cpu().numpy(),
        assignment.gates_N.float().cpu().numpy(),
    )
    order_N = np.lexsort((gates_N, tokens_N))
    last_N = np.append(np.diff(tokens_N[order_N]) != 0, True)[: len(order_N)]
    chosen_T = np.full(num_tokens, -1)
    chosen_T[tokens_N[order_N][last_N]] = expert_of_rows(assignment).cpu().numpy()[order_N][last_N]
    return chosen_T
