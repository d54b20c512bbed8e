"""The batch triangle, owned once: global = micro * ranks * accumulation."""

from dataclasses import dataclass

from promoe_ds.config.schema import RunConfig
from promoe_ds.config.section import require
from promoe_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Samples per optimizer step and how they are cut.

    Slot g of a global batch belongs to micro-step g // (ranks * micro) and there to rank
    (g // micro) % ranks, so that the samples of a step do not depend on the cut.
    """

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int

    def slots(self, micro_step: int, rank: int) -> range:
        """Return the slots of the global batch that `rank` computes in pass `micro_step`."""
        start = (micro_step * self.world_size + rank) * self.micro_batch
        return range(start, start + self.micro_batch)


def plan_batches(config: RunConfig, world_size: int) -> BatchPlan:
    """Cut the global batch for `world_size` data-parallel ranks.

    Raises: ConfigError if the numbers contradict each other or ep_size does not divide the ranks.
    """
    train, ep_size = config.train, config.parallel.ep_size
    require(
        world_size % ep_size == 0,
        f"parallel.ep_size={ep_size} does not divide the number of ranks, {world_size}: launch a"
        f" multiple of {ep_size} ranks or change parallel.ep_size",
        ConfigError,
    )
    require(
        train.global_batch_size % world_size == 0,
        f"train.global_batch_size={train.global_batch_size} cannot be cut into {world_size} equal"
        " shares: make it a multiple of the number of ranks",
        ConfigError,
    )
    micro = train.micro_batch_size or train.global_batch_size // world_size
    accumulation, rest = divmod(train.global_batch_size, micro * world_size)
    require(
        rest == 0,
        f"train.global_batch_size={train.global_batch_size} is no multiple of"
        f" train.micro_batch_size={micro} times {world_size} ranks = {micro * world_size}",
        ConfigError,
    )
    routing, tokens = config.routing, micro * config.model.fewest_tokens
    require(
        routing.method != "diff_moe" or tokens * routing.top_k >= routing.num_experts,
        f"routing.top_k={routing.top_k} of {tokens} tokens per micro-batch gives each of"
        f" routing.num_experts={routing.num_experts} experts less than one token (method=diff_moe):"
        " raise train.micro_batch_size",
        ConfigError,
    )
    return BatchPlan(
        global_batch=train.global_batch_size,
        micro_batch=micro,
        world_size=world_size,
        accumulation=accumulation,
    )
