"""Numbers for what experts specialise in; each can be compared with chance.

Letters: E experts, N tokens, D width, F hidden width, k singular vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from promoe_ds.errors import ConfigError


def subspace_similarity(down_weight_EDF: Tensor, k: int) -> np.ndarray:
    """Return how much the subspaces that experts write to overlap, (E, E): 1 is the same, k / D is
    chance.

    Source: Fig. 1(b), similarity of the top-k left singular vectors of the experts' weights; the
    paper does not give the formula: here |U_i^T U_j|_F^2 / k, the mean squared cosine of the
    principal angles, of the down projections, whose left singular vectors are in the residual
    stream that all experts share.
    Raises: ConfigError if k exceeds the rank.
    """
    largest = min(down_weight_EDF.shape[1:])
    if not 1 <= k <= largest:
        raise ConfigError(f"--singular-vectors {k}: an expert's matrix has 1 to {largest}")
    # Some devices have no double precision.
    device = down_weight_EDF.device if down_weight_EDF.is_cuda else "cpu"
    bases_EDk = torch.stack(
        [_written_subspace(weight_DF.to(device, torch.float64), k) for weight_DF in down_weight_EDF]
    )
    overlap_EE = (
        torch.stack([(basis_Dk.T @ bases_EDk).square().sum(dim=(1, 2)) for basis_Dk in bases_EDk])
        / k
    )
    return overlap_EE.cpu().numpy()


def _written_subspace(weight_DF: Tensor, k: int) -> Tensor:
    """Return an orthonormal basis (D, k) of the span of the top-k left singular vectors.

    They are the eigenvectors of W Wᵀ; where W is narrow, W takes those of the smaller WᵀW there.
    Either is several times faster than all singular vectors.
    """
    width, hidden = weight_DF.shape
    if width <= hidden:
        return torch.linalg.eigh(weight_DF @ weight_DF.T).eigenvectors[:, -k:]
    right_Fk = torch.linalg.eigh(weight_DF.T @ weight_DF).eigenvectors[:, -k:]
    return torch.linalg.qr(weight_DF @ right_Fk).Q


def inter_intra_ratio(tokens_ND: np.ndarray, groups_N: np.ndarray) -> float:
    """Return the mean distance between groups' centroids over the mean distance of a token from its
    own; tokens of no group, -1, are left out.

    NaN below two groups, and where all tokens are on their centroids.
    Source: Fig. 1(a), where the groups are clusters of k-means: large is compact and apart, below 1
    is diffuse.
    """
    tokens_ND, groups_N = tokens_ND[groups_N >= 0], groups_N[groups_N >= 0]
    names = np.unique(groups_N)
    if len(names) < 2:
        return float("nan")
    centroids = np.stack([tokens_ND[groups_N == name].mean(axis=0) for name in names])
    intra = np.linalg.norm(tokens_ND - centroids[np.searchsorted(names, groups_N)], axis=1).mean()
    distances = np.linalg.norm(centroids[:, None] - centroids[None], axis=-1)
    inter = distances[np.triu_indices(len(names), 1)].mean()
    return float(inter / intra) if intra > 0 else float("nan")


@dataclass(frozen=True)
class Information:
    """What an attribute tells of the expert.

    share: mutual information over the entropy of the expert, 0 ... 1; chance: the same with the
    attribute shuffled, its mean; chance_high: its 95th percentile; score: share - chance; p_value:
    how often chance reaches it, at least 1 / (rounds + 1).
    """

    share: float
    chance: float
    chance_high: float
    p_value: float

    @property
    def score(self) -> float:
        """Specialisation beyond chance."""
        return self.share - self.chance


def mutual_information(experts_N: np.ndarray, values_N: np.ndarray) -> float:
    """Return I(expert; value) / H(expert) of two integer arrays; 0 where the expert is always the
    same.
    """
    size, experts = int(values_N.max()) + 1, int(experts_N.max()) + 1
    joint = np.bincount(experts_N * size + values_N, minlength=experts * size) / len(experts_N)
    of_expert, of_value = (joint.reshape(-1, size).sum(axis=axis) for axis in (1, 0))
    entropy = -_plogp(of_expert)
    if entropy <= 1e-12:
        return 0.0
    return float((_plogp(joint) - _plogp(of_expert) - _plogp(of_value)) / entropy)


def _plogp(p: np.ndarray) -> float:
    used = p[p > 0]
    return float((used * np.log(used)).sum())


def specialisation(
    experts_MBS: np.ndarray,
    labels_B: np.ndarray,
    *,
    rounds: int,
    seed: int,
    group: str = "class",
) -> dict[str, Information]:
    """Return what the label (by the name of its `group`), noise level and position tell of the
    expert, each against its own kind of chance.

    Tokens of an image are alike, so labels are shuffled as whole images, noise levels within an
    image, positions within an image and level: the shuffled data keeps every other tie.
    """
    random = np.random.default_rng(seed)
    (levels, images, tokens), chosen_MBS = experts_MBS.shape, experts_MBS >= 0
    within_rows = partial(random.permuted, axis=1)
    # Values, how they are shuffled, and how they are laid out as (M, B, S), or broadcast to it.
    attributes: dict[str, tuple[np.ndarray, Callable, Callable]] = {
        group: (labels_B, random.permutation, lambda labels: labels[None, :, None]),
        "noise level": (
            np.tile(np.arange(levels), (images, 1)),
            within_rows,
            lambda levels_BM: levels_BM.T[:, :, None],
        ),
        "position": (
            np.tile(np.arange(tokens), (levels * images, 1)),
            within_rows,
            lambda places: places.reshape(experts_MBS.shape),
        ),
    }
    found = {}
    for name, (values, shuffled, laid_out) in attributes.items():
        drawn = [values, *(shuffled(values) for _ in range(rounds))]
        share, *by_chance = (
            mutual_information(
                experts_MBS[chosen_MBS],
                np.broadcast_to(laid_out(each), experts_MBS.shape)[chosen_MBS],
            )
            for each in drawn
        )
        found[name] = Information(
            share=share,
            chance=float(np.mean(by_chance)),
            chance_high=float(np.quantile(by_chance, 0.95)),
            p_value=float((1 + (np.array(by_chance) >= share).sum()) / (1 + rounds)),
        )
    return found
