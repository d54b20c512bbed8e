"""What the routing statistics cost: their share of a training step, and the report of a long run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class MadeUpRun:
    """A long run's log: loads that drift, an expert that dies half-way, one that starves."""

    steps: int = 500_000
    log_every: int = 50
    layers: tuple[int, ...] = tuple(range(1, 28, 2))
    experts: int = 12
    bins: int = 10
    ep_size: int = 4
    seed: int = 0

    def write(self, path: Path) -> int:
        """Write routing.jsonl; return the number of lines."""
        random, lines = np.random.default_rng(self.seed), 0
        base_LE = random.dirichlet(np.full(self.experts, 8.0), size=len(self.layers))
        with path.open("w", encoding="utf-8") as file:
            for step in range(self.log_every, self.steps + 1, self.log_every):
                shares_LE = base_LE * np.exp(0.2 * random.standard_normal(base_LE.shape))
                shares_LE[0, 1] *= step < self.steps / 2
                shares_LE[-1, 2] *= 0.02
                shares_LE /= shares_LE.sum(axis=1, keepdims=True)
                tokens_LQE = random.poisson(shares_LE[:, None] * 3000.0, size=(len(self.layers), self.bins, self.experts))
                for row, layer in enumerate(self.layers):
                    file.writelines(self._lines(step, layer, tokens_LQE[row]))
                    lines += self.bins
        return lines

    def _lines(self, step: int, layer: int, tokens_QE: np.ndarray) -> list[str]:
        result, experts = [], self.experts
        for bin_, tokens in enumerate(tokens_QE.tolist()):
            total = sum(tokens)
            line = {"schema": 2, "step": step, "steps": self.log_every, "layer": layer, "timestep_bin": bin_,
                    "timestep_bins": self.bins, "tokens_per_expert": tokens,
                    "gate_sum_per_expert": [round(0.3 * n, 2) for n in tokens], "conditional_tokens": total,
                    "unconditional_tokens": total // 9, "gate_mean": 0.3, "load_max_over_mean": max(tokens) * experts / total,
                    "load_entropy": 0.9, "dead_experts": tokens.count(0), "load_cv": 0.2, "prototype_similarity": -0.08,
                    "layer_bytes_exchanged": 40 * total}
            if bin_ == 0:
                line["layer_detail"] = self._detail(tokens_QE.sum(axis=0))
            result.append(json.dumps(line) + "\n")
        return result

    def _detail(self, tokens_E: np.ndarray) -> dict[str, object]:
        experts = self.experts
        cosines = np.full((experts, experts), -0.08) + 1.08 * np.eye(experts)
        by_rank = tokens_E.reshape(self.ep_size, -1).sum(axis=1)
        names = ("counts", "dispatch", "combine", "combine_backward", "dispatch_backward")
        return {"passes": self.log_every, "ranks": 2 * self.ep_size, "ep_size": self.ep_size,
                "tokens_per_ep_rank": by_rank.tolist(), "rank_max_over_mean": float(by_rank.max() / by_rank.mean()) + 0.1,
                "exchanges": {name: {"bytes": 1000, "seconds": 0.01} for name in names},
                "prototype_similarity_matrix": cosines.round(4).tolist(), "prototype_to_centroid": [0.7] * experts,
                "prototype_to_other_centroids": [-0.06] * experts}
