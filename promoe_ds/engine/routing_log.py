"""Routing statistics: accumulated on the device, reduced once per log interval, written as routing.jsonl.

The format is documented in docs/routing_stats.md. Letters: B images, S tokens per image, D width, E routed experts,
L MoE layers, Q timestep bins, N rows of an assignment, P passes, W ranks.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from promoe_ds.config import RunConfig
from promoe_ds.engine.distributed import Ranks
from promoe_ds.model.dit import DiT
from promoe_ds.moe.collectives import EXCHANGES
from promoe_ds.moe.layer import MoELayer
from promoe_ds.routing.assignment import RoutingPlan, expert_of_rows
from promoe_ds.routing.router import similarity_matrix

SCHEMA_VERSION = 2
#: Decimals of a cosine in the log.
_COSINE_DECIMALS = 4
_COUNT_BYTES = 8


class RoutingAccumulator:
    """Counts of one log interval. Fed with plans, which exist once per pass whatever is recomputed."""

    def __init__(self, config: RunConfig, network: DiT, ranks: Ranks) -> None:
        """Prepare counters for the network's MoE layers."""
        self._config, self._ranks = config, ranks
        self._layers = network.moe_layers()
        # A backend that moves the rows by itself has no group or clock of ours.
        dispatchers = [layer.dispatcher for layer in self._layers.values()]
        self._clocks = [getattr(dispatcher, "clock", None) for dispatcher in dispatchers]
        self._group = getattr(dispatchers[0], "group", None) if dispatchers else None
        self._bins = config.logging.timestep_bins
        self._tables = _Tables(config, len(self._layers), ranks.device)
        experts, layers = config.routing.num_experts, len(self._layers)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=ranks.device)

        # Columns: tokens and sums of gates of each expert, routed tokens, unconditional tokens. Doubles count to 2**53.
        self._counts_LQC = zeros(layers, self._bins, 2 * experts + 2)
        self._similarity_L, self._bytes_L = zeros(layers), zeros(layers)
        self._token_sums_LED = zeros(layers, experts, config.model.hidden_size)
        self._sent_PLW: list[Tensor] = []
        self._passes = 0

    def add(self, plans: dict[int, RoutingPlan], sigma_B: Tensor, labels_B: Tensor | None = None) -> None:
        """Count one pass.  Sync: none.

        Args:
            plans: by block index, as the model returned them.
            sigma_B: noise levels; bin q holds q / Q <= sigma < (q + 1) / Q, the last one also 1.
            labels_B: classes after dropout, for the table by class.
        """
        if not self._layers:
            return
        bin_B = (sigma_B * self._bins).long().clamp_(0, self._bins - 1)
        in_bin_QB = torch.nn.functional.one_hot(bin_B, self._bins).T.double()
        tokens, width = self._config.model.tokens_per_image, self._config.model.hidden_size
        for row, (index, layer) in enumerate(self._layers.items()):
            plan, stats = plans[index], plans[index].stats
            routed_B1 = stats.is_routed_B.double()[:, None]
            columns_BC = torch.cat([stats.tokens_per_expert_BE.double(), stats.gate_sums_BE.double(), tokens * routed_B1,
                                    tokens * (1 - routed_B1)], dim=1)
            self._counts_LQC[row] += in_bin_QB @ columns_BC
            self._similarity_L[row] += stats.prototype_similarity.double()
            if stats.token_sums_ED is not None:
                self._token_sums_LED[row] += stats.token_sums_ED
            element_size = next(layer.routed.parameters()).element_size()
            self._bytes_L[row] += layer.dispatcher.bytes_exchanged(plan.assignment, width, element_size)
            self._tables.add(row, plan, labels_B)
        if self._group is not None:
            self._sent_PLW.append(torch.stack([_sent(plans[index], self._config.parallel.ep_size) for index in self._layers]))
        self._passes += 1

    def reduce(self, *, step: int, steps: int, last: bool = False) -> list[dict[str, Any]]:
        """Sum over ranks, return the lines of routing.jsonl and start anew.  Collectives: one.

        Args:
            step: steps finished; steps: how many of them were counted.
            last: whether the process ends here, so that tables which cover several intervals are due.
        """
        if not self._layers or not self._passes:
            return []
        waited = [clock.take() if clock is not None else {} for clock in self._clocks]
        seconds_LX = torch.tensor([[by_name.get(name, 0.0) for name in EXCHANGES] for by_name in waited], dtype=torch.float64)
        parts = [self._counts_LQC, self._similarity_L / self._passes, self._bytes_L, self._token_sums_LED,
                 seconds_LX.to(self._ranks.device), self._received(), *self._tables.due(steps, last=last)]
        flat = torch.cat([part.flatten().double() for part in parts])
        dist.all_reduce(flat)
        pieces = flat.split([part.numel() for part in parts])
        counts, similarity, traffic, sums, seconds, received, *tables = (
            piece.view_as(part).cpu() for piece, part in zip(pieces, parts, strict=True))
        world_size, passes = dist.get_world_size(), self._passes
        self._start_anew()
        filled, lines = self._tables.describe(tables), []
        for row, (index, layer) in enumerate(self._layers.items()):
            head = {"schema": SCHEMA_VERSION, "step": step, "steps": steps, "layer": index}
            tail = {"prototype_similarity": similarity[row].item() / world_size, "layer_bytes_exchanged": int(traffic[row])}
            for bin_ in range(self._bins):
                lines.append({**head, "timestep_bin": bin_, "timestep_bins": self._bins,
                              **_describe(counts[row, bin_]), **tail})
            tokens_E = counts[row, :, :self._config.routing.num_experts].sum(dim=0)
            lines[-self._bins]["layer_detail"] = {
                "passes": passes, **self._describe_placement(row, tokens_E, received),
                "exchanges": self._describe_exchanges(int(traffic[row]), seconds[row] / world_size, passes * world_size),
                **_describe_prototypes(layer, sums[row], tokens_E), **filled[row]}
        return lines

    def _start_anew(self) -> None:
        for tensor in (self._counts_LQC, self._similarity_L, self._bytes_L, self._token_sums_LED):
            tensor.zero_()
        self._sent_PLW.clear()
        self._passes = 0

    def _received(self) -> Tensor:
        """Return the rows that this rank sent to each rank (P, L, W): summed over the ranks, what each computed in each pass."""
        if not self._sent_PLW:
            return torch.zeros(0, dtype=torch.float64, device=self._ranks.device)
        sent_PLW = torch.stack(self._sent_PLW).double()
        received_PLW = sent_PLW.new_zeros(*sent_PLW.shape[:2], self._ranks.world_size)
        received_PLW[:, :, dist.get_process_group_ranks(self._group)] = sent_PLW
        return received_PLW

    def _describe_placement(self, row: int, tokens_E: Tensor, received_PLW: Tensor) -> dict[str, Any]:
        ep_size = self._config.parallel.ep_size
        by_ep_rank = [int(n) for n in tokens_E.view(ep_size, -1).sum(dim=1).tolist()]
        uneven = None
        if received_PLW.numel():
            rows_PW = received_PLW[:, row]
            mean = rows_PW.mean(dim=1).sum().item()
            uneven = rows_PW.amax(dim=1).sum().item() / mean if mean else None
        order = self._config.expert_order_of(row)
        return {"ranks": self._ranks.world_size, "ep_size": ep_size, "tokens_per_ep_rank": by_ep_rank,
                "rank_max_over_mean": uneven, **({"experts": list(order)} if order else {})}

    def _describe_exchanges(self, layer_bytes: int, seconds_X: Tensor, rank_passes: int) -> dict[str, dict[str, float]]:
        ep_size = self._config.parallel.ep_size
        counts_bytes = rank_passes * _COUNT_BYTES * self._config.routing.num_experts * (ep_size - 1) // ep_size
        sizes = {name: layer_bytes // (len(EXCHANGES) - 1) for name in EXCHANGES} | {"counts": counts_bytes}
        return {name: {"bytes": sizes[name], "seconds": _significant(seconds)}
                for name, seconds in zip(EXCHANGES, seconds_X.tolist(), strict=True)}


class _Tables:
    """Optional counts by class (the last row is the null label) and by patch: (L, classes + 1, E) and (L, S, E)."""

    def __init__(self, config: RunConfig, layers: int, device: torch.device) -> None:
        self._every, self._experts, self._patches = config.logging.counts_every, config.routing.num_experts, \
            config.model.tokens_per_image
        rows = {"tokens_per_class": config.counts_classes * (config.model.num_classes + 1),
                "tokens_per_position": config.counts_positions * self._patches}
        self._counts = {name: torch.zeros(layers, size, self._experts, dtype=torch.float64, device=device)
                        for name, size in rows.items() if size}
        self._layers, self._intervals, self._steps, self._is_due = layers, 0, 0, False

    def add(self, row: int, plan: RoutingPlan, labels_B: Tensor | None) -> None:
        if "tokens_per_class" in self._counts and labels_B is not None:
            self._counts["tokens_per_class"][row].index_add_(0, labels_B, plan.stats.tokens_per_expert_BE.double())
        if "tokens_per_position" in self._counts:
            cells_N = plan.assignment.token_ids_N % self._patches * self._experts + expert_of_rows(plan.assignment)
            table = self._counts["tokens_per_position"][row].view(-1)
            table.scatter_add_(0, cells_N, torch.ones_like(cells_N, dtype=table.dtype))

    def due(self, steps: int, *, last: bool) -> list[Tensor]:
        """End a log interval; return the tables that are to be reduced now, if any."""
        self._intervals, self._steps = self._intervals + 1, self._steps + steps
        self._is_due = last or self._intervals >= self._every
        return list(self._counts.values()) if self._is_due else []

    def describe(self, reduced: list[Tensor]) -> list[dict[str, Any]]:
        """Return each layer's tables, those given, and start them anew."""
        if not self._is_due:
            return [{}] * self._layers
        steps, self._intervals, self._steps = self._steps, 0, 0
        for table in self._counts.values():
            table.zero_()
        return [{name: {"steps": steps, "counts": table[row].long().tolist()}
                 for name, table in zip(self._counts, reduced, strict=True)} for row in range(self._layers)]


def _sent(plan: RoutingPlan, ep_size: int) -> Tensor:
    return plan.assignment.tokens_per_expert_E.view(ep_size, -1).sum(dim=1)


def _describe(columns: Tensor) -> dict[str, Any]:
    experts = (len(columns) - 2) // 2
    tokens = [int(x) for x in columns[:experts].tolist()]
    gates = columns[experts:-2].tolist()
    routed, unconditional = columns[-2:].tolist()
    return {"tokens_per_expert": tokens, "gate_sum_per_expert": [_significant(x) for x in gates],
            "conditional_tokens": int(routed), "unconditional_tokens": int(unconditional),
            "gate_mean": sum(gates) / sum(tokens) if any(tokens) else None, **load_summary(tokens),
            "load_cv": _significant(statistics.pstdev(tokens) * experts / sum(tokens)) if any(tokens) else None}


def _describe_prototypes(layer: MoELayer, sums_ED: Tensor, tokens_E: Tensor) -> dict[str, Any]:
    """Describe the prototypes as they are now, and how near each is to the centroid of its tokens and to the others'."""
    directions_ED = layer.router.directions_ED().detach().double().cpu()
    to_centroid_EE = similarity_matrix(directions_ED, sums_ED)
    own, others = to_centroid_EE.diagonal(), []
    for expert in range(len(tokens_E)):
        used = [to_centroid_EE[expert, other].item() for other in range(len(tokens_E)) if other != expert and tokens_E[other] > 0]
        others.append(round(statistics.fmean(used), _COSINE_DECIMALS) if used else None)
    return {
        "prototype_similarity_matrix": [[round(x, _COSINE_DECIMALS) for x in row]
                                        for row in similarity_matrix(directions_ED, directions_ED).tolist()],
        "prototype_to_centroid": [round(x.item(), _COSINE_DECIMALS) if n > 0 else None
                                  for x, n in zip(own, tokens_E, strict=True)],
        "prototype_to_other_centroids": others}


def _significant(value: float) -> float:
    """Round to six digits: more would only make the file longer."""
    return float(f"{value:.6g}")


def load_summary(tokens_per_expert: list[int]) -> dict[str, Any]:
    """Return the load's max/mean, normalised entropy (1 = even) and number of experts without tokens; None without tokens."""
    total, experts = sum(tokens_per_expert), len(tokens_per_expert)
    if not total:
        return {"load_max_over_mean": None, "load_entropy": None, "dead_experts": None}
    shares = [n / total for n in tokens_per_expert if n]
    entropy = -sum(p * math.log(p) for p in shares) / math.log(experts) if experts > 1 else 1.0
    return {"load_max_over_mean": max(tokens_per_expert) * experts / total, "load_entropy": entropy,
            "dead_experts": tokens_per_expert.count(0)}
