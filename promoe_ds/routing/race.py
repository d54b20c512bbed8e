"""Expert Race: tokens and experts compete together for the batch's slots (Yuan et al., 2025, arXiv
2503.16057).

Letters: B images, S tokens per image, T pooled tokens, D width, E routed experts, P values of a
patch of the target.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.config.routing import RoutingConfig
from promoe_ds.config.schema import RunConfig
from promoe_ds.registry import register
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.routing.batch_pool import move_thresholds, observe_thresholds
from promoe_ds.routing.partition import Partition
from promoe_ds.routing.router import ROUTERS, GateRouter, pool_token_ids
from promoe_ds.routing.scores import activate, linear_fp32, linear_scores


@register(ROUTERS, "expert_race")
class ExpertRaceRouter(GateRouter):
    """The K * T highest of all T * E scores win: a token may have any number of experts, an expert
    any number of tokens.

    A two-layer network scores; a second head on its hidden layer predicts the training target from
    this depth on (per-layer regularisation), which gives shallow layers a signal of their own. In
    evaluation a pair wins where its score exceeds the running threshold: an output then depends on
    no other sample.
    """

    threshold: Tensor
    is_per_sample = False  # in training

    def __init__(self, width: int, settings: RoutingConfig, *, patch_values: int) -> None:
        """Create the network, uninitialised.

        Args:
            patch_values: P, or 0 for no prediction of the target.
        """
        super().__init__(width, settings)
        self.hidden = nn.Linear(width, width)
        self.target_head = nn.Linear(width, patch_values) if patch_values else None
        self.register_buffer("threshold", torch.zeros(1))

    @classmethod
    def from_config(cls, config: RunConfig, block: int) -> Self:
        """Build the router; it predicts the target only where a loss asks for it."""
        return cls(
            config.model.hidden_size, config.routing, patch_values=config.target_patch_values
        )

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        """Route one batch.

        Source: the paper's description, Sec. 4-6; differs: the pool is the routed samples' where
        null samples have their own expert, the threshold is averaged over ranks by the trainer,
        once a step.
        Returns: RoutingPlan; in training with the similarity loss, the observation of
            `update_running_state` and the predicted target.
        Gradient: reaches tokens and router.  Sync: none in training, one in evaluation.
        Collectives: none.
        """
        tokens_per_image = tokens_BSD.shape[1]
        hidden_BSD = F.gelu(linear_fp32(tokens_BSD, self.hidden), approximate="tanh")
        logits_TE = linear_scores(partition.take_routed(hidden_BSD).flatten(0, 1), self.gate_weight)
        scores_TE = activate(logits_TE, self.settings.activation)
        if self.training:
            winning_scores_N, winning_ids_N = scores_TE.flatten().topk(self.top_k * len(scores_TE))
        else:
            winning_ids_N = (scores_TE.flatten() > self.threshold).nonzero(as_tuple=True)[0]
        pool_ids_N, expert_ids_N = (
            winning_ids_N // self.num_experts,
            winning_ids_N % self.num_experts,
        )
        token_ids_N = pool_token_ids(partition, pool_ids_N, tokens_per_image)
        assignment, stats = self.plan_pairs(
            token_ids_N,
            expert_ids_N,
            scores_TE.flatten()[winning_ids_N],
            partition,
            tokens_per_image,
        )
        if not self.training:
            return RoutingPlan(assignment=assignment, aux_losses={}, stats=stats)
        aux_losses = {}
        if self.settings.similarity_weight > 0:
            chosen_TE = (
                torch.zeros_like(scores_TE)
                .flatten()
                .index_fill_(0, winning_ids_N, 1.0)
                .view_as(scores_TE)
            )
            aux_losses["similarity"] = self.settings.similarity_weight * router_similarity_loss(
                logits_TE.softmax(dim=-1), chosen_TE
            )
        lowest_1 = winning_scores_N.detach()[-1:] if len(scores_TE) else scores_TE.new_zeros(1)
        return RoutingPlan(
            assignment=assignment,
            aux_losses=aux_losses,
            stats=stats,
            observation=observe_thresholds(lowest_1, any_chosen=len(scores_TE) > 0),
            target_patches_BSP=(
                None if self.target_head is None else linear_fp32(hidden_BSD, self.target_head)
            ),
        )

    def update_running_state(self, observation: Tensor) -> None:
        """Move the threshold towards the mean observed one: decay * old + (1 - decay) * mean."""
        move_thresholds(self.threshold, observation, self.settings.threshold_decay)


def router_similarity_loss(probabilities_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """Return sum_ij W_ij (P^T P)_ij / T: experts that win the same tokens more often than others
    are pushed apart.

    W_ii = E * M_ii / sum_k M_kk weighs load, W_ij = (E^2 - E) * M_ij / sum_{k != l} M_kl weighs
    pairs, M = chosen^T chosen.
    Source: the paper's router similarity loss.
    Args:
        probabilities_TE: softmax of the logits over the experts.
        chosen_TE: 1 where the pair won, else 0.
    Returns: scalar; 0 without tokens, and the part of pairs is 0 where no token has two experts.
    Gradient: reaches probabilities.  Sync: none.  Collectives: none.
    """
    num_tokens, num_experts = probabilities_TE.shape
    with torch.autocast(probabilities_TE.device.type, enabled=False):
        joint_EE = chosen_TE.T @ chosen_TE
        similarity_EE = probabilities_TE.T @ probabilities_TE / max(1, num_tokens)
    load_E, pairs_EE = joint_EE.diagonal(), joint_EE - joint_EE.diagonal().diag()
    of_load = num_experts * (load_E * similarity_EE.diagonal()).sum() / load_E.sum().clamp_min(1.0)
    of_pairs = (
        num_experts
        * (num_experts - 1)
        * (pairs_EE * similarity_EE).sum()
        / pairs_EE.sum().clamp_min(1.0)
    )
    return of_load + of_pairs
