"""Routing statistics: accumulated on the device, reduced once per log interval, written as routing.jsonl.

The format is documented in docs/routing_stats.md. Letters: B images, E routed experts, L MoE layers, Q timestep bins.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from promoe_ds.config import RunConfig
from promoe_ds.engine.distributed import Ranks
from promoe_ds.model.dit import DiT
from promoe_ds.routing.assignment import RoutingPlan

SCHEMA_VERSION = 1


class RoutingAccumulator:
    """Counts of one log interval. Fed with plans, which exist once per pass whatever is recomputed."""

    def __init__(self, config: RunConfig, network: DiT, ranks: Ranks) -> None:
        """Prepare counters for the network's MoE layers."""
        self._config = config
        self._layers = network.moe_layers()
        self._bins = config.logging.timestep_bins
        experts = config.routing.num_experts
        # Columns: tokens per expert, routed tokens, unconditional tokens, sum of gates. Doubles count exactly to 2**53.
        self._counts_LQC = torch.zeros(len(self._layers), self._bins, experts + 3, dtype=torch.float64, device=ranks.device)
        self._similarity_L = torch.zeros(len(self._layers), dtype=torch.float64, device=ranks.device)
        self._bytes_L = torch.zeros(len(self._layers), dtype=torch.float64, device=ranks.device)
        self._passes = 0

    def add(self, plans: dict[int, RoutingPlan], sigma_B: Tensor) -> None:
        """Count one pass.  Sync: none.

        Args:
            plans: by block index, as the model returned them.
            sigma_B: noise levels; bin q holds q / Q <= sigma < (q + 1) / Q, the last one also 1.
        """
        if not self._layers:
            return
        bin_B = (sigma_B * self._bins).long().clamp_(0, self._bins - 1)
        in_bin_QB = torch.nn.functional.one_hot(bin_B, self._bins).T.double()
        tokens, width = self._config.model.tokens_per_image, self._config.model.hidden_size
        for row, (index, layer) in enumerate(self._layers.items()):
            stats = plans[index].stats
            routed_B = stats.is_routed_B.double()
            columns_BC = torch.cat([stats.tokens_per_expert_BE.double(), (tokens * routed_B)[:, None],
                                    (tokens * (1 - routed_B))[:, None], stats.gate_sums_B.double()[:, None]], dim=1)
            self._counts_LQC[row] += in_bin_QB @ columns_BC
            self._similarity_L[row] += stats.prototype_similarity.double()
            element_size = next(layer.routed.parameters()).element_size()
            self._bytes_L[row] += layer.dispatcher.bytes_exchanged(plans[index].assignment, width, element_size)
        self._passes += 1

    def reduce(self, *, step: int, steps: int) -> list[dict[str, Any]]:
        """Sum over ranks, return the lines of routing.jsonl and start anew.  Collectives: one.

        Args:
            step: steps finished; steps: how many of them were counted.
        """
        if not self._layers or not self._passes:
            return []
        flat = torch.cat([self._counts_LQC.flatten(), self._similarity_L / self._passes, self._bytes_L])
        dist.all_reduce(flat)
        world_size = dist.get_world_size()
        layers = len(self._layers)
        counts = flat[:self._counts_LQC.numel()].view_as(self._counts_LQC).cpu()
        similarity = (flat[-2 * layers:-layers] / world_size).tolist()
        traffic = flat[-layers:].tolist()
        self._counts_LQC.zero_()
        self._similarity_L.zero_()
        self._bytes_L.zero_()
        self._passes = 0
        return [
            {"schema": SCHEMA_VERSION, "step": step, "steps": steps, "layer": index, "timestep_bin": bin_,
             "timestep_bins": self._bins, **_describe(counts[row, bin_]),
             "prototype_similarity": similarity[row], "layer_bytes_exchanged": int(traffic[row])}
            for row, index in enumerate(self._layers) for bin_ in range(self._bins)]


def _describe(columns: Tensor) -> dict[str, Any]:
    tokens = [int(x) for x in columns[:-3].tolist()]
    routed, unconditional, gate_sum = columns[-3:].tolist()
    return {"tokens_per_expert": tokens, "conditional_tokens": int(routed), "unconditional_tokens": int(unconditional),
            "gate_mean": gate_sum / sum(tokens) if any(tokens) else None, **load_summary(tokens)}


def load_summary(tokens_per_expert: list[int]) -> dict[str, Any]:
    """Return the load's max/mean, normalised entropy (1 = even) and number of experts without tokens; None without tokens."""
    total, experts = sum(tokens_per_expert), len(tokens_per_expert)
    if not total:
        return {"load_max_over_mean": None, "load_entropy": None, "dead_experts": None}
    shares = [n / total for n in tokens_per_expert if n]
    entropy = -sum(p * math.log(p) for p in shares) / math.log(experts) if experts > 1 else 1.0
    return {"load_max_over_mean": max(tokens_per_expert) * experts / total, "load_entropy": entropy,
            "dead_experts": tokens_per_expert.count(0)}
