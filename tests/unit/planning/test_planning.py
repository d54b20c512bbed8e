"""The planner: what a trace counts, how ZeRO cuts, what travels where; by hand-made sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from promoe_ds.config import (
    RunConfig,
    count_parameters,
    plan_batches,
    resolve_deepspeed,
    training_flops_per_image,
)
from promoe_ds.errors import ConfigError
from promoe_ds.planning.cluster import layout_of
from promoe_ds.planning.estimate import Link, _ring
from promoe_ds.planning.planner import plan_lines, plan_step
from promoe_ds.planning.shapes import trace_pass
from promoe_ds.planning.trace import PASS, ShapeTrace
from promoe_ds.planning.work import Efficiency, Work
from promoe_ds.planning.zero import States, states_of_config, states_of_groups

from ..builders import METHODS, of_method, small_config
from .scenes import cluster, config, layout, planned

pytestmark = pytest.mark.usefixtures("ranks")


# What a trace counts.


def traced(function, *inputs: Tensor) -> ShapeTrace:
    trace = ShapeTrace(known=inputs)
    with trace:
        function(*inputs)
    return trace


def test_trace_peak_is_what_is_live_at_once() -> None:
    def function(x: Tensor) -> None:
        doubled = x * 2  # one live
        summed = doubled + 1  # two
        del doubled
        view = summed.view(10, 100)
        view.add_(1)  # views and in-place work take nothing
        _ = summed * 3  # two

    trace = traced(function, torch.zeros(1000))
    assert (dict(trace.peak), trace.live["activations"]) == ({"activations": 2 * 4000}, 0)


def test_trace_counts_saved_tensors_until_the_backward_pass_ends() -> None:
    # The doubled one and its exponential; the first may go. The gradient stays.
    weight = torch.ones(1000, requires_grad=True)
    trace = traced(lambda weight: (weight * 2).exp().sum().backward(), weight)
    assert 2 * 4000 <= sum(trace.peak.values()) <= 3 * 4000 + 64
    assert trace.live["activations"] == 4000


def test_trace_counts_products_and_ignores_views() -> None:
    trace = traced(lambda a, b: (a @ b).t().relu(), torch.zeros(8, 16), torch.zeros(16, 32))
    product, other = trace.work[PASS]
    moved = 4 * (8 * 16 + 16 * 32 + 8 * 32)
    assert product == Work("matrix", "float32", 2 * 8 * 16 * 32, moved)
    assert other == Work("other", "float32", 0, 2 * 4 * 8 * 32)


def test_trace_counts_what_is_changed_in_place_as_read_and_written() -> None:
    trace = traced(lambda a, b: a.mul_(2).copy_(b), torch.zeros(100), torch.zeros(100))
    assert [work.bytes for work in trace.work[PASS]] == [2 * 400, 2 * 400]


# One pass of the network.


@pytest.mark.parametrize(("checkpointing", "crossings"), [("none", 4), ("full", 6)])
@pytest.mark.parametrize("top_k", [1, 2])
def test_pass_sends_rows_once_a_crossing_and_again_where_recomputed(
    checkpointing: str, crossings: int, top_k: int
) -> None:
    run = config(
        routing={"top_k": top_k}, parallel={"ep_size": 2, "activation_checkpointing": checkpointing}
    )
    shapes = trace_pass(run, layout())
    assert (
        shapes.rows_leaving == 4 * run.model.tokens_per_image * top_k
    )  # two layers, half of the rows
    assert shapes.trace.rows_sent(0) == crossings * 32 * 4 * shapes.rows_leaving


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_pass_of_every_method_sends_the_rows_that_it_lists(method: str) -> None:
    run = small_config(**{**of_method(method), "parallel": {"ep_size": 2}})
    shapes = trace_pass(run, layout(world_size=2))
    assert shapes.trace.rows_sent(0) == 4 * run.model.hidden_size * 4 * shapes.rows_leaving > 0


@pytest.mark.parametrize("block", ["dit", "modern"])
def test_pass_work_is_the_accounted_one(block: str) -> None:
    model = {"hidden_size": 32, "depth": 4, "block": block}
    parallel = {"expert_backend": "loop"}
    run = config(model=model, parallel=parallel, routing={"rcl_weight": 0.0})
    work = trace_pass(run, layout(world_size=1)).trace.work[PASS]
    images, width, tokens = 4, 32, run.model.tokens_per_image
    # Accounted: three forward passes. Fused attention makes its scores anew; raw pixels, labels and
    # times need no gradient.
    again = 4 * 2 * images * tokens * tokens * width
    flops = sum(one.flops for one in work)
    assert flops == pytest.approx(images * training_flops_per_image(run) + again, rel=0.02)


def test_pass_holds_activations_in_proportion_to_the_batch_and_less_when_recomputed() -> None:
    def activations(micro: int, mode: str = "none") -> int:
        run = config(parallel={"ep_size": 2, "activation_checkpointing": mode})
        return trace_pass(run, layout(micro_batch=micro)).trace.peak["activations"]

    small, middle, large = (activations(n) for n in (64, 128, 192))
    # Nearly: which operation is the fullest moment may change with the size.
    assert large - middle == pytest.approx(middle - small, rel=0.05)
    assert activations(192, "full") < 0.7 * large


def test_pass_that_shapes_cannot_follow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values = config().model_dump(mode="json") | {"precision": {"compute": "fp8"}}
    monkeypatch.setattr(RunConfig, "model_dump", lambda self, **options: values)
    with pytest.raises(
        ConfigError, match=r"precision\.compute=fp8 .* fp32 or bf16 or bf16_autocast"
    ):
        trace_pass(config(), layout())


# States under ZeRO.


def held(run: RunConfig) -> tuple[int, int]:
    count = count_parameters(run)
    return count.dense + count.unconditional, count.routed


def numbers(states: States) -> tuple[int, ...]:
    return states.weights, states.gradients, states.optimizer, states.ema


@pytest.mark.parametrize(("on_cpu", "kept"), [(True, 60), (False, 16)])
def test_states_of_a_partition_hold_gradients_of_what_it_touches(on_cpu: bool, kept: int) -> None:
    # 64 elements, sixteen a rank; the middle parameter is touched by all, the first by one. On
    # CPUs DeepSpeed keeps whole gradients.
    exact = states_of_groups([([10, 50, 4], 4)], layout(on_cpu=on_cpu), 1)
    assert numbers(exact) == (4 * 64, 4 * kept, 12 * 16, 4 * 16)
    assert numbers(states_of_groups([([10, 50, 3], 4)], layout(), 1))[2:] == (
        12 * 16,
        4 * 16,
    )  # padded


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [(0, "fp32", (4, 4, 8, 4)), (2, "fp32", (4, 4, 12, 4)), (2, "bf16", (2, 2, 12, 4))],
)
def test_states_of_one_rank_hold_everything(
    stage: int, precision: str, expected: tuple[int, ...]
) -> None:
    run = small_config()
    states = states_of_config(run, layout(world_size=1, zero_stage=stage, precision=precision))
    assert numbers(states) == tuple(n * sum(held(run)) for n in expected)
    assert states.total == sum(numbers(states))


def test_states_of_zero_2_in_bf16_are_sharded_over_the_replicas() -> None:
    run = small_config(parallel={"ep_size": 2})
    dense, routed = held(run)
    # Half of the experts are here; their two replicas share the state of that half.
    here, owned = dense + routed // 2, dense // 4 + routed // 4
    found = numbers(states_of_config(run, layout(precision="bf16")))
    assert planned(run).parameters_per_rank == here
    assert found == pytest.approx(
        (2 * here, 2 * owned, 12 * owned, 4 * owned), rel=2e-3
    )  # but for the alignment


def test_states_of_zero_1_keep_whole_gradients_beside_those_of_the_partition() -> None:
    one, two = (
        states_of_config(small_config(), layout(world_size=2, zero_stage=stage)) for stage in (1, 2)
    )
    assert one.gradients == one.weights + two.gradients
    assert (one.weights, one.optimizer, one.ema) == (two.weights, two.optimizer, two.ema)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(
    "sections", [{}, {"ema_decays": [0.999, 0.9999], "ema_sigma_rels": [0.05]}]
)
def test_states_of_plan_and_dry_run_agree(stage: int, sections: dict) -> None:
    run = config(optimizer=sections)
    dry = states_of_config(run, layout(zero_stage=stage))
    memory = planned(run, zero_stage=stage).memory
    assert (memory["weights"], memory["optimizer"], memory["ema"]) == pytest.approx(
        (dry.weights, dry.optimizer, dry.ema), rel=1e-3
    )


def test_states_of_an_offloaded_optimizer_are_on_the_host() -> None:
    run, batches = config(), plan_batches(config(), 4)
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000}
    values = {"zero_optimization": zero}
    offloaded = layout_of(batches, resolve_deepspeed(values, run, batches, source="test"))
    here, there = (
        plan_step(run, one, cluster()) for one in (replace(offloaded, offload=False), offloaded)
    )
    moved = here.memory["optimizer"] + here.memory["ema"]
    assert (there.memory["optimizer"], there.memory["ema"], here.host) == (0, 0, 0)
    assert (
        there.host == moved + here.memory["ema"]
    )  # the update's fp32 gradients, as many as one average
    kept = there.memory["gradients"] - here.memory["gradients"]  # whole ones, by DeepSpeed
    assert here.total_memory - there.total_memory >= moved - kept
    assert there.seconds["update"] > here.seconds["update"]
    assert len(plan_lines(there)) == len(plan_lines(here)) + 1
    dry = states_of_config(run, offloaded)
    assert (dry.host, dry.device) == (dry.optimizer + dry.ema, dry.weights + dry.gradients)


# Links and time.


def test_ring_crosses_the_border_of_a_node_once_for_all_its_ranks() -> None:
    two_nodes = cluster(nodes=2)
    assert _ring(800, 4, 1, cluster()) == Link(600, 0)
    assert _ring(800, 8, 1, two_nodes) == Link(700 - 175, 175)
    assert _ring(800, 2, 4, two_nodes) == Link(0, 400)  # one rank a node
    assert _ring(800, 1, 1, cluster()) == Link(0, 0)


def test_exchange_inside_a_node_stays_there_and_across_nodes_does_not() -> None:
    run = config(parallel={"ep_size": 4})
    inside, across = (
        planned(run, on).traffic["exchange"]
        for on in (cluster(), cluster(nodes=2, gpus_per_node=2))
    )
    assert inside.between_nodes == 0
    assert across.inside_node + across.between_nodes == inside.inside_node
    assert across.between_nodes == 2 * across.inside_node  # one neighbour here, two there


def test_exchange_of_spread_expert_groups_is_between_nodes() -> None:
    near, far = (
        planned(on=cluster(nodes=2, gpus_per_node=2), data_before_expert=spread).traffic
        for spread in (False, True)
    )
    assert near["exchange"].between_nodes == 0 < near["exchange"].inside_node
    assert far["exchange"] == Link(0, near["exchange"].inside_node)
    assert far["gradients"].between_nodes < near["gradients"].between_nodes


def test_predicted_time_follows_the_device() -> None:
    plan, slow = (planned(on=cluster(flops={"fp32": rate})) for rate in (1e9, 0.5e9))
    assert slow.seconds["matrix"] == pytest.approx(2 * plan.seconds["matrix"], rel=0.01)
    perfect = plan_step(config(), layout(), cluster(), efficiency=Efficiency(1.0, 1.0, 1.0, 1.0))
    assert 0 < perfect.mfu < 1 and perfect.flops == 16 * training_flops_per_image(config())
    assert perfect.images_per_second == pytest.approx(16 / perfect.total_seconds)
