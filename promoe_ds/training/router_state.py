"""Routers' running state (thresholds, centroids): learned once a step, from all passes of all ranks
together.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from promoe_ds.condition import Condition
from promoe_ds.config import RunConfig
from promoe_ds.distributed.context import sum_over_ranks
from promoe_ds.errors import ConfigError
from promoe_ds.model.dit import DiT
from promoe_ds.randomness import generator
from promoe_ds.routing import ClassificationRouter, KMeansRouter, Partition, RoutingPlan


class RouterState:
    """Collects the observations of a step's plans and hands their sum over the ranks to the
    routers.
    """

    def __init__(self, network: DiT) -> None:
        """Watch the network's routers."""
        self._routers = {index: layer.router for index, layer in network.moe_layers().items()}
        self._observations: dict[int, Tensor] = {}

    def begin_step(self, step: int) -> None:
        """Set the step of the training, on which the capacity of some routers depends."""
        for router in self._routers.values():
            router.step = step

    def add(self, plans: dict[int, RoutingPlan]) -> None:
        """Take one pass's observations.  Sync: none."""
        for index, plan in plans.items():
            if plan.observation is not None:
                self._observations[index] = plan.observation + self._observations.get(index, 0)

    def update_running_state(self, *, skip: bool | Tensor) -> None:
        """End a step: update every router, or forget what was seen where the step is skipped; start
        anew.

        Args:
            skip: as a tensor, it is not read: the state is put back on the device.
        Collectives: one, where a router has state.
        """
        observations, self._observations = self._observations, {}
        if skip is True or not observations:
            return
        buffers = [b for index in observations for b in self._routers[index].buffers()]
        before = [b.clone() for b in buffers] if isinstance(skip, Tensor) else []
        for index, total in sum_over_ranks(observations).items():
            self._routers[index].update_running_state(total)
        for buffer, old in zip(buffers, before, strict=False):
            buffer.copy_(torch.where(torch.as_tensor(skip).bool(), old, buffer))


def give_superclasses(network: DiT, config: RunConfig) -> None:
    """Give every classification router the map of the recipe; nothing to do for other methods."""
    if config.routing.method != "classification":
        return
    superclasses = config.routing.superclasses
    if superclasses is None:
        raise ConfigError(
            "routing.superclasses is empty: load the recipe with promoe_ds.config.load_config,"
            " which reads the map"
        )
    for row, layer in enumerate(network.moe_layers().values()):
        assert isinstance(layer.router, ClassificationRouter)
        order = config.expert_order_of(row) or range(config.routing.num_experts)
        place_of = {expert: place for place, expert in enumerate(order)}
        layer.router.set_superclasses([place_of[superclass] for superclass in superclasses])


@torch.no_grad()
def seed_centroids(
    network: DiT, condition: Condition, noised_BZHW: Tensor, timestep_B: Tensor, seed: int
) -> None:
    """Start k-means routers at tokens of a first batch, the same on every rank; nothing to do for
    other methods.

    A layer's centroids are set before it routes, so that deeper layers see the tokens that training
    will show them.
    Collectives: those of a forward pass, and one broadcast a layer.
    """
    hooks = []
    for index, layer in network.moe_layers().items():
        if isinstance(layer.router, KMeansRouter):
            hooks.append(layer.router.register_forward_pre_hook(partial(_seed, seed, index)))
    if hooks:
        network.denoise(noised_BZHW, timestep_B, condition)
    for hook in hooks:
        hook.remove()


def _seed(seed: int, index: int, router: KMeansRouter, arguments: tuple[Tensor, Partition]) -> None:
    random = generator(seed, "init", index, 0)
    router.seed(*arguments, lambda count: torch.from_numpy(random.permutation(count)))
    dist.broadcast(router.centroids, src=0)
