"""Improved precision and recall: shares of a set in the other's manifold (Kynkäänniemi et al.,
2019).

Letters: N images, M images of the other set, d features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from promoe_ds.distributed.context import DistributedContext

#: Of ADM and of the paper.
NEIGHBOURS = 3
_BLOCK_VALUES = 2**24


def share_in_manifold(
    values_Nd: np.ndarray,
    members_Md: np.ndarray,
    team: DistributedContext,
    *,
    neighbours: int = NEIGHBOURS,
    half: bool = False,
) -> float:
    """Return the share of images that lie in the manifold of a set: precision, for samples in the
    reference's manifold; recall, for reference images in the samples'.

    An image is in a manifold if it is within, or on, the sphere of any of its members, which
    reaches to the member's `neighbours`-th nearest other member. Each rank takes a share of the
    rows; all call this together.
    Source: Kynkäänniemi et al., Eq. 1-3; ADM: the same, distances in half precision where they stay
    finite; differs: fp64 but for `half`, whose blocks, which must be finite as a whole, are smaller
    than ADM's 10,000 x 10,000.
    Raises: ValueError if the set has no more images than `neighbours`.
    """
    if len(members_Md) <= neighbours:
        raise ValueError(f"a manifold needs more than {neighbours} images, got {len(members_Md)}")
    dtype = torch.float32 if half else torch.float64
    values, members = (
        torch.from_numpy(np.ascontiguousarray(each)).to(team.device, dtype)
        for each in (values_Nd, members_Md)
    )
    radii_M, inside = _radii(members, neighbours, team), 0
    for rows in _blocks(len(values), len(members), team):
        distances = _squared_distances(values[rows.start : rows.stop], members)
        inside += int((distances <= radii_M).any(dim=1).sum())
    return float(team.sum(np.array([float(inside)]))[0] / len(values))


def _radii(values_Nd: Tensor, neighbours: int, team: DistributedContext) -> Tensor:
    """Return each member's squared distance to its k-th nearest other one, (N,)."""
    radii = np.zeros(len(values_Nd))
    for rows in _blocks(len(values_Nd), len(values_Nd), team):
        distances = _squared_distances(values_Nd[rows.start : rows.stop], values_Nd)
        if distances.dtype == torch.float64:
            # The nearest is the member itself; ADM takes the rounded distance.
            own = torch.arange(rows.start, rows.stop, device=distances.device)
            distances[torch.arange(len(own), device=distances.device), own] = 0.0
        radii[rows.start : rows.stop] = (
            distances.kthvalue(neighbours + 1, dim=1).values.cpu().numpy()
        )
    return torch.from_numpy(team.sum(radii)).to(values_Nd)


def _blocks(rows: int, columns: int, team: DistributedContext) -> list[range]:
    size = max(1, _BLOCK_VALUES // columns)
    return [range(first, min(first + size, rows)) for first in range(0, rows, size)][
        team.rank :: team.world_size
    ]


def _squared_distances(a_Nd: Tensor, b_Md: Tensor) -> Tensor:
    """Return (N, M): fp64, or, of fp32 values, fp32 rounded to half precision where all is
    finite.
    """
    if a_Nd.dtype == torch.float32:
        a_half, b_half = a_Nd.half(), b_Md.half()
        norms_N, norms_M = (
            values.square().float().sum(dim=1).half() for values in (a_half, b_half)
        )
        products = (
            a_half.float() @ b_half.float().T
        ).half()  # products of halves add up in fp32, as on GPUs
        distances = (norms_N[:, None] - 2 * products + norms_M[None]).clamp_(min=0)
        if distances.isfinite().all():
            return distances.float()
    squares = a_Nd.square().sum(dim=1)[:, None] + b_Md.square().sum(dim=1)[None]
    return torch.addmm(squares, a_Nd, b_Md.T, alpha=-2.0).clamp_(min=0.0)
