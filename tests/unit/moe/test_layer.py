"""The layer under every routing method and expert type: its plan carried out, gradients,
independence of samples, overlap with the exchange.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from promoe_ds.model.build import build_moe_layer
from promoe_ds.moe import AllToAllDispatcher, MoELayer
from promoe_ds.routing import RoutingPlan

from ..builders import of_method, random_tensor, randomise, small_config
from ..routing.plans import METHODS, NULL, give_state, partition, plan_rows

WIDTH, TOKENS, LABELS = 8, 4, [3, NULL, 0, NULL, 7]
TYPES: dict[str, dict[str, Any]] = {
    "gelu": {},
    "swiglu": {"expert_type": "swiglu"},
    "swiglu, shared gelu": {"expert_type": "swiglu", "shared_expert_type": "gelu"},
    "gelu, two shared swiglu": {
        "shared_expert_type": "swiglu",
        "num_shared_experts": 2,
        "shared_expert_width": 24,
    },
    "swiglu alone": {
        "expert_type": "swiglu",
        "num_shared_experts": 0,
        "num_unconditional_experts": 0,
    },
    "swiglu, two unconditional": {"expert_type": "swiglu", "num_unconditional_experts": 2},
}
#: Methods under which a sample is never touched by its batch mates in evaluation.
INDEPENDENT = tuple(
    method
    for method in METHODS
    if not small_config(**of_method(method)).routing.traits.mixes_samples
)
#: Sums in another order than the loop's.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}

every_method = pytest.mark.parametrize("method", METHODS)
every_type = pytest.mark.parametrize("types", TYPES.values(), ids=TYPES.keys())


def make_layer(
    method: str = "token_choice",
    backend: str = "loop",
    dtype: torch.dtype = torch.float64,
    **routing: Any,
) -> MoELayer:
    config = small_config(
        model={"hidden_size": WIDTH, "num_heads": 1},
        parallel={"expert_backend": backend},
        **of_method(method, expert_width=16, **routing),
    )
    layer = randomise(build_moe_layer(config))
    give_state(layer.router, seed=5)
    return layer.to(dtype)


def run(layer: MoELayer, tokens_BSD: Tensor, labels: list[int]) -> tuple[Tensor, RoutingPlan]:
    return layer(tokens_BSD, partition(labels, unconditional=layer.unconditional is not None))


def loss_of(plan: RoutingPlan) -> Tensor:
    """Sum all that training makes a loss of."""
    predicted = [] if plan.target_patches_BSP is None else [plan.target_patches_BSP.square().sum()]
    return sum([*plan.aux_losses.values(), *predicted], torch.zeros(()))


def one_expert(layer: MoELayer, expert: int, x: Tensor) -> Tensor:
    p = {name: value[expert] for name, value in layer.routed.named_parameters()}
    if layer.routed.expert_type == "swiglu":
        return (nn.functional.silu(x @ p["gate_weight"].T) * (x @ p["up_weight"].T)) @ p[
            "down_weight"
        ].T
    return (
        nn.functional.gelu(x @ p["up_weight"].T + p["up_bias"], approximate="tanh")
        @ p["down_weight"].T
        + p["down_bias"]
    )


@pytest.mark.parametrize("training", [True, False])
@every_method
@every_type
def test_layer_carries_out_its_plan_token_by_token(
    method: str, types: dict[str, Any], training: bool
) -> None:
    """Eq. 5: shared plus gate * expert for every row of the list, and the unconditional expert for
    null samples.
    """
    layer = make_layer(method, **types).train(training)
    tokens = random_tensor(len(LABELS), TOKENS, WIDTH, dtype=torch.float64)
    output, plan = run(layer, tokens, LABELS)
    expected = torch.zeros_like(tokens) if layer.shared is None else layer.shared(tokens)
    if layer.unconditional is not None:
        expected = expected + torch.tensor([label == NULL for label in LABELS])[
            :, None, None
        ] * layer.unconditional(tokens)
    rows = list(expected.flatten(0, 1).unbind())
    for token, expert, gate in plan_rows(plan):
        rows[token] = rows[token] + gate * one_expert(layer, expert, tokens.flatten(0, 1)[token])
    torch.testing.assert_close(output, torch.stack(rows).view_as(tokens), **FLOAT64)
    assert plan.assignment.gates_N.numel() > 0


@every_method
@every_type
def test_layer_backends_agree_in_output_and_gradients(method: str, types: dict[str, Any]) -> None:
    results = []
    for backend in ("loop", "grouped_mm"):
        layer, tokens = (
            make_layer(method, backend, torch.float32, **types),
            random_tensor(len(LABELS), TOKENS, WIDTH),
        )
        output, plan = run(layer, tokens.requires_grad_(), LABELS)
        ((output * random_tensor(*output.shape, seed=3)).sum() + loss_of(plan)).backward()
        results.append(
            {
                "output": output.detach(),
                "tokens": tokens.grad,
                **{n: p.grad for n, p in layer.named_parameters()},
            }
        )
    # fp32, the same products added in another order; contrastive losses divide by 0.07.
    for name, value in results[0].items():
        torch.testing.assert_close(
            results[1][name], value, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@every_method
@pytest.mark.parametrize(
    "labels", [LABELS, [NULL, NULL], [1]], ids=["mixed", "all unconditional", "one sample"]
)
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_layer_every_parameter_and_token_gets_a_finite_gradient(
    method: str, labels: list[int], backend: str
) -> None:
    layer = make_layer(method, backend, torch.float32, expert_type="swiglu")
    tokens = random_tensor(len(labels), TOKENS, WIDTH).requires_grad_()
    output, plan = run(layer, tokens, labels)
    (output.square().sum() + loss_of(plan)).backward()
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


@every_method
def test_layer_gradient_of_the_tokens_is_that_of_finite_differences(method: str) -> None:
    layer = make_layer(method, expert_type="swiglu")
    tokens = random_tensor(2, TOKENS, WIDTH, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: run(layer, t, [3, NULL])[0], (tokens,))


@every_method
def test_layer_bf16_keeps_the_dtype_of_the_tokens(method: str) -> None:
    layer = make_layer(method, dtype=torch.bfloat16, expert_type="swiglu")
    tokens = random_tensor(3, TOKENS, WIDTH, dtype=torch.bfloat16).requires_grad_()
    output, plan = run(layer, tokens, [0, NULL, 1])
    (output.float().square().sum() + loss_of(plan)).backward()
    assert output.dtype == tokens.grad.dtype == torch.bfloat16
    assert all(
        parameter.grad.dtype == torch.bfloat16 and parameter.grad.isfinite().all()
        for parameter in layer.parameters()
    )


def test_layer_applies_the_plan_that_it_is_given_and_leaves_its_input() -> None:
    layer, tokens = make_layer(), random_tensor(2, TOKENS, WIDTH, dtype=torch.float64)
    before, parts = tokens.clone(), partition([0, 1])
    plan = layer.route(tokens, parts)
    output = layer.apply_experts(tokens, parts, plan)
    with torch.no_grad():
        layer.router.prototypes.neg_()
    assert torch.equal(layer.apply_experts(tokens, parts, plan), output)
    assert not torch.equal(layer(tokens, parts)[0], output)
    assert torch.equal(tokens, before)


# Who depends on whom.


@pytest.mark.parametrize("method", INDEPENDENT)
@pytest.mark.parametrize("unconditional", [0, 1])
def test_layer_output_of_a_sample_does_not_depend_on_its_batch_mates(
    method: str, unconditional: int
) -> None:
    layer = make_layer(method, num_unconditional_experts=unconditional).eval()
    tokens = random_tensor(len(LABELS), TOKENS, WIDTH, dtype=torch.float64)
    together, _ = run(layer, tokens, LABELS)
    for place, label in enumerate(LABELS):
        alone, _ = run(layer, tokens[place : place + 1], [label])
        # Matrix products of another height may add in another order.
        torch.testing.assert_close(together[place : place + 1], alone, **FLOAT64)


@every_method
def test_layer_null_samples_depend_on_no_other_and_are_no_ones_mates(method: str) -> None:
    """Even where the pool is shared: the unconditional expert's samples are no part of it."""
    layer = make_layer(method).eval()
    tokens, labels = random_tensor(4, TOKENS, WIDTH, dtype=torch.float64), [1, NULL, 2, NULL]
    together, _ = run(layer, tokens, labels)
    for places in ([1], [3], [0, 2]):
        apart, _ = run(layer, tokens[places], [labels[place] for place in places])
        torch.testing.assert_close(together[places], apart, **FLOAT64)


@pytest.mark.parametrize(
    ("method", "training"), [("diff_moe", True), ("diff_moe", False), ("expert_race", True)]
)
def test_layer_output_depends_on_the_batch_where_a_method_says_so(
    method: str, training: bool
) -> None:
    layer = make_layer(method).train(training)
    tokens = random_tensor(2, TOKENS, WIDTH, dtype=torch.float64)
    together, alone = run(layer, tokens, [0, 1])[0], run(layer, tokens[:1], [0])[0]
    assert (together[:1] - alone).abs().max() > 1e-3


# Overlap.


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
    output, _ = run(layer, tokens, [3, NULL, 0, NULL])
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
