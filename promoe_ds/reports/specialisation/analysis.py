"""All that is measured of a model's experts, layer by layer: it routes a batch at several noise
levels.

Letters: M noise levels, B images, S tokens per image, D width, E routed experts, n tokens kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promoe_ds.condition import Condition, TextCondition
from promoe_ds.data import LatentDataset, largest_bucket
from promoe_ds.diffusion import DiffusionBatch, build_objective
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.model.dit import DiT
from promoe_ds.reports.specialisation.measures import (
    Information,
    inter_intra_ratio,
    specialisation,
    subspace_similarity,
)
from promoe_ds.routing.assignment import Assignment, expert_of_rows

_CLUSTERS, _IMAGES_A_PASS = 10, 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Noise levels, tokens kept of each for t-SNE and k-means, singular vectors, rounds of
    shuffling.
    """

    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    tokens: int = 800
    singular_vectors: int = 8
    rounds: int = 100
    seed: int = 0


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer in numbers.

    similarity_EE: overlap of the experts' output subspaces; ratios: inter/intra distance by level,
    of k-means clusters, of experts and of classes or caption groups; tsne_n2: at the middle level.
    """

    layer: int
    seen: Observations
    similarity_EE: np.ndarray
    ratios: dict[str, list[float]]
    information: dict[str, Information]
    tsne_n2: np.ndarray

    @property
    def overlap(self) -> float:
        """Mean of the similarity of two experts; NaN of one expert."""
        off_diagonal = self.similarity_EE[~np.eye(len(self.similarity_EE), dtype=bool)]
        return float(off_diagonal.mean()) if len(off_diagonal) else float("nan")


@dataclass(frozen=True)
class Analysis:
    """All layers. chance: overlap of random subspaces."""

    name: str
    settings: Settings
    batch: Batch
    experts: int
    chance: float
    layers: list[LayerAnalysis]

    def numbers(self) -> dict[str, Any]:
        """Return all numbers, for JSON, where NaN becomes null."""
        return {
            "format": 1,
            "model": self.name,
            "settings": asdict(self.settings),
            "images": len(self.batch.labels_B),
            "subspace_chance": self.chance,
            "layers": [
                {
                    "layer": each.layer,
                    "subspace_similarity": each.similarity_EE.round(5).tolist(),
                    "inter_intra_ratio": each.ratios,
                    "information": {
                        kind: {**asdict(found), "score": found.score}
                        for kind, found in each.information.items()
                    },
                }
                for each in self.layers
            ],
        }


@dataclass(frozen=True)
class Batch:
    """Images (B, Z, H, W), their conditions and groups, and the noise that all levels share.

    group, groups: what a group is called: class, or caption group.
    """

    clean_BZHW: Tensor
    condition: Condition
    labels_B: Tensor
    noise_BZHW: Tensor
    group: str
    groups: str


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
    """Take images at random, the same for the same seed; of several sizes, those of the largest.

    Raises: DataError if the set has fewer, or captions without groups.
    """
    dataset = largest_bucket(dataset)
    if count > len(dataset):
        raise DataError(f"--images {count}: the data set has {len(dataset)}: ask for fewer")
    random = np.random.default_rng(seed)
    clean, condition = dataset.take(np.sort(random.permutation(len(dataset))[:count]))
    if condition.group_B is None:
        raise DataError(
            "the analysis sorts images by the groups of their captions, and this data set knows"
            " none (data.caption_groups=0)"
        )
    noise = torch.from_numpy(random.standard_normal(clean.shape, dtype=np.float32))
    is_text = isinstance(condition, TextCondition)
    names = ("caption group", "caption groups") if is_text else ("class", "classes")
    return Batch(clean, condition, condition.group_B, noise, *names)


def analyse(network: DiT, batch: Batch, settings: Settings, *, name: str) -> Analysis:
    """Measure every MoE layer of a model.

    Raises: ConfigError if the model has none.
    """
    if not network.moe_layers():
        raise ConfigError(f"{name} is dense: it has no experts to analyse")
    similarity = {
        index: subspace_similarity(layer.routed.down_weight.detach(), settings.singular_vectors)
        for index, layer in network.moe_layers().items()
    }
    seen = observe(network, batch, settings.sigmas, kept=settings.tokens, seed=settings.seed)
    layers = [
        _analyse_layer(index, similarity_EE, seen[index], batch, settings)
        for index, similarity_EE in similarity.items()
    ]
    chance = settings.singular_vectors / network.config.model.hidden_size
    return Analysis(name, settings, batch, network.config.routing.num_experts, chance, layers)


def _analyse_layer(
    index: int, similarity_EE: np.ndarray, seen: Observations, batch: Batch, settings: Settings
) -> LayerAnalysis:
    from sklearn.cluster import KMeans
    from sklearn.manifold import TSNE

    labels_n = batch.labels_B.numpy()[seen.places_n // seen.experts_MBS.shape[2]]
    ratios: dict[str, list[float]] = {"k-means clusters": [], "experts": [], batch.groups: []}
    for level, tokens_nD in enumerate(seen.tokens_MnD):
        clusters = KMeans(
            min(_CLUSTERS, len(tokens_nD)), n_init=3, random_state=settings.seed
        ).fit_predict(tokens_nD)
        experts_n = seen.experts_MBS[level].ravel()[seen.places_n]
        for key, groups in zip(ratios, (clusters, experts_n, labels_n), strict=True):
            ratios[key].append(inter_intra_ratio(tokens_nD, groups))
    middle = seen.tokens_MnD[len(settings.sigmas) // 2]
    tsne = TSNE(
        perplexity=min(30.0, (len(middle) - 1) / 3), init="pca", random_state=settings.seed
    ).fit_transform(middle)
    information = _information(seen, batch, settings)
    return LayerAnalysis(index, seen, similarity_EE, ratios, information, tsne)


def expert_information(network: DiT, batch: Batch, settings: Settings) -> dict[str, float]:
    """Return what the images' group (class or caption group: `group`), the noise level and the
    position tell of a token's expert beyond chance, each the mean over the MoE layers.
    """
    seen = observe(network, batch, settings.sigmas, kept=0, seed=settings.seed)
    layers = [_information(each, batch, settings) for each in seen.values()]
    return {
        "group" if kind == batch.group else kind: float(
            np.mean([layer[kind].score for layer in layers])
        )
        for kind in layers[0]
    }


def _information(seen: Observations, batch: Batch, settings: Settings) -> dict[str, Information]:
    return specialisation(
        seen.experts_MBS,
        batch.labels_B.numpy(),
        group=batch.group,
        rounds=settings.rounds,
        seed=settings.seed,
    )


@torch.no_grad()
def observe(
    network: DiT, batch: Batch, sigmas: Sequence[float], *, kept: int, seed: int
) -> dict[int, Observations]:
    """Route the batch at every noise level, conditional on its own conditions.

    Args:
        network: in evaluation mode; kept: tokens to keep of each level and layer.
    Returns: by layer.
    """
    tokens_per_image, images = network.config.model.tokens_per_image, len(batch.labels_B)
    places_n = np.sort(np.random.default_rng(seed).permutation(images * tokens_per_image)[:kept])
    starts = range(0, images, _IMAGES_A_PASS)
    levels = [
        [
            _route(network, batch, sigma, slice(start, start + _IMAGES_A_PASS), places_n)
            for start in starts
        ]
        for sigma in sigmas
    ]

    def joined(index: int, kind: int) -> np.ndarray:
        return np.stack([np.concatenate([part[index][kind] for part in parts]) for parts in levels])

    return {
        index: Observations(
            joined(index, 0).reshape(len(sigmas), images, -1), joined(index, 1), places_n
        )
        for index in network.moe_layers()
    }


def _route(
    network: DiT, batch: Batch, sigma: float, part: slice, places_n: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Route some images; return, by layer, each token's best expert and the tokens at the places
    that are in them.
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

    objective = build_objective(network.config.diffusion)
    with ExitStack() as hooks:
        for index, layer in network.moe_layers().items():
            hook = layer.router.register_forward_pre_hook(
                lambda _, given, index=index: keep(index, given[0])
            )
            hooks.callback(hook.remove)
        plans = network.denoise(objective.noised(one), objective.timestep(one), one.condition).plans
    return {
        index: (best_expert(plan.assignment, num_tokens), entering[index])
        for index, plan in plans.items()
    }


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
