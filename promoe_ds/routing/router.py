"""What a MoE layer and the trainer ask of every router.

Letters: B images, S tokens per image, D width, E routed experts.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.config.routing import RoutingConfig
from promoe_ds.config.schema import RunConfig
from promoe_ds.kernels.choice import uses_triton
from promoe_ds.kernels.router_ops import mean_similarity
from promoe_ds.kernels.sort_ops import sort_choices
from promoe_ds.routing.assignment import (
    Assignment,
    RoutingPlan,
    RoutingStats,
    assign_pairs,
    assign_token_choice,
    count_pairs,
)
from promoe_ds.routing.losses import ReduceSum, identity_reduce
from promoe_ds.routing.partition import Partition
from promoe_ds.routing.scores import NORM_EPS, at_least_fp32
from promoe_ds.torch_private import KeepsBuffersPrecise


class Router(KeepsBuffersPrecise):
    """Decides which tokens visit which experts.

    A subclass implements `forward` and `expert_keys_ED`; one with running state (thresholds,
    centroids) keeps it in buffers, reports observations in its plans and implements
    `update_running_state`. Buffers stay in fp32 when the module is cast to half
    precision: a running average with decay 0.95 would not move in bf16.
    per_expert: names of the parameters and buffers whose first dimension counts the experts.
    initial_gate: how `gate_weight` starts: "xavier" as other matrices, "linear" as torch's linear
        layer (uniform within 1 / sqrt(D)), or the standard deviation of a normal distribution.
    is_per_sample: whether a routed sample's number of rows does not depend on the others of its
        batch: then the unconditional expert can be joined (`Partition`).
    """

    per_expert: ClassVar[tuple[str, ...]] = ()
    initial_gate: ClassVar[str | float] = "xavier"
    is_per_sample: ClassVar[bool] = True

    def __init__(self, width: int, settings: RoutingConfig) -> None:
        """Take the settings, among them E and K; D for the subclasses that have weights."""
        super().__init__()
        self.settings = settings
        self.num_experts, self.top_k = settings.num_experts, settings.top_k
        #: Which training step's capacity experts have; set from outside, as `reduce_sum`.
        self.step = 0
        self.reduce_sum: ReduceSum = identity_reduce
        #: See `kernels.choice`; set from outside, as `reduce_sum`.
        self.kernels = "eager"

    @classmethod
    def from_config(cls, config: RunConfig, block: int) -> Self:
        """Build the router of the MoE layer in transformer block `block`, uninitialised."""
        return cls(config.model.hidden_size, config.routing)

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Route one batch: which routed experts each token of a routed sample visits, losses and
        statistics.
        """
        raise NotImplementedError

    def expert_keys_ED(self) -> Tensor:
        """Return a vector per expert whose mutual similarity says how alike the experts' tokens
        are; logged.
        """
        raise NotImplementedError

    def update_running_state(self, observation: Tensor) -> None:
        """Update the running state from a step's observations, summed over passes and ranks.  Sync:
        none.
        """

    def reset_state(self) -> None:
        """Put the running state at 0, its start, e.g. after materialising from the meta device."""
        for buffer in self.buffers():
            buffer.zero_()

    def plan_token_choice(
        self,
        tokens_BSD: Tensor,
        gates_BSK: Tensor,
        expert_ids_BSK: Tensor,
        partition: Partition,
    ) -> tuple[Assignment, RoutingStats]:
        """Build the list and its statistics from every token's K choices; those of unrouted samples
        do not count, or, joined, are the unconditional expert's, behind the routed ones.
        """
        joins = partition.joins_unconditional
        routed_B1, num_groups = partition.is_routed_B[:, None], self.num_experts + joins
        if uses_triton(tokens_BSD, self.kernels):
            found = sort_choices(
                gates_BSK,
                expert_ids_BSK,
                partition.is_routed_B,
                partition.routed_ids.numel(),
                num_groups,
                joins=joins,
            )
            assignment = Assignment(
                found.token_ids_N, found.gates_N, found.tokens_per_expert_E, found.places
            )
            return assignment, self._stats(found.counts_BE, found.gate_sums_BE, partition)
        if joins:
            expert_ids_BSK = expert_ids_BSK.where(routed_B1[:, None], self.num_experts)
            gates_BSK = gates_BSK.where(routed_B1[:, None], 1.0)
        ids_BN = expert_ids_BSK.flatten(1)
        counts_BE = ids_BN.new_zeros(len(ids_BN), num_groups)
        counts_BE = counts_BE.scatter_add_(1, ids_BN, torch.ones_like(ids_BN))
        gate_sums_BE = gates_BSK.new_zeros(counts_BE.shape)
        gate_sums_BE.scatter_add_(1, ids_BN, gates_BSK.detach().flatten(1))
        if not joins:
            counts_BE, gate_sums_BE = counts_BE * routed_B1, gate_sums_BE * routed_B1
        assignment = assign_token_choice(
            partition.take_routed(gates_BSK),
            partition.take_routed(expert_ids_BSK),
            None if partition.all_routed else partition.routed_ids,
            counts_BE.sum(dim=0),
        )
        return assignment, self._stats(counts_BE, gate_sums_BE, partition)

    def plan_expert_choice(
        self, scores_BSE: Tensor, capacity: int, partition: Partition
    ) -> tuple[Assignment, RoutingStats, Tensor]:
        """Let every expert choose C tokens of each routed sample; also returns their places
        chosen_BEC in 0 ... S-1.
        """
        num_samples, tokens_per_image, _ = scores_BSE.shape
        gates_BEC, chosen_BEC = scores_BSE.transpose(1, 2).topk(capacity, dim=-1)
        expert_E = torch.arange(self.num_experts, device=scores_BSE.device)[None, :, None]
        rows = chosen_BEC.flatten(1), expert_E.expand_as(chosen_BEC).flatten(1)
        rows_BL = *rows, gates_BEC.flatten(1)
        if partition.joins_unconditional:
            rows_BL = self._with_unconditional(*rows_BL, partition, tokens_per_image)
        places_BL, experts_BL, gates_BL = rows_BL
        sample_B = torch.arange(num_samples, device=scores_BSE.device)[:, None]
        token_ids_N = pool_token_ids(
            partition, (sample_B * tokens_per_image + places_BL).flatten(), tokens_per_image
        )
        assignment, stats = self.plan_pairs(
            token_ids_N, experts_BL.flatten(), gates_BL.flatten(), partition, tokens_per_image
        )
        return assignment, stats, chosen_BEC

    def _with_unconditional(
        self,
        places_BL: Tensor,
        experts_BL: Tensor,
        gates_BL: Tensor,
        partition: Partition,
        tokens_per_image: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Let null samples have a row of the unconditional expert for every token; samples of
        either kind are filled up to one number of rows by those with gate 0.
        """
        length = max(places_BL.shape[1], tokens_per_image)
        missing = length - places_BL.shape[1]
        own_L = torch.arange(length, device=places_BL.device)
        is_routed_B1 = partition.is_routed_B[:, None]
        expert = self.num_experts
        return (
            F.pad(places_BL, (0, missing)).where(is_routed_B1, own_L % tokens_per_image),
            F.pad(experts_BL, (0, missing), value=expert).where(is_routed_B1, expert),
            F.pad(gates_BL, (0, missing)).where(
                is_routed_B1, (own_L < tokens_per_image).to(gates_BL.dtype)
            ),
        )

    def plan_pairs(
        self,
        token_ids_N: Tensor,
        expert_ids_N: Tensor,
        gates_N: Tensor,
        partition: Partition,
        tokens_per_image: int,
    ) -> tuple[Assignment, RoutingStats]:
        """Build the list and its statistics from (token, expert, gate) pairs in any order; ids of
        the whole batch.
        """
        num_samples = partition.is_routed_B.numel()
        num_groups = self.num_experts + partition.joins_unconditional
        sample_ids_N = token_ids_N // tokens_per_image
        counts_BE = count_pairs(
            sample_ids_N, expert_ids_N, num_samples=num_samples, num_experts=num_groups
        )
        assignment = assign_pairs(
            token_ids_N,
            expert_ids_N,
            gates_N,
            num_tokens=num_samples * tokens_per_image,
            tokens_per_expert_E=counts_BE.sum(dim=0),
        )
        gate_sums_BE = gates_N.new_zeros(counts_BE.numel())
        gate_sums_BE.index_add_(0, sample_ids_N * num_groups + expert_ids_N, gates_N.detach())
        return assignment, self._stats(counts_BE, gate_sums_BE.view_as(counts_BE), partition)

    def _stats(self, counts_BE: Tensor, gate_sums_BE: Tensor, partition: Partition) -> RoutingStats:
        keys_ED = self.expert_keys_ED().detach()
        is_fused = uses_triton(keys_ED, self.kernels)
        similarity = mean_similarity if is_fused else mean_prototype_similarity
        routed_only = slice(self.num_experts)  # the unconditional expert may be the last one
        return RoutingStats(
            tokens_per_expert_BE=counts_BE[:, routed_only],
            gate_sums_BE=gate_sums_BE[:, routed_only],
            is_routed_B=partition.is_routed_B,
            prototype_similarity=similarity(keys_ED),
        )


#: The router of every `routing.method` but dense; `config.routing.METHODS` names its settings.
ROUTERS: dict[str, type[Router]] = {}


def build_router(config: RunConfig, block: int = 0) -> Router:
    """Build the router of one MoE layer, uninitialised (`model.init` fills it)."""
    return ROUTERS[config.routing.method].from_config(config, block)


class GateRouter(Router):
    """A router whose scores come from a linear gate without bias."""

    per_expert: ClassVar[tuple[str, ...]] = ("gate_weight",)

    def __init__(self, width: int, settings: RoutingConfig) -> None:
        """Create the gate, uninitialised."""
        super().__init__(width, settings)
        self.gate_weight = nn.Parameter(torch.empty(self.num_experts, width))

    def expert_keys_ED(self) -> Tensor:
        """Return the gate's rows."""
        return self.gate_weight

    def _capacity(self, num_tokens: int) -> int:
        """Return how many of some tokens an expert takes; in training by the schedule."""
        settings, top_k = self.settings, float(self.top_k)
        if self.training:
            schedule = settings.capacity_schedule
            top_k = scheduled_top_k(self.step, self.num_experts, self.top_k, schedule)
        return expert_capacity(num_tokens, self.num_experts, top_k)


def expert_capacity(num_tokens: int, num_experts: int, top_k: float) -> int:
    """Return C = int(T / E * K): how many of T tokens an expert takes so that a token has K experts
    on average.

    Source: the published code, whose quotient is a float: where T / E * K is a whole number, C may
    be one less.
    """
    return int(num_tokens / num_experts * top_k)


def scheduled_top_k(
    step: int, num_experts: int, top_k: int, schedule: tuple[int, int] | None
) -> float:
    """Return how many experts a token has on average at a training step, the first of which is 0.

    Source: the capacity schedule of DiffMoE's and EC-DiT's published code: all of them up to and
    including a first step, then linearly fewer until top_k at a second one; differs: steps are
    updates, not passes, and a resumed run goes on where it was.
    Args:
        schedule: both steps; None is top_k from the start.
    """
    if schedule is None or step > schedule[1]:
        return top_k
    first, last = schedule
    if step <= first:
        return num_experts
    return top_k + (num_experts - top_k) * (last - step) / (last - first)


def pool_token_ids(partition: Partition, pool_ids_N: Tensor, tokens_per_image: int) -> Tensor:
    """Translate rows of the routed samples' flattened tokens into rows of the whole batch's."""
    if partition.all_routed:
        return pool_ids_N
    return (
        partition.routed_ids[pool_ids_N // tokens_per_image] * tokens_per_image
        + pool_ids_N % tokens_per_image
    )


def similarity_matrix(first_ED: Tensor, second_ED: Tensor) -> Tensor:
    """Return the cosine of every vector of the first with every one of the second, in at least
    fp32; 0 with a zero vector.
    """
    first, second = (
        F.normalize(at_least_fp32(vectors), dim=-1, eps=NORM_EPS)
        for vectors in (first_ED, second_ED)
    )
    return first @ second.to(first.dtype).T


def mean_prototype_similarity(prototypes_ED: Tensor) -> Tensor:
    """Return the mean cosine between different prototypes, a scalar; 0 for a single one."""
    num_experts = prototypes_ED.shape[0]
    directions = F.normalize(at_least_fp32(prototypes_ED), dim=-1, eps=NORM_EPS)
    # The sum of all cosines is the squared length of the summed directions; E of them are each with
    # itself.
    total = directions.sum(dim=0).square().sum() - directions.square().sum()
    return total / max(1, num_experts * (num_experts - 1))


def choose_top_k(scores_BSE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return each token's K highest scores and their experts, (B, S, K) both, highest first."""
    if top_k == 1:
        values, indices = scores_BSE.max(dim=-1, keepdim=True)
        return values, indices
    return scores_BSE.topk(top_k, dim=-1)
