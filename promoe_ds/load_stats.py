"""How evenly tokens are spread over experts: the formulas of training log, trackers and reports.

Each takes tokens by expert in the last dimension (E) and returns one value for the others, NaN
without tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def divide(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Return values / by, NaN where `by` is not positive."""
    shape = np.broadcast_shapes(np.shape(values), np.shape(by))
    return np.divide(values, by, out=np.full(shape, np.nan), where=by > 0)


def known_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean of the values that are not NaN, NaN where all are."""
    return divide(np.nansum(values, axis=axis), (~np.isnan(values)).sum(axis=axis))


def shares(tokens_E: np.ndarray) -> np.ndarray:
    """Return loads over their sum (..., E)."""
    return divide(tokens_E, tokens_E.sum(axis=-1, keepdims=True))


def relative(tokens_E: np.ndarray) -> np.ndarray:
    """Return loads over an even share (..., E): 1 is even."""
    return shares(tokens_E) * tokens_E.shape[-1]


def max_over_mean(tokens_E: np.ndarray) -> np.ndarray:
    """Return the largest load over the mean one: 1 is even, E is all on one expert."""
    return divide(tokens_E.max(axis=-1) * tokens_E.shape[-1], tokens_E.sum(axis=-1))


def variation(tokens_E: np.ndarray) -> np.ndarray:
    """Return the coefficient of variation, the loads' standard deviation over their mean."""
    return relative(tokens_E).std(axis=-1)


def entropy(tokens_E: np.ndarray) -> np.ndarray:
    """Return the entropy of the shares over log E: 1 is even, 0 is all on one."""
    part, experts = shares(tokens_E), tokens_E.shape[-1]
    if experts == 1:
        return part[..., 0]
    logs = np.log(part, out=np.zeros_like(part), where=part > 0)
    return np.abs((part * logs).sum(axis=-1)) / np.log(experts)  # no -0.0, which is printed


def load_summary(tokens_per_expert: Sequence[int]) -> dict[str, float | int | None]:
    """Return the fields of routing.jsonl that describe a load; all None without tokens."""
    tokens_E = np.asarray(tokens_per_expert, dtype=np.float64)
    if not tokens_E.any():
        return dict.fromkeys(("load_max_over_mean", "load_entropy", "dead_experts", "load_cv"))
    return {
        "load_max_over_mean": float(max_over_mean(tokens_E)),
        "load_entropy": float(entropy(tokens_E)),
        "dead_experts": int((tokens_E == 0).sum()),
        "load_cv": float(f"{variation(tokens_E):.6g}"),
    }
