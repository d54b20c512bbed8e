"""Thresholds and centroids over passes and ranks: one update a step, the same everywhere;
superclasses; first centroids.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from promoe_ds.errors import ConfigError
from promoe_ds.model import DiT
from promoe_ds.routing import RoutingPlan
from promoe_ds.train.router_state import RouterState, give_superclasses, seed_centroids
from tests.unit.ranks import call_together, pretend_one_rank

from ..builders import METHODS, of_method, random_network, random_tensor

NULL = 10
WITH_STATE = ("diff_moe", "expert_race", "kmeans")
LABELS = [3, NULL, 0, 7]

with_state = pytest.mark.parametrize("method", WITH_STATE)


def make_network(method: str, **sections: Any) -> DiT:
    """Build a training network of two MoE layers whose state is not at its start."""
    network = random_network(model={"depth": 4}, **of_method(method), **sections).train()
    for layer in network.moe_layers().values():
        for buffer in layer.router.buffers():
            buffer.copy_(random_tensor(*buffer.shape, seed=7))
    return network


def run(network: DiT, seed: int = 0, labels: list[int] = LABELS) -> dict[int, RoutingPlan]:
    latents = random_tensor(len(labels), 1, 4, 4, seed=seed)
    with torch.no_grad():
        return network.denoise(
            latents, torch.linspace(100, 900, len(labels)), torch.tensor(labels)
        ).plans


def state(network: DiT) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.named_buffers() if ".router." in name}


def absorbed(network: DiT, plans: list[dict[int, RoutingPlan]]) -> dict[str, Tensor]:
    """Return the state after the routers of a copy absorbed the sum of the plans' observations."""
    network = copy.deepcopy(network)
    for index, layer in network.moe_layers().items():
        layer.router.update_running_state(
            torch.stack([plan[index].observation for plan in plans]).sum(dim=0)
        )
    return state(network)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        # fp32 sums in another order.
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@with_state
@pytest.mark.parametrize("passes", [1, 3])
def test_state_moves_once_a_step_by_the_observations_of_all_passes(
    method: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network(method)
    before, seen = state(network), pretend_one_rank(monkeypatch)
    router_state, plans = RouterState(network), []
    for seed in range(passes):
        plans.append(run(network, seed))
        router_state.add(plans[-1])
        assert_equal(state(network), before)  # not before the step ends
    expected = absorbed(network, plans)
    router_state.update_running_state(skip=False)
    assert_close(state(network), expected)
    assert any(not torch.equal(value, before[name]) for name, value in state(network).items())
    assert len(seen) == 1  # one collective for all layers


@with_state
def test_state_of_uneven_ranks_is_that_of_all_their_passes(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank has two passes with tokens, the other one with and one without; both end with the
    same state.
    """
    first = make_network(method)
    second = copy.deepcopy(first)
    states = [RouterState(first), RouterState(second)]
    batches = [[(0, LABELS), (1, LABELS)], [(2, LABELS), (3, [NULL] * 4)]]
    plans = []
    for network, router_state, passes in zip((first, second), states, batches, strict=True):
        for batch in passes:
            plans.append(run(network, *batch))
            router_state.add(plans[-1])
    expected = absorbed(first, plans)
    call_together(monkeypatch, states, "update_running_state", skip=False)
    assert_close(state(first), expected)
    assert_equal(state(second), state(first))


@with_state
def test_state_of_a_skipped_step_stays_and_is_forgotten(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network(method)
    before, seen = state(network), pretend_one_rank(monkeypatch)
    router_state = RouterState(network)
    router_state.add(run(network, seed=1))
    router_state.update_running_state(skip=True)
    assert_equal(state(network), before)
    assert seen == []
    plans = run(network, seed=2)
    expected = absorbed(network, [plans])
    router_state.add(plans)
    router_state.update_running_state(skip=False)
    assert_close(state(network), expected)  # nothing of the skipped step is left


@with_state
def test_state_after_a_step_starts_anew(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network(method)
    pretend_one_rank(monkeypatch)
    router_state = RouterState(network)
    for seed in range(3):
        plans = run(network, seed)
        expected = absorbed(network, [plans])
        router_state.add(plans)
        router_state.update_running_state(skip=False)
        assert_close(state(network), expected)


@with_state
def test_state_of_batches_without_routed_samples_stays(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network(method)
    before, seen = state(network), pretend_one_rank(monkeypatch)
    router_state = RouterState(network)
    router_state.add(run(network, labels=[NULL, NULL]))
    router_state.update_running_state(skip=False)
    assert_equal(state(network), before)
    assert len(seen) == 1  # the other ranks may have some: the collective takes place


@pytest.mark.parametrize("method", [method for method in METHODS if method not in WITH_STATE])
def test_state_of_methods_without_any_needs_no_collective(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network(method)
    give_superclasses(network, network.config)
    seen = pretend_one_rank(monkeypatch)
    router_state = RouterState(network)
    router_state.add(run(network))
    router_state.update_running_state(skip=False)
    assert seen == []


# Superclasses.


def test_superclasses_of_the_map_reach_every_layer() -> None:
    network = make_network("classification")
    give_superclasses(network, network.config)
    for layer in network.moe_layers().values():
        assert layer.router._superclass_of.tolist() == [
            0,
            1,
            2,
            2,
            1,
            2,
            0,
            1,
            3,
            3,
            0,
        ]  # the null label's is not used
    assert all(plan.aux_losses["classification"] > 0 for plan in run(network).values())


def test_superclasses_never_read_from_a_map_are_refused() -> None:
    network = make_network("classification")
    routing = network.config.routing.model_copy(update={"superclasses": None})
    with pytest.raises(ConfigError, match=r"routing\.superclasses is empty: load the recipe with"):
        give_superclasses(network, network.config.model_copy(update={"routing": routing}))


# First centroids.


def seed_all(
    network: DiT, monkeypatch: pytest.MonkeyPatch, *, seed: int = 5, labels: list[int] = LABELS
) -> list[Tensor]:
    """Seed from one batch; return what was broadcast."""
    sent: list[Tensor] = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: sent.append(tensor.clone()))
    seed_centroids(
        network,
        torch.tensor(labels),
        random_tensor(len(labels), 1, 4, 4),
        torch.linspace(100, 900, len(labels)),
        seed,
    )
    return sent


def tokens_entering(network: DiT) -> dict[int, Tensor]:
    """Return the routed samples' tokens that each MoE layer meets in the batch of `seed_all`."""
    met: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        return lambda router, args: met.update({index: args[0][[0, 2, 3]].flatten(0, 1)})

    hooks = [
        layer.router.register_forward_pre_hook(keep(index))
        for index, layer in network.moe_layers().items()
    ]
    run(network)
    for hook in hooks:
        hook.remove()
    return met


def test_seed_every_layer_starts_at_tokens_that_it_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network("kmeans")
    sent = seed_all(network, monkeypatch)
    assert len(sent) == 2
    for (index, tokens), broadcast in zip(tokens_entering(network).items(), sent, strict=True):
        centroids = network.blocks[index].moe.router.centroids
        assert torch.equal(centroids, broadcast)
        # A deeper layer's tokens are those behind a first layer that routes by its new centroids.
        found = [
            (tokens == centroid).all(dim=1).nonzero().flatten().tolist() for centroid in centroids
        ]
        assert all(len(places) == 1 for places in found)
        assert len({places[0] for places in found}) == 4


def test_seed_is_a_function_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network("kmeans")
    first, again, other = (
        [value.clone() for value in seed_all(network, monkeypatch, seed=seed)] for seed in (5, 5, 6)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_seed_leaves_no_hook_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network("kmeans")
    seed_all(network, monkeypatch)
    assert not any(layer.router._forward_pre_hooks for layer in network.moe_layers().values())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("method", [method for method in METHODS if method != "kmeans"])
def test_seed_of_other_methods_runs_no_pass(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network(method)
    monkeypatch.setattr(network, "denoise", lambda *args: pytest.fail("a pass was run"))
    assert seed_all(network, monkeypatch) == []
