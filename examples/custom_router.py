"""A router of your own in one file: tokens go to the nearest of E learned points.

    promoe-train --import examples/custom_router.py --recipe digits_promoe \
        --deepspeed_config ds_configs/zero0_fp32.json --run-dir runs/nearest \
        --set parallel.ep_size=1 routing.method=nearest 'routing.options={temperature: 0.5}'

Give the same --import to promoe-convert, promoe-sample, promoe-experts and promoe-compare. Experts,
dispatch, expert parallelism, checkpoints and reports are the package's own and need no change.
Letters: B images, S tokens per image, D width, E experts, K choices per token.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from promoe_ds.config.routing import METHODS, Method, RoutingConfig
from promoe_ds.config.section import Section
from promoe_ds.registry import register
from promoe_ds.routing import ROUTERS, Partition, RoutingPlan
from promoe_ds.routing.router import GateRouter, choose_top_k


class Options(Section):
    """The fields of `routing.options`: checked like all fields of a recipe, kept with the run."""

    temperature: float = Field(1.0, gt=0, description="of the softmax over distances")


# What is known before anything is built: the section above, and the router's size, which is that of
# a linear gate if nothing else is said. Method's docstring lists the rest.
METHODS["nearest"] = Method(options=Options)


@register(ROUTERS, "nearest")
class NearestRouter(GateRouter):
    """The gate's rows are points; a token's scores fall with its squared distances to them."""

    initial_gate = "linear"

    def __init__(self, width: int, settings: RoutingConfig) -> None:
        super().__init__(width, settings)
        self.temperature = Options(**settings.options).temperature

    def forward(self, tokens_BSD: Tensor, partition: Partition) -> RoutingPlan:
        # Scores are fp32 whatever the precision of the run.
        with torch.autocast(tokens_BSD.device.type, enabled=False):
            distances_BSE = torch.cdist(tokens_BSD.float(), self.gate_weight.float()[None])
            scores_BSE = (-distances_BSE.square() / self.temperature).softmax(dim=-1)
        gates_BSK, expert_ids_BSK = choose_top_k(scores_BSE, self.top_k)
        # Samples under the null condition have been set apart already (`partition`).
        assignment, stats = self.plan_token_choice(tokens_BSD, gates_BSK, expert_ids_BSK, partition)
        evenness = scores_BSE.mean(dim=(0, 1)).square().sum() * self.num_experts
        # Losses are logged by name and added as they are: their weights belong in here.
        return RoutingPlan(
            assignment=assignment, aux_losses={"evenness": 0.01 * evenness}, stats=stats
        )
