"""Routing statistics: accumulated on the device, reduced once per log interval, written as
routing.jsonl.

The format is documented in docs/reference/routing_stats.md. Letters: B images, S tokens per
image, D width, E routed experts, L MoE layers, Q timestep bins, N rows of an assignment, P passes,
w ranks of an expert-parallel group, X exchanges.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from promoe_ds.config import RunConfig
from promoe_ds.distributed.context import DistributedContext, sum_over_ranks
from promoe_ds.load_stats import load_summary
from promoe_ds.model.dit import DiT
from promoe_ds.moe.collectives import EXCHANGES
from promoe_ds.moe.layer import MoELayer
from promoe_ds.routing.assignment import RoutingPlan, routed_experts_of_rows
from promoe_ds.routing.router import similarity_matrix

SCHEMA_VERSION = 2
#: Decimals of a cosine in the log.
_COSINE_DECIMALS = 4
_COUNT_BYTES = 8


class RoutingAccumulator:
    """Counts of one log interval. Fed with plans, which exist once per pass whatever is
    recomputed.
    """

    def __init__(self, config: RunConfig, network: DiT, context: DistributedContext) -> None:
        """Prepare counters for the network's MoE layers."""
        self._config, self._context = config, context
        self._layers = network.moe_layers()
        # A backend that moves the rows by itself has no group or clock of ours.
        dispatchers = [layer.dispatcher for layer in self._layers.values()]
        self._clocks = [getattr(dispatcher, "clock", None) for dispatcher in dispatchers]
        self._group = getattr(dispatchers[0], "group", None) if dispatchers else None
        self._bins = config.logging.timestep_bins
        self._tables = _Tables(config, len(self._layers), context.device)
        experts, layers = config.routing.num_experts, len(self._layers)
        shapes = {
            # Tokens and sums of gates of each expert, routed tokens, unconditional tokens.
            "columns": (layers, self._bins, 2 * experts + 2),
            "similarity": (layers,),
            "bytes": (layers,),
            "token_sums": (layers, experts, config.model.hidden_size),
        }
        # Doubles count to 2**53.
        self._sums = {name: _zeros(shape, context.device) for name, shape in shapes.items()}
        self._sent_PLw: list[Tensor] = []
        self._passes = 0

    def add(
        self,
        plans: dict[int, RoutingPlan],
        sigma_B: Tensor,
        group_B: Tensor | None = None,
        latent_size: tuple[int, int] | None = None,
    ) -> None:
        """Count one pass.  Sync: none.

        Args:
            plans: by block index, as the model returned them.
            sigma_B: noise levels; bin q holds q / Q <= sigma < (q + 1) / Q, the last one also 1.
            group_B: of the condition after dropout, for the table by class.
            latent_size: of the images; `model.input_size`, the table by patch's, if left out.
        """
        if not self._layers:
            return
        bin_B = (sigma_B * self._bins).long().clamp_(0, self._bins - 1)
        in_bin_QB = torch.nn.functional.one_hot(bin_B, self._bins).T.double()
        model, in_order = self._config.model, [plans[i] for i in self._layers]
        size = latent_size or model.latent_size
        tokens, stats = model.tokens_of(size), [plan.stats for plan in in_order]
        is_routed_LB = torch.stack([each.is_routed_B for each in stats])
        routed_LB1 = tokens * is_routed_LB.double()[..., None]
        counts_LBE = torch.stack([each.tokens_per_expert_BE for each in stats]).double()
        gates_LBE = torch.stack([each.gate_sums_BE for each in stats]).double()
        columns_LBC = [counts_LBE, gates_LBE, routed_LB1, tokens - routed_LB1]
        self._sums["columns"] += in_bin_QB @ torch.cat(columns_LBC, dim=2)
        self._sums["similarity"] += torch.stack([each.prototype_similarity for each in stats])
        if token_sums := [s.token_sums_ED for s in stats if s.token_sums_ED is not None]:
            self._sums["token_sums"] += torch.stack(token_sums)
        if self._config.parallel.ep_size > 1:
            self._sums["bytes"] += torch.stack([*map(self._bytes, self._layers.values(), in_order)])
        for row, plan in enumerate(in_order):
            self._tables.add(row, plan, group_B, has_places=size == model.latent_size)
        if self._group is not None:
            rows_LE = torch.stack([plan.assignment.tokens_per_expert_E for plan in in_order])
            by_rank_LwE = rows_LE.view(len(rows_LE), self._config.parallel.ep_size, -1)
            self._sent_PLw.append(by_rank_LwE.sum(dim=2))
        self._passes += 1

    def _bytes(self, layer: MoELayer, plan: RoutingPlan) -> Tensor:
        width, size = self._config.model.hidden_size, next(layer.routed.parameters()).element_size()
        return layer.dispatcher.bytes_exchanged(plan.assignment, width, size)

    @contextmanager
    def waits_paused(self) -> Iterator[None]:
        """Leave out what ranks wait for in passes that train nothing."""
        with ExitStack() as stack:
            for clock in self._clocks:
                if clock is not None:
                    stack.enter_context(clock.paused())
            yield

    def reduce(self, *, step: int, steps: int, last: bool = False) -> list[dict[str, Any]]:
        """Sum over ranks, return the lines of routing.jsonl on rank 0, none elsewhere, and start
        anew.

        Collectives: one; two more where experts are sharded.

        Args:
            step: steps finished; steps: how many of them were counted.
            last: whether the process ends here, so that tables which cover several intervals are
            due.
        """
        if not self._layers or not self._passes:
            return []
        tables, steps_of_tables = self._tables.take(steps, last=last)
        parts = {
            **self._sums,
            "similarity": self._sums["similarity"] / self._passes,
            "waits": self._waits(),
            **tables,
        }
        sums = sum_over_ranks(parts)
        fullest_L, passes = self._fullest_rank(), self._passes
        self._start_anew()
        if not self._context.is_main:
            return []
        sums = {name: values.cpu() for name, values in sums.items()}
        world_size, lines = self._context.world_size, []
        for row, (index, layer) in enumerate(self._layers.items()):
            layer_bytes = int(sums["bytes"][row])
            head = {"schema": SCHEMA_VERSION, "step": step, "steps": steps, "layer": index}
            lines += [
                {
                    **head,
                    "timestep_bin": bin_,
                    "timestep_bins": self._bins,
                    **_describe(sums["columns"][row, bin_]),
                    "prototype_similarity": sums["similarity"][row].item() / world_size,
                    "layer_bytes_exchanged": layer_bytes,
                }
                for bin_ in range(self._bins)
            ]
            tokens_E = sums["columns"][row, :, : self._config.routing.num_experts].sum(dim=0)
            lines[-self._bins]["layer_detail"] = {
                "passes": passes,
                **self._describe_placement(row, tokens_E, fullest_L),
                "exchanges": self._describe_exchanges(
                    row, layer_bytes, sums["waits"][row] / world_size, passes * world_size
                ),
                **_describe_prototypes(
                    layer, sums["token_sums"][row], tokens_E, with_matrix=self._matrix_is_due(step)
                ),
                **{
                    name: {"steps": steps_of_tables, "counts": sums[name][row].long().tolist()}
                    | self._tables.shapes.get(name, {})
                    for name in tables
                },
            }
        return lines

    def _start_anew(self) -> None:
        for total in self._sums.values():
            total.zero_()
        self._sent_PLw.clear()
        self._passes = 0

    def _waits(self) -> Tensor:
        """Return the seconds that this rank has waited, (L, X); zeros where nobody measures
        them.
        """
        zeros = dict.fromkeys(EXCHANGES, 0.0)
        waits = [zeros if clock is None else clock.take() for clock in self._clocks]
        return torch.tensor(
            [list(by_name.values()) for by_name in waits],
            dtype=torch.float64,
            device=self._context.device,
        )

    def _fullest_rank(self) -> Tensor | None:
        """Return the rows of the fullest of all ranks, summed pass by pass (L,); None where every
        rank has all experts.

        Collectives: two, whose size does not grow with the number of ranks.
        """
        if not self._sent_PLw:
            return None
        computed_PLw = torch.stack(self._sent_PLw)
        dist.all_reduce(computed_PLw, group=self._group)
        fullest_PL = computed_PLw.amax(dim=2)
        dist.all_reduce(fullest_PL, op=dist.ReduceOp.MAX)
        return fullest_PL.sum(dim=0)

    def _matrix_is_due(self, step: int) -> bool:
        """Say whether a step's lines carry E x E cosines: by the step alone, so that a resumed run
        writes the same lines.
        """
        every = self._config.counts_every(self._config.routing.num_experts**2)
        train = self._config.train
        return step // train.log_every % every == 0 or step == train.max_steps

    def _describe_placement(
        self, row: int, tokens_E: Tensor, fullest_L: Tensor | None
    ) -> dict[str, Any]:
        ep_size, ranks = self._config.parallel.ep_size, self._context.world_size
        by_ep_rank = tokens_E.view(ep_size, -1).sum(dim=1).long().tolist()
        total = sum(by_ep_rank)
        uneven = fullest_L[row].item() * ranks / total if fullest_L is not None and total else None
        order = self._config.expert_order_of(row)
        return {
            "ranks": ranks,
            "ep_size": ep_size,
            "tokens_per_ep_rank": by_ep_rank,
            "rank_max_over_mean": uneven,
            **({"experts": list(order)} if order else {}),
        }

    def _describe_exchanges(
        self, row: int, layer_bytes: int, seconds_X: Tensor, rank_passes: int
    ) -> dict[str, dict[str, float | None]]:
        if self._group is not None and self._clocks[row] is None:  # a backend moves the rows
            return {name: {"bytes": None, "seconds": None} for name in EXCHANGES}
        ep_size, experts = self._config.parallel.ep_size, self._config.routing.num_experts
        sizes = dict.fromkeys(EXCHANGES, layer_bytes // (len(EXCHANGES) - 1))
        sizes["counts"] = rank_passes * _COUNT_BYTES * experts * (ep_size - 1) // ep_size
        return {
            name: {"bytes": sizes[name], "seconds": _significant(seconds)}
            for name, seconds in zip(EXCHANGES, seconds_X.tolist(), strict=True)
        }


class _Tables:
    """Optional counts by class, (L, classes + 1, E), the last row null, and by patch, (L, S, E)."""

    def __init__(self, config: RunConfig, layers: int, device: torch.device) -> None:
        self._experts, self._patches = config.routing.num_experts, config.model.tokens_per_image
        groups = config.counts_classes * config.num_groups
        patches = config.counts_positions * self._patches
        sizes = {"tokens_per_class": groups and groups + 1, "tokens_per_position": patches}
        self._counts = {
            name: _zeros((layers, size, self._experts), device)
            for name, size in sizes.items()
            if size
        }
        self._every = config.counts_every(self._experts * max(groups, patches))
        rows, columns = config.model.patch_grid
        #: What is said of the rows of a table: nothing of patches of a square image.
        self.shapes = {} if rows == columns else {"tokens_per_position": {"columns": columns}}
        self._intervals = self._steps = 0

    def add(self, row: int, plan: RoutingPlan, group_B: Tensor | None, *, has_places: bool) -> None:
        if "tokens_per_class" in self._counts and group_B is not None:
            self._counts["tokens_per_class"][row].index_add_(
                0, group_B, plan.stats.tokens_per_expert_BE.double()
            )
        if has_places and "tokens_per_position" in self._counts:
            table = self._counts["tokens_per_position"][row].view(-1)
            expert_N, is_routed_N = routed_experts_of_rows(plan.assignment, self._experts)
            cells_N = plan.assignment.token_ids_N % self._patches * self._experts + expert_N
            table.scatter_add_(0, cells_N, is_routed_N.to(table.dtype))

    def take(self, steps: int, *, last: bool) -> tuple[dict[str, Tensor], int]:
        """End a log interval; return the tables that are due now and the steps that they cover, and
        start these anew.
        """
        self._intervals, self._steps = self._intervals + 1, self._steps + steps
        if not last and self._intervals < self._every:
            return {}, 0
        tables, covered = {}, self._steps
        for name, counts in self._counts.items():
            tables[name] = counts.clone()
            counts.zero_()
        self._intervals = self._steps = 0
        return tables, covered


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=device)


