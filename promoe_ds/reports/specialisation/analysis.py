"""All that is measured of a model's experts, layer by layer.

Letters: M noise levels, B images, S tokens per image, D width, E routed experts, n tokens kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from promoe_ds.errors import ConfigError
from promoe_ds.model.dit import DiT
from promoe_ds.reports.specialisation.collect import Batch, Observations, observe
from promoe_ds.reports.specialisation.measures import (
    Information,
    inter_intra_ratio,
    specialisation,
    subspace_similarity,
)

_CLUSTERS = 10


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
    of k-means clusters, of experts and of classes; tsne_n2: at the middle level.
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
        """Return all numbers, for JSON."""
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
                    "inter_intra_ratio": {
                        kind: [None if np.isnan(ratio) else ratio for ratio in ratios]
                        for kind, ratios in each.ratios.items()
                    },
                    "information": {
                        kind: {**asdict(found), "score": found.score}
                        for kind, found in each.information.items()
                    },
                }
                for each in self.layers
            ],
        }


def analyse(network: DiT, batch: Batch, settings: Settings, *, name: str) -> Analysis:
    """Measure every MoE layer of a model.

    Raises: ConfigError if the model has none, or a library of the extra `report` is missing.
    """
    if not network.moe_layers():
        raise ConfigError(f"{name} is dense: it has no experts to analyse")
    similarity = {
        index: subspace_similarity(layer.routed.down_weight.detach(), settings.singular_vectors)
        for index, layer in network.moe_layers().items()
    }
    seen = observe(network, batch, list(settings.sigmas), kept=settings.tokens, seed=settings.seed)
    layers = [
        _analyse_layer(index, similarity_EE, seen[index], batch, settings)
        for index, similarity_EE in similarity.items()
    ]
    chance = settings.singular_vectors / network.config.model.hidden_size
    return Analysis(name, settings, batch, network.config.routing.num_experts, chance, layers)


def _analyse_layer(
    index: int, similarity_EE: np.ndarray, seen: Observations, batch: Batch, settings: Settings
) -> LayerAnalysis:
    try:
        from sklearn.cluster import KMeans
        from sklearn.manifold import TSNE
    except ImportError:
        raise ConfigError(
            "scikit-learn is not installed, t-SNE and k-means need it: pip install"
            " 'promoe_ds[report]'"
        ) from None
    labels_n = batch.labels_B.numpy()[seen.places_n // seen.experts_MBS.shape[2]]
    ratios: dict[str, list[float]] = {"k-means clusters": [], "experts": [], "classes": []}
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
    information = specialisation(
        seen.experts_MBS, batch.labels_B.numpy(), rounds=settings.rounds, seed=settings.seed
    )
    return LayerAnalysis(index, seen, similarity_EE, ratios, information, tsne)
