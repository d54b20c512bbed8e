"""The planner: what a trace counts, how ZeRO cuts, what travels where, what fits; by hand-made
sums.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.backends.devices import DEVICES, bf16_peak
from promoe_ds.cli.plan import main
from promoe_ds.config import (
    RunConfig,
    count_parameters,
    load_config,
    plan_batches,
    resolve_deepspeed,
    training_flops_per_image,
)
from promoe_ds.errors import ConfigError
from promoe_ds.planning.cluster import Cluster, ClusterLayout, layout_of
from promoe_ds.planning.estimate import Efficiency, Link, _ring
from promoe_ds.planning.planner import RESERVE, StepPlan, plan_lines, plan_step
from promoe_ds.planning.search import _estimate, best_layout, choice_lines
from promoe_ds.planning.shapes import PassShapes, fake_world, trace_pass
from promoe_ds.planning.trace import ShapeTrace
from promoe_ds.planning.zero import States, states_of_config, states_of_groups

from ..builders import METHODS, of_method, small_config

H100 = DEVICES["h100"]


@pytest.fixture(autouse=True)
def _ranks_that_do_not_exist(request: pytest.FixtureRequest) -> Iterator[None]:
    with fake_world(getattr(request, "param", 4)):
        yield


def cluster(nodes: int = 1, gpus_per_node: int = 4, **device: Any) -> Cluster:
    return Cluster(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        device=replace(H100, **device),
        network_bandwidth=50e9,
    )


def layout(**fields: Any) -> ClusterLayout:
    return ClusterLayout(
        **{
            "world_size": 4,
            "micro_batch": 4,
            "zero_stage": 2,
            "precision": "fp32",
            "bucket": 1000,
            "overlap": False,
            **fields,
        }
    )


def config(**sections: dict) -> RunConfig:
    return small_config(
        **{"model": {"hidden_size": 32, "depth": 4}, "parallel": {"ep_size": 2}, **sections}
    )


def planned(run: RunConfig | None = None, on: Cluster | None = None, **fields: Any) -> StepPlan:
    return plan_step(run or config(), layout(**fields), on or cluster())


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
    assert trace.work["matrix"] == [(2 * 8 * 16 * 32, 4 * (8 * 16 + 16 * 32 + 8 * 32))]
    assert len(trace.work["other"]) == 1


# One pass of the network.


def sent(shapes: PassShapes) -> int:
    return shapes.trace.rows_sent(0)


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
    assert sent(shapes) == crossings * 32 * 4 * shapes.rows_leaving


@pytest.mark.parametrize("_ranks_that_do_not_exist", [2], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_pass_of_every_method_sends_the_rows_that_it_lists(method: str) -> None:
    run = small_config(**{**of_method(method), "parallel": {"ep_size": 2}})
    shapes = trace_pass(run, layout(world_size=2))
    assert sent(shapes) == 4 * run.model.hidden_size * 4 * shapes.rows_leaving > 0


def test_pass_work_is_the_accounted_one() -> None:
    run = config(parallel={"expert_backend": "loop"}, routing={"rcl_weight": 0.0})
    work = trace_pass(run, layout(world_size=1)).trace.work
    images, width, tokens = 4, 32, run.model.tokens_per_image
    # Accounted: three forward passes. Fused attention makes its scores anew; raw pixels, labels and
    # times need no gradient.
    again = 4 * 2 * images * tokens * tokens * width
    flops = sum(flops for kind in ("matrix", "attention") for flops, _ in work[kind])
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
    with pytest.raises(ConfigError, match=r"precision\.compute=fp8 .* auto or fp32 or bf16"):
        trace_pass(config(), layout())


# States under ZeRO.


def held(run: RunConfig) -> tuple[int, int]:
    count = count_parameters(run)
    return count.dense + count.unconditional, count.routed


def numbers(states: States) -> tuple[int, ...]:
    return states.weights, states.gradients, states.optimizer, states.ema


def test_states_of_a_partition_hold_gradients_of_whole_parameters_that_it_touches() -> None:
    # 64 elements, sixteen a rank; the middle parameter is touched by all, the first by one.
    exact = states_of_groups([([10, 50, 4], 4)], layout(), 1)
    assert numbers(exact) == (4 * 64, 4 * 60, 12 * 16, 4 * 16)
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
    dry, memory = (
        states_of_config(run, layout(zero_stage=stage)),
        planned(run, zero_stage=stage).memory,
    )
    assert len(run.optimizer.averages) == (3 if sections else 1)
    for kind in ("weights", "optimizer", "ema"):
        assert memory[kind] == pytest.approx(getattr(dry, kind), rel=1e-3), kind


def test_states_of_an_offloaded_optimizer_are_on_the_host() -> None:
    run, values = (
        config(),
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    )
    batches = plan_batches(run, 4)
    offloaded = layout_of(batches, resolve_deepspeed(values, run, batches, source="test"))
    here, there = (
        plan_step(run, one, cluster()) for one in (replace(offloaded, offload=False), offloaded)
    )
    moved = here.memory["optimizer"] + here.memory["ema"]
    assert (there.memory["optimizer"], there.memory["ema"], here.host) == (0, 0, 0)
    assert (
        there.host == moved + here.memory["ema"]
    )  # the update's fp32 gradients, as many as one average
    assert here.total_memory - there.total_memory >= moved
    assert there.seconds["update"] > here.seconds["update"]
    assert len(plan_lines(there)) == len(plan_lines(here)) + 1
    dry = states_of_config(run, offloaded)
    assert (dry.host, dry.device) == (dry.optimizer + dry.ema, dry.weights + dry.gradients)


def test_plan_parameters_of_a_rank_are_its_share() -> None:
    run, plan = config(), planned()
    dense, routed = held(run)
    assert (plan.parameters_per_rank, plan.flops) == (
        dense + routed // 2,
        16 * training_flops_per_image(run),
    )


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
    assert 0 < perfect.mfu < 1
    assert perfect.images_per_second == pytest.approx(16 / perfect.total_seconds)


# The search.


def test_search_estimate_of_a_deep_network_is_that_of_its_full_trace() -> None:
    run = config(model={"hidden_size": 32, "depth": 12})
    plan = planned(run, micro_batch=64)
    estimate = _estimate(run, layout(micro_batch=64), cluster())
    assert estimate == pytest.approx((plan.total_memory, plan.total_seconds), rel=0.02)


def searched(images: int = 64, **device: float) -> tuple[StepPlan, list]:
    run = config(model={"hidden_size": 32, "depth": 2}, train={"global_batch_size": images})
    return best_layout(run, layout(), cluster(**device))


def test_search_takes_the_largest_micro_batch_that_fits() -> None:
    roomy, _ = searched()
    tight, tried = searched(memory=0.8 * roomy.total_memory)
    assert roomy.layout.micro_batch == tight.layout.micro_batch * tight.layout.accumulation == 16
    assert tight.fits and tight.total_memory < roomy.total_memory
    assert [choice.seconds for choice in tried] == sorted(choice.seconds for choice in tried)
    capacity = (1 - RESERVE) * tight.cluster.device.memory
    assert {choice.fits for choice in tried} == {True, False}
    assert all(choice.fits == (choice.bytes <= capacity) for choice in tried)
    assert len(choice_lines(tried, limit=3)) == 4


def test_search_where_nothing_fits_names_the_smallest_need() -> None:
    with pytest.raises(ConfigError, match=r"smallest need is .* GB \(ep_size=4"):
        searched(images=4, memory=1000.0)


# Bad input, and the tool.


def test_peak_of_a_device_is_found_by_its_drivers_name() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H200 NVL": "h200-nvl",
    }
    assert {name: bf16_peak(name) for name in names} == {
        name: DEVICES[key].flops["bf16"] for name, key in names.items()
    }
    assert bf16_peak("Tesla T4") is None


def test_cluster_without_nodes_is_refused() -> None:
    with pytest.raises(ConfigError, match="--nodes 0"):
        cluster(nodes=0)


@pytest.fixture
def tool():
    torch.distributed.destroy_process_group()  # it makes its own world
    yield main
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )


def test_tool_prints_tables_and_writes_json(
    tool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    size = [
        "train.global_batch_size=8",
        "model.preset=null",
        "model.hidden_size=64",
        "model.num_heads=2",
        "model.depth=2",
    ]
    tool(
        [
            "--recipe",
            "promoe_s",
            "--gpus-per-node",
            "4",
            "--gpu",
            "H200",
            "--out",
            str(tmp_path / "plan.json"),
            "--set",
            *size,
        ]
    )
    plans = json.loads((tmp_path / "plan.json").read_text())
    assert (
        plans["recipe"]["parameters"]["total"]
        == count_parameters(load_config("promoe_s", size)).total
    )
    assert plans["recipe"]["cluster"]["device"]["name"] == "h200"
    kinds = plans["best"]["memory_bytes"]
    names = ("weights", "gradients", "optimizer", "ema", "activations", "exchange", "buckets")
    assert kinds["total"] == sum(kinds[name] for name in names)
    estimate = min(choice["seconds"] for choice in plans["tried"])
    assert plans["best"]["predicted"]["seconds"]["total"] == pytest.approx(estimate, rel=0.02)
    assert "fits" in capsys.readouterr().out


def test_tool_names_what_it_cannot_plan(tool, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=256 .* 21 "):
        tool(["--recipe", "promoe_s", "--nodes", "3", "--gpus-per-node", "7"])
    for option, name in (("--gpu", "h10"), ("--network", "infiniband")):
        with pytest.raises(SystemExit) as stop:
            tool(["--recipe", "promoe_s", option, name])
        assert stop.value.code == 2
        assert f"{option}: invalid choice: '{name}'" in capsys.readouterr().err