def _describe(columns: Tensor) -> dict[str, Any]:
    experts = (len(columns) - 2) // 2
    tokens = [int(x) for x in columns[:experts].tolist()]
    gates = columns[experts:-2].tolist()
    routed, unconditional = columns[-2:].tolist()
    return {
        "tokens_per_expert": tokens,
        "gate_sum_per_expert": [_significant(x) for x in gates],
        "conditional_tokens": int(routed),
        "unconditional_tokens": int(unconditional),
        "gate_mean": sum(gates) / sum(tokens) if any(tokens) else None,
        **load_summary(tokens),
    }


def _describe_prototypes(
    layer: MoELayer, sums_ED: Tensor, tokens_E: Tensor, *, with_matrix: bool
) -> dict[str, Any]:
    """Describe the prototypes as they are now, and how near each is to the centroid of its tokens
    and to the others'.
    """
    expert_keys_ED, is_used_E = layer.router.expert_keys_ED().detach().double().cpu(), tokens_E > 0
    to_centroid_EE = similarity_matrix(expert_keys_ED, sums_ED)
    is_other_EE = is_used_E & ~torch.eye(len(tokens_E), dtype=torch.bool)
    others_E = is_other_EE.sum(dim=1)
    to_others_E = to_centroid_EE.where(is_other_EE, 0.0).sum(dim=1) / others_E
    matrix = {}
    if with_matrix:
        own_EE = similarity_matrix(expert_keys_ED, expert_keys_ED)
        matrix["prototype_similarity_matrix"] = own_EE.round(decimals=_COSINE_DECIMALS).tolist()
    return {
        **matrix,
        "prototype_to_centroid": _cosines(to_centroid_EE.diagonal(), is_used_E),
        "prototype_to_other_centroids": _cosines(to_others_E, others_E > 0),
    }


def _cosines(values_E: Tensor, is_known_E: Tensor) -> list[float | None]:
    """Return cosines as they are in the log; None for one that is not known."""
    rounded = values_E.round(decimals=_COSINE_DECIMALS).tolist()
    return [x if known else None for x, known in zip(rounded, is_known_E.tolist(), strict=True)]


def _significant(value: float) -> float:
    """Round to six digits: more would only make the file longer."""
    return float(f"{value:.6g}")
