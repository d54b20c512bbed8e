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
from promoe_ds.training.router_state import RouterState, give_superclasses, seed_centroids
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


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], *, exact: bool = False
) -> None:
    assert found.keys() == expected.keys() and found
    close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}  # another order
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, **close, msg=lambda text, n=name: f"{n}: {text}"
        )


@with_state
def test_state_moves_once_a_step_by_the_observations_of_all_its_passes(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, seen = make_network(method), pretend_one_rank(monkeypatch)
    router_state, nobody = RouterState(network), [NULL] * 4
    # Steps of one pass and of three; one that is skipped, of which nothing is left in the next;
    # one without routed samples on this rank.
    steps = [(LABELS,), (LABELS, LABELS, nobody), (LABELS,), (LABELS,), (nobody,)]
    for step, passes in enumerate(steps):
        before, skip = state(network), step == 2
        plans = [run(network, 10 * step + number, labels) for number, labels in enumerate(passes)]
        for each in plans:
            router_state.add(each)
        expected = before if skip or passes == (nobody,) else absorbed(network, plans)
        assert_close(state(network), before, exact=True)  # not before the step ends
        seen.clear()
        router_state.update_running_state(skip=skip)
        assert_close(state(network), expected, exact=expected is before)
        # One collective for all layers, also where this rank has no routed samples.
        assert len(seen) == (not skip)
        assert expected is before or any(
            not torch.equal(value, before[name]) for name, value in state(network).items()
        )


@with_state
def test_state_of_uneven_ranks_is_that_of_all_their_passes(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank has two passes with tokens, the other one with and one without; both end with the
    same state.
    """
    networks = [make_network(method)]
    networks.append(copy.deepcopy(networks[0]))
    states = [RouterState(network) for network in networks]
    batches = [[(0, LABELS), (1, LABELS)], [(2, LABELS), (3, [NULL] * 4)]]
    plans = []
    for network, router_state, passes in zip(networks, states, batches, strict=True):
        for batch in passes:
            plans.append(run(network, *batch))
            router_state.add(plans[-1])
    expected = absorbed(networks[0], plans)
    call_together(monkeypatch, states, "update_running_state", skip=False)
    assert_close(state(networks[0]), expected)
    assert_close(state(networks[1]), state(networks[0]), exact=True)


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


def test_superclasses_of_the_map_reach_every_layer_and_must_have_been_read() -> None:
    network = make_network("classification")
    give_superclasses(network, network.config)
    # The null label's, the last one, is not used.
    expected = [0, 1, 2, 2, 1, 2, 0, 1, 3, 3, 0]
    for layer in network.moe_layers().values():
        assert layer.router._superclass_of.tolist() == expected
    assert all(plan.aux_losses["classification"] > 0 for plan in run(network).values())
    routing = network.config.routing.model_copy(update={"superclasses": None})
    with pytest.raises(ConfigError, match=r"routing\.superclasses is empty"):
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


def test_seed_every_layer_starts_at_tokens_that_it_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network("kmeans")
    sent = seed_all(network, monkeypatch)
    layers = network.moe_layers()
    assert not any(layer.router._forward_pre_hooks for layer in layers.values())
    assert all(parameter.grad is None for parameter in network.parameters())
    met: list[Tensor] = []
    for layer in layers.values():
        layer.router.register_forward_pre_hook(
            lambda _, given: met.append(given[0][[0, 2, 3]].flatten(0, 1))
        )
    run(network)  # the batch of `seed_all`; its second sample is not routed
    for layer, tokens, broadcast in zip(layers.values(), met, sent, strict=True):
        assert torch.equal(layer.router.centroids, broadcast)
        # A deeper layer's tokens are those behind a first layer that routes by its new centroids.
        is_token_EN = (layer.router.centroids[:, None] == tokens).all(dim=2)
        assert is_token_EN.sum(dim=1).tolist() == [1] * 4
        assert len(set(is_token_EN.int().argmax(dim=1).tolist())) == 4


def test_seed_is_a_function_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network("kmeans")
    first, again, other = (seed_all(network, monkeypatch, seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "kmeans"])
def test_seed_of_other_methods_runs_no_pass(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network(method)
    monkeypatch.setattr(network, "denoise", lambda *args: pytest.fail("a pass was run"))
    assert seed_all(network, monkeypatch) == []
