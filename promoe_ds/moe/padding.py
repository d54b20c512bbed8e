"""Rows grouped by expert, each group filled up to a multiple: what FP8 matrix products ask for,
undone exactly.

Letters: e experts, R rows, P rows after padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddedGroups:
    """Where rows are among padded groups.

    sizes: rows of each group after padding, a multiple of the alignment, never 0: every expert
    computes.
    places_R: int64, the place of each row among the P padded ones.
    """

    sizes: tuple[int, ...]
    places_R: Tensor

    def pad(self, rows_RD: Tensor) -> Tensor:
        """Return (P, D) rows, zeros between the groups."""
        return rows_RD.new_zeros(sum(self.sizes), rows_RD.shape[1]).index_copy(
            0, self.places_R, rows_RD
        )

    def unpad(self, rows_PD: Tensor) -> Tensor:
        """Return the (R, D) rows that are not padding, in their order."""
        return rows_PD.index_select(0, self.places_R)


def pad_groups(counts: list[int], multiple: int, device: torch.device) -> PaddedGroups:
    """Plan the padding of groups of `counts` rows to multiples of `multiple`, at least one multiple
    each.
    """
    sizes = tuple(max(multiple, -(-count // multiple) * multiple) for count in counts)
    paddings = [size - count for count, size in zip(counts, sizes, strict=True)]
    places = torch.arange(sum(counts), device=device)
    places += torch.repeat_interleave(
        torch.tensor([0, *accumulate(paddings[:-1])], device=device),
        torch.tensor(counts, device=device),
        output_size=sum(counts),
    )
    return PaddedGroups(sizes, places)


def pad_rows(rows_RD: Tensor, multiple: int) -> Tensor:
    """Return the rows filled up with zeros to a multiple of `multiple`, at least one multiple; the
    same tensor if they are.
    """
    missing = max(multiple, -(-rows_RD.shape[0] // multiple) * multiple) - rows_RD.shape[0]
    return rows_RD if missing == 0 else torch.nn.functional.pad(rows_RD, (0, 0, 0, missing))
