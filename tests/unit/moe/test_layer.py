"""The whole layer against Eq. 5, one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.model.build import build_moe_layer
from promoe_ds.moe import AllToAllDispatcher, FeedForward, MoELayer
from promoe_ds.routing import RoutingPlan, partition_samples

from ..builders import random_tensor, randomise, small_config
from ..routing import oracles

WIDTH, TOKENS, NULL = 8, 3, 10
BATCHES = {
    "mixed": [3, NULL, 0, NULL],
    "all conditional": [0, 1, 2],
    "all unconditional": [NULL, NULL],
    "one sample": [5],
    "one unconditional sample": [NULL],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top 2": {"top_k": 2},
    "every expert": {"top_k": 4},
    "sigmoid": {"activation": "sigmoid", "top_k": 2},
    "softmax": {"activation": "softmax", "score_scale": 3.0},
    "no shared": {"num_shared_experts": 0},
    "no unconditional": {"num_unconditional_experts": 0},
    "neither": {"num_shared_experts": 0, "num_unconditional_experts": 0},
    "two of each": {"num_shared_experts": 2, "num_unconditional_experts": 2},
}
#: Sums in another order than the oracle's.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}


def make_layer(
    backend: str = "loop", dtype: torch.dtype = torch.float64, **routing: Any
) -> MoELayer:
    config = small_config(
        model={"hidden_size": WIDTH, "num_heads": 1},
        routing={"expert_width": 16, **routing},
        parallel={"expert_backend": backend},
    )
    return randomise(build_moe_layer(config)).to(dtype)


def run(layer: MoELayer, tokens_BSD: Tensor, labels: list[int]) -> tuple[Tensor, RoutingPlan]:
    partition = partition_samples(
        ClassCondition(torch.tensor(labels), NULL),
        has_unconditional_expert=layer.unconditional is not None,
    )
    return layer(tokens_BSD, partition)


# The oracle: nested lists and loops.


def feed_forward(
    x: list[float], up: list, up_bias: list, down: list, down_bias: list
) -> list[float]:
    return oracles.linear(
        [oracles.gelu_tanh(value) for value in oracles.linear(x, up, up_bias)], down, down_bias
    )


def weights(module: FeedForward) -> tuple[list, ...]:
    return tuple(
        p.tolist() for p in (module.up.weight, module.up.bias, module.down.weight, module.down.bias)
    )


def equation_5(layer: MoELayer, tokens_BSD: Tensor, labels: list[int]) -> Tensor:
    routed, settings = layer.routed, layer.router.settings
    experts = list(
        zip(
            *(
                p.tolist()
                for p in (routed.up_weight, routed.up_bias, routed.down_weight, routed.down_bias)
            ),
            strict=True,
        )
    )
    output = []
    for sample, label in zip(tokens_BSD.tolist(), labels, strict=True):
        for x in sample:
            parts = [(1.0, weights(layer.shared))] if layer.shared is not None else []
            if label == NULL and layer.unconditional is not None:
                parts.append((1.0, weights(layer.unconditional)))
            else:
                scores = oracles.scores(
                    x, layer.router.prototypes.tolist(), settings.score_scale, settings.activation
                )
                parts += [(scores[e], experts[e]) for e in oracles.best(scores, settings.top_k)]
            rows = [(gate, feed_forward(x, *expert)) for gate, expert in parts]
            output.append([sum(gate * row[d] for gate, row in rows) for d in range(WIDTH)])
    return torch.tensor(output, dtype=torch.float64).view(tokens_BSD.shape)


@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("setting", SETTINGS)
def test_layer_equals_equation_5(setting: str, labels: list[int]) -> None:
    layer = make_layer(**SETTINGS[setting])
    tokens = random_tensor(len(labels), TOKENS, WIDTH, dtype=torch.float64)
    output, _ = run(layer, tokens, labels)
    torch.testing.assert_close(output, equation_5(layer, tokens, labels), **FLOAT64)


@given(
    labels=st.lists(st.sampled_from([0, 9, NULL]), min_size=1, max_size=4),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_layer_any_batch_equals_equation_5(labels: list[int], top_k: int, seed: int) -> None:
    layer = make_layer(top_k=top_k)
    tokens = random_tensor(len(labels), TOKENS, WIDTH, seed=seed, dtype=torch.float64)
    output, _ = run(layer, tokens, labels)
    torch.testing.assert_close(output, equation_5(layer, tokens, labels), **FLOAT64)


@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES.keys())
def test_layer_backends_agree_in_output_and_gradients(labels: list[int]) -> None:
    results = []
    for backend in ("loop", "grouped_mm"):
        layer = make_layer(backend, torch.float32, top_k=2)
        tokens = random_tensor(len(labels), TOKENS, WIDTH).requires_grad_()
        output, plan = run(layer, tokens, labels)
        (
            (output * random_tensor(*output.shape, seed=3)).sum() + sum(plan.aux_losses.values())
        ).backward()
        results.append(
            {
                "output": output.detach(),
                "tokens": tokens.grad,
                **{n: p.grad for n, p in layer.named_parameters()},
            }
        )
    # fp32, the same products added in another order; the contrastive loss divides by 0.07.
    for name, value in results[0].items():
        torch.testing.assert_close(
            results[1][name], value, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("setting", SETTINGS)
def test_layer_output_of_a_sample_does_not_depend_on_its_batch_mates(setting: str) -> None:
    layer, labels = make_layer(**SETTINGS[setting]), BATCHES["mixed"]
    tokens = random_tensor(len(labels), TOKENS, WIDTH, dtype=torch.float64)
    together, _ = run(layer, tokens, labels)
    for place, label in enumerate(labels):
        alone, _ = run(layer, tokens[place : place + 1], [label])
        # Matrix products of another height may add in another order.
        torch.testing.assert_close(together[place : place + 1], alone, **FLOAT64)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("rcl_weight", [0.0, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_layer_every_parameter_and_token_gets_a_gradient(
    backend: str, labels: list[int], rcl_weight: float, training: bool
) -> None:
    layer = make_layer(backend, torch.float32, rcl_weight=rcl_weight).train(training)
    tokens = random_tensor(len(labels), TOKENS, WIDTH).requires_grad_()
    output, plan = run(layer, tokens, labels)
    (output.square().sum() + sum(plan.aux_losses.values())).backward()
    assert [name for name, parameter in layer.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert (tokens.grad.abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize(
    ("labels", "idle"), [([NULL, NULL], ("router.", "routed.")), ([0, 1], ("unconditional.",))]
)
def test_layer_parameters_that_no_token_uses_get_zero_gradients(
    labels: list[int], idle: tuple[str, ...]
) -> None:
    layer = make_layer(top_k=4)  # all routed experts work if any does
    output, plan = run(layer, random_tensor(2, TOKENS, WIDTH, dtype=torch.float64), labels)
    (output.square().sum() + sum(plan.aux_losses.values())).backward()
    for name, parameter in layer.named_parameters():
        assert bool(parameter.grad.any()) != name.startswith(idle), name


def test_layer_unconditional_tokens_do_not_touch_routed_experts() -> None:
    layer, other = make_layer(), make_layer()
    randomise(other.routed, seed=5)
    randomise(other.router, seed=6)
    tokens = random_tensor(2, TOKENS, WIDTH, dtype=torch.float64)
    assert torch.equal(run(layer, tokens, [NULL, NULL])[0], run(other, tokens, [NULL, NULL])[0])


def test_layer_conditional_tokens_do_not_touch_the_unconditional_expert() -> None:
    layer, other = make_layer(), make_layer()
    randomise(other.unconditional, seed=5)
    tokens = random_tensor(2, TOKENS, WIDTH, dtype=torch.float64)
    assert torch.equal(run(layer, tokens, [0, 1])[0], run(other, tokens, [0, 1])[0])


def test_layer_applies_the_plan_that_it_is_given() -> None:
    layer = make_layer()
    tokens = random_tensor(2, TOKENS, WIDTH, dtype=torch.float64)
    partition = partition_samples(ClassCondition(torch.tensor([0, 1]), NULL))
    plan = layer.route(tokens, partition)
    before = layer.apply_experts(tokens, partition, plan)
    with torch.no_grad():
        layer.router.prototypes.neg_()
    assert torch.equal(layer.apply_experts(tokens, partition, plan), before)
    assert not torch.equal(layer(tokens, partition)[0], before)


@pytest.mark.parametrize("setting", SETTINGS)
def test_layer_does_not_change_its_input(setting: str) -> None:
    tokens = random_tensor(4, TOKENS, WIDTH, dtype=torch.float64)
    before = tokens.clone()
    run(make_layer(**SETTINGS[setting]), tokens, BATCHES["mixed"])
    assert torch.equal(tokens, before)


@pytest.mark.parametrize("setting", SETTINGS)
def test_layer_gradient_is_that_of_finite_differences(setting: str) -> None:
    layer = make_layer(**SETTINGS[setting])
    tokens = random_tensor(2, 2, WIDTH, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: run(layer, t, [3, NULL])[0], (tokens,))


def test_layer_bf16_keeps_the_dtype_of_the_tokens() -> None:
    layer = make_layer("loop", torch.bfloat16)
    output, plan = run(layer, random_tensor(3, TOKENS, WIDTH, dtype=torch.bfloat16), [0, NULL, 1])
    assert output.dtype == torch.bfloat16
    assert plan.assignment.gates_N.dtype == torch.float32


def test_layer_replicated_experts_run_while_rows_travel(monkeypatch) -> None:
    """Forward and backward: the exchange is under way before the shared and unconditional experts
    begin, and awaited after.
    """
    events: list[str] = []

    class Work:
        def wait(self) -> None:
            events.append("wait")

    def exchange(received: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> Work:
        received.copy_(sent)
        if kwargs.get("async_op"):
            events.append("start")
        return Work()

    monkeypatch.setattr(torch.distributed, "all_to_all_single", exchange)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    layer = make_layer().train()
    layer.dispatcher = AllToAllDispatcher(None)
    for name in ("shared", "unconditional", "routed"):
        module = getattr(layer, name)
        module.register_forward_pre_hook(lambda *args, n=name: events.append(n))
        next(module.parameters()).register_hook(
            lambda *args, n=name: events.append(f"{n} backward")
        )
    tokens = random_tensor(4, TOKENS, WIDTH, dtype=torch.float64).requires_grad_()
    output, _ = run(layer, tokens, BATCHES["mixed"])
    assert events == ["start", "shared", "unconditional", "wait", "routed", "start", "wait"]
    events.clear()
    output.square().sum().backward()
    starts, waits = (
        [at for at, event in enumerate(events) if event == kind] for kind in ("start", "wait")
    )
    assert starts[0] < waits[0] < events.index("routed backward") < starts[1] < waits[1]
    assert all(
        starts[1] < events.index(f"{name} backward") < waits[1]
        for name in ("shared", "unconditional")
    )
