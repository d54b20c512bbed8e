"""The unconditional expert as one more group: the same numbers as by itself, for any number of null
samples; weights joined without a copy where they are laid for it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from promoe_ds.condition import ClassCondition
from promoe_ds.moe import MoELayer
from promoe_ds.moe.experts import EXPERT_PARAMETERS
from promoe_ds.moe.joining import is_behind, join, parameters_behind
from promoe_ds.routing import ROUTERS, partition_samples
from tests.unit.ranks import pretend_one_rank

from ..builders import METHODS, of_method, random_network, random_tensor
from ..training.test_routing_log import accumulate, make_network
from .test_layer import FLOAT64, NULL, TOKENS, WIDTH, loss_of, make_layer

JOINABLE = [method for method in METHODS if ROUTERS[method].is_per_sample]
BATCHES = {"mixed": [3, NULL, 0, NULL, 7], "no null": [3, 1, 0, 2, 7], "all null": [NULL] * 5}


def lay_behind(layer: MoELayer) -> None:
    """Lay weights as ZeRO's buffers have them: each stack, then the unconditional expert's own."""
    routed = layer.routed
    for name in EXPERT_PARAMETERS[routed.expert_type]:
        stack = getattr(routed, name)
        (single,) = parameters_behind(layer.unconditional, [name])
        flat = torch.cat([stack.data.flatten(), single.data.flatten()])
        stack.data = flat[: stack.numel()].view_as(stack)
        single.data = flat[stack.numel() :].view_as(single)


def results(layer: MoELayer, labels: list[int], *, joins: bool) -> dict[str, Tensor]:
    """Return output, losses, statistics and every gradient of a pass in training."""
    layer.zero_grad()
    condition = ClassCondition(torch.tensor(labels), NULL)
    tokens = random_tensor(len(labels), TOKENS, WIDTH, dtype=next(layer.parameters()).dtype)
    tokens.requires_grad_()
    output, plan = layer(tokens, partition_samples(condition, joins_unconditional=joins))
    ((output * random_tensor(*output.shape, seed=3)).sum() + loss_of(plan)).backward()
    stats = {name: value for name, value in vars(plan.stats).items() if value is not None}
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    observed = {} if plan.observation is None else {"observation": plan.observation}
    found = {"output": output, "tokens": tokens.grad, **plan.aux_losses, **stats, **observed}
    return {name: value.detach().clone() for name, value in {**found, **gradients}.items()}


class _Calls(TorchDispatchMode):
    """Lists operations and the shapes that they read and return."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
        self.found.append((str(func), shapes))
        return result


@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("types", [{}, {"expert_type": "swiglu", "num_shared_experts": 0}])
@pytest.mark.parametrize("method", JOINABLE)
def test_joined_layer_equals_the_layer_with_an_expert_apart(
    method: str, types: dict[str, Any], labels: list[int]
) -> None:
    layer = make_layer(method, **{"top_k": 1, **types}).train()
    apart = results(layer, labels, joins=False)
    copied = results(layer, labels, joins=True)
    lay_behind(layer)
    viewed = results(layer, labels, joins=True)
    for found in (copied, viewed):
        torch.testing.assert_close(found, apart, **FLOAT64)
    layer.float().routed.backend = "grouped_mm"
    in_float = results(layer, labels, joins=True)
    expected = {name: value.to(in_float[name].dtype) for name, value in apart.items()}
    torch.testing.assert_close(in_float, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("method", "num_experts"), [("expert_choice", 3), ("expert_choice", 6), ("ec_dit", 3)]
)
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES.keys())
def test_joined_layer_where_samples_of_one_kind_have_fewer_rows(
    method: str, num_experts: int, labels: list[int]
) -> None:
    """Of four tokens three experts take three rows, of null samples four. Six experts take six."""
    layer = make_layer(method, top_k=1, num_experts=num_experts).train()
    apart, joined = (results(layer, labels, joins=joins) for joins in (False, True))
    torch.testing.assert_close(joined, apart, **FLOAT64)


@pytest.mark.parametrize("method", JOINABLE)
def test_shapes_do_not_depend_on_the_number_of_null_samples(method: str) -> None:
    """Nor does anything else that a device is asked to do."""
    layer = make_layer(method, "grouped_mm", torch.float32, top_k=1).train()
    lay_behind(layer)
    results(layer, BATCHES["mixed"], joins=True)  # the first pass makes tables
    asked = []
    for labels in BATCHES.values():
        with _Calls() as calls:
            results(layer, labels, joins=True)
        asked.append(calls.found)
    assert asked[0] == asked[1] == asked[2]
    with _Calls() as calls:
        results(layer, BATCHES["mixed"], joins=False)
    assert calls.found != asked[0]


def test_stack_is_a_view_where_weights_are_laid_for_it() -> None:
    layer = make_layer("token_choice", "auto", torch.float32, top_k=1)
    stack, (single,) = layer.routed.up_weight, parameters_behind(layer.unconditional, ["up_weight"])
    assert not layer.can_join_unconditional()
    assert not is_behind(stack, single)
    lay_behind(layer)
    assert layer.can_join_unconditional()
    (joined,) = join([stack], [single])
    assert joined.data_ptr() == stack.data_ptr()
    assert torch.equal(joined, torch.cat([stack, single[None]]))
    layer.routed.backend = "loop"
    assert not layer.can_join_unconditional()


@pytest.mark.parametrize(
    ("routing", "joins"),
    [
        ({}, True),
        ({"top_k": 2}, False),
        ({"method": "expert_choice"}, True),
        ({"method": "diff_moe"}, False),
        ({"method": "expert_race"}, False),
        ({"num_unconditional_experts": 2}, False),
        ({"num_unconditional_experts": 0}, False),
        ({"method": "dense"}, False),
    ],
)
def test_network_joins_where_it_costs_nothing(routing: dict[str, Any], joins: bool) -> None:
    network = random_network(routing={"num_experts": 4, **routing})
    for layer in network.moe_layers().values():
        if routing.get("num_unconditional_experts", 1) == 1:
            lay_behind(layer)
    assert network.join_unconditional() == joins


@pytest.mark.parametrize("method", JOINABLE)
def test_log_of_a_joined_network_is_that_of_one_with_the_expert_apart(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_one_rank(monkeypatch)
    network = make_network(method, routing={**of_method(method)["routing"], "top_k": 1})
    apart = accumulate(network)[0].reduce(step=1, steps=1)
    for layer in network.moe_layers().values():
        lay_behind(layer)
    assert network.join_unconditional()
    joined = accumulate(network)[0].reduce(step=1, steps=1)
    for found, expected in zip(joined, apart, strict=True):
        assert found.get("layer_detail", {}).keys() == expected.get("layer_detail", {}).keys()
        torch.testing.assert_close(_numbers(found), _numbers(expected), rtol=1e-4, atol=1e-5)


def _numbers(line: Any) -> list[float]:
    leaves = [leaf for leaf in tree_leaves(line) if isinstance(leaf, int | float)]
    return [float(leaf) for leaf in leaves]
