"""Offline k-means of tokens, to start prototypes where tokens are.

Letters: T tokens, D width, E clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_ds.routing.scores import NORM_EPS

_ROUNDS = 30


@torch.no_grad()
def cluster_tokens(tokens_TD: Tensor, uniforms_E: Tensor, *, spherical: bool) -> Tensor:
    """Return centroids (E, D) in fp32: k-means++ starts (Arthur & Vassilvitskii, 2007), then
    Lloyd's rounds until nothing moves.

    Args:
        tokens_TD: at least E tokens.
        uniforms_E: uniform numbers in [0, 1), one a cluster, which draw the starts.
        spherical: by cosine (Dhillon & Modha, 2001), centroids of norm 1; else by Euclidean
        distance.
    Raises: ValueError if there are fewer tokens than clusters.
    """
    tokens_TD, num_clusters = tokens_TD.float(), len(uniforms_E)
    if len(tokens_TD) < num_clusters:
        raise ValueError(f"{len(tokens_TD)} tokens are too few for {num_clusters} clusters")
    if spherical:
        tokens_TD = F.normalize(tokens_TD, dim=-1, eps=NORM_EPS)
    centroids_ED, nearest_T = _start(tokens_TD, uniforms_E), None
    for _ in range(_ROUNDS):
        distances_TE = torch.cdist(tokens_TD, centroids_ED)
        before, nearest_T = nearest_T, distances_TE.argmin(dim=1)
        if before is not None and torch.equal(before, nearest_T):
            break
        counts_E = torch.bincount(nearest_T, minlength=num_clusters)
        sums_ED = torch.zeros_like(centroids_ED).index_add_(0, nearest_T, tokens_TD)
        centroids_ED = sums_ED / counts_E.clamp_min(1)[:, None]
        # A cluster that lost all its tokens starts again at those that are farthest from any
        # centroid.
        empty_E = (counts_E == 0).nonzero()[:, 0]
        farthest = distances_TE.amin(dim=1).topk(len(empty_E)).indices
        centroids_ED[empty_E] = tokens_TD[farthest]
        if spherical:
            centroids_ED = F.normalize(centroids_ED, dim=-1, eps=NORM_EPS)
    return centroids_ED


def _start(tokens_TD: Tensor, uniforms_E: Tensor) -> Tensor:
    """Choose tokens one by one, each with a probability that grows with its squared distance to
    those chosen.
    """
    chosen: list[int] = []
    squares_T = torch.ones(len(tokens_TD), dtype=torch.float64)
    for uniform in uniforms_E.double():
        if chosen:
            distances_T = torch.cdist(tokens_TD, tokens_TD[chosen[-1:]])[:, 0].double()
            squares_T = (
                torch.minimum(squares_T, distances_T.square())
                if len(chosen) > 1
                else distances_T.square()
            )
            squares_T[chosen] = 0.0
        ends_T = squares_T.cumsum(0)
        place = int(torch.searchsorted(ends_T, uniform * ends_T[-1], right=True))
        # It is past the end where all other tokens are equal to chosen ones.
        chosen.append(min(place, len(tokens_TD) - 1))
    return tokens_TD[chosen]
