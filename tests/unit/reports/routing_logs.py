"""Logs of routing statistics made up for tests: small, with everything that a real one has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EXCHANGES = ("counts", "dispatch", "combine", "combine_backward", "dispatch_backward")


def detail(
    num_experts: int = 4, *, ep_size: int = 2, uneven: float | None = 1.2, **more: Any
) -> dict[str, Any]:
    return {
        "passes": 5,
        "ranks": 2,
        "ep_size": ep_size,
        "tokens_per_ep_rank": [10] * ep_size,
        "rank_max_over_mean": uneven,
        "exchanges": {name: {"bytes": 10, "seconds": 0.25} for name in EXCHANGES},
        "prototype_similarity_matrix": [
            [float(i == j) for j in range(num_experts)] for i in range(num_experts)
        ],
        "prototype_to_centroid": [min(1.0, 0.1 * e) for e in range(num_experts)],
        "prototype_to_other_centroids": [-0.2] * num_experts,
        **more,
    }


def line(
    step: int,
    layer: int,
    bin_: int,
    tokens: list[int],
    *,
    bins: int = 2,
    steps: int = 5,
    details: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return a line; `details` are further fields of its layer_detail."""
    total = sum(tokens)
    values = {
        "schema": 2,
        "step": step,
        "steps": steps,
        "layer": layer,
        "timestep_bin": bin_,
        "timestep_bins": bins,
        "tokens_per_expert": tokens,
        "gate_sum_per_expert": [0.5 * n for n in tokens],
        "conditional_tokens": total,
        "unconditional_tokens": 3,
        "gate_mean": 0.5 if total else None,
        "load_max_over_mean": max(tokens) * len(tokens) / total if total else None,
        "load_entropy": 0.5 if total else None,
        "dead_experts": tokens.count(0) if total else None,
        "load_cv": 0.4 if total else None,
        "prototype_similarity": 0.1,
        "layer_bytes_exchanged": 100 * step,
    }
    if bin_ == 0:
        values["layer_detail"] = detail(len(tokens), **(details or {}))
    return values | more


def interval(
    *steps: int,
    layers: tuple[int, ...] = (1, 3),
    tokens: list[int] | None = None,
    length: int = 5,
    **more: Any,
) -> list[dict[str, Any]]:
    """Return the lines of log intervals that end at `steps`; `more` as of `line`."""
    return [
        line(step, layer, bin_, tokens or [step, layer, bin_ + 1, 4], steps=length, **more)
        for step in steps
        for layer in layers
        for bin_ in (0, 1)
    ]


def old(values: dict[str, Any]) -> dict[str, Any]:
    """Return the line as schema 1 had it."""
    younger = ("gate_sum_per_expert", "load_cv", "layer_detail")
    return {**{name: value for name, value in values.items() if name not in younger}, "schema": 1}


def write(folder: Path, lines: list[dict[str, Any] | str], *, end: str = "\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [each if isinstance(each, str) else json.dumps(each) for each in lines]
    (folder / "routing.jsonl").write_text("\n".join(texts) + end, encoding="utf-8")
    return folder
