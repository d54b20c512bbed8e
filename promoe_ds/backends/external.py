"""What the expert paths through other libraries' layers have in common: our router's decision, seen
token by token.

Such layers ask for the K choices of every token; an assignment lists rows by expert. Where experts
choose, tokens have unequal numbers of rows, which these layers cannot express: the config refuses
them.
Letters: N rows, S tokens that have rows, K choices of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from promoe_ds.routing.assignment import Assignment, expert_of_rows


@dataclass(frozen=True)
class TokenChoices:
    """An assignment by token.

    token_ids_S: int64, the tokens that have rows: those of unconditional samples have none.
    rows_SK: int64, where the assignment lists each one's K rows.
    expert_N: int64, the expert of every row of the assignment.
    """

    token_ids_S: Tensor
    rows_SK: Tensor
    expert_N: Tensor


def token_choices(assignment: Assignment, top_k: int) -> TokenChoices:
    """Sort an assignment by token, K rows each.  Sync: none."""
    rows_SK = torch.argsort(assignment.token_ids_N, stable=True).view(-1, top_k)
    return TokenChoices(assignment.token_ids_N[rows_SK[:, 0]], rows_SK, expert_of_rows(assignment))
