"""Expert load per layer, summed over the log steps asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """One layer's load over a range of steps; prototype_similarity is the newest one, NaN where it was not finite."""

    layer: int
    tokens_per_expert: list[int]
    conditional_tokens: int
    unconditional_tokens: int
    prototype_similarity: float
    bytes_exchanged: int

    @property
    def shares(self) -> list[float]:
        """Each expert's share of the routed assignments; zeros where there were none."""
        total = sum(self.tokens_per_expert)
        return [count / total if total else 0.0 for count in self.tokens_per_expert]

    @property
    def max_over_mean(self) -> float:
        """Largest load over the mean load: 1 is even, E is all on one expert; NaN without tokens."""
        total = sum(self.tokens_per_expert)
        return max(self.tokens_per_expert) * len(self.tokens_per_expert) / total if total else math.nan

    @property
    def coefficient_of_variation(self) -> float:
        """Standard deviation of the loads over their mean; NaN without tokens."""
        mean = sum(self.tokens_per_expert) / len(self.tokens_per_expert)
        if not mean:
            return math.nan
        return math.sqrt(sum((n - mean) ** 2 for n in self.tokens_per_expert) / len(self.tokens_per_expert)) / mean

    @property
    def entropy(self) -> float:
        """Entropy of the shares over log E: 1 is even, 0 is all on one; NaN without tokens."""
        used = [share for share in self.shares if share > 0]
        if not used:
            return math.nan
        experts = len(self.tokens_per_expert)
        return -sum(share * math.log(share) for share in used) / math.log(experts) if experts > 1 else 1.0


def summarise_load(records: list[dict[str, Any]], *, last_steps: int | None = None) -> list[LayerLoad]:
    """Sum timestep bins and log steps into one row a layer.

    Args:
        records: of `read_routing_log`.
        last_steps: only records of the last so many training steps; all if left out.
    """
    newest = max(record["step"] for record in records)
    if last_steps is not None:
        records = [record for record in records if record["step"] > newest - last_steps]
    return [_sum_layer(layer, [r for r in records if r["layer"] == layer]) for layer in sorted({r["layer"] for r in records})]


def _sum_layer(layer: int, records: list[dict[str, Any]]) -> LayerLoad:
    by_step = {record["step"]: record for record in records}
    similarity = by_step[max(by_step)]["prototype_similarity"]
    return LayerLoad(
        layer=layer, tokens_per_expert=[sum(column) for column in zip(*(r["tokens_per_expert"] for r in records), strict=True)],
        conditional_tokens=sum(r["conditional_tokens"] for r in records),
        unconditional_tokens=sum(r["unconditional_tokens"] for r in records),
        prototype_similarity=math.nan if similarity is None else similarity,
        # Stated for the layer on the line of every bin: count it once a step.
        bytes_exchanged=sum(r["layer_bytes_exchanged"] for r in by_step.values()))
