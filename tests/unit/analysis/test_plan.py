"""The planner: what a trace counts, how ZeRO cuts, what travels where, what fits; against sums made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from promoe_ds.analysis.plan import Cluster, Layout, best_layout, fake_world, layout_of, plan_step
from promoe_ds.analysis.plan.planner import RESERVE
from promoe_ds.analysis.plan.report import choice_lines, plan_lines
from promoe_ds.analysis.plan.search import _estimate
from promoe_ds.analysis.plan.shapes import trace_pass
from promoe_ds.analysis.plan.speed import Efficiency
from promoe_ds.analysis.plan.states import _cut, rank_states
from promoe_ds.analysis.plan.trace import ShapeTrace
from promoe_ds.analysis.plan.traffic import Link, _ring
from promoe_ds.config import (
    RunConfig,
    count_parameters,
    load_config,
    plan_batches,
    plan_memory,
    resolve_deepspeed,
    training_flops_per_image,
)
from promoe_ds.config.devices import DEVICES, bf16_peak, find_device, find_network
from promoe_ds.errors import ConfigError

from ...processes import REPOSITORY, environment, run
from ..builders import METHODS, of_method, small_config

H100 = DEVICES["h100"]


def cluster(nodes: int = 1, gpus_per_node: int = 4, **device: float) -> Cluster:
    return Cluster(nodes=nodes, gpus_per_node=gpus_per_node, device=replace(H100, **device), network_bandwidth=50e9)


def layout(**fields: object) -> Layout:
    return Layout(**{"world_size": 4, "micro_batch": 4, "accumulation": 1, "zero_stage": 2, "precision": "fp32",
                     "bucket": 1000, "overlap": False, **fields})


def config(**sections: dict) -> RunConfig:
    return small_config(**{"model": {"hidden_size": 32, "depth": 4}, "parallel": {"ep_size": 2}, **sections})


# What a trace counts.


def traced(function, *inputs: Tensor) -> ShapeTrace:
    trace = ShapeTrace(null_samples=0, known=inputs)
    with trace:
        function(*inputs)
    return trace


def test_trace_peak_is_what_is_live_at_once() -> None:
    def function(x: Tensor) -> None:
        doubled = x * 2      # one live
        summed = doubled + 1  # two
        del doubled
        view = summed.view(10, 100)
        view.add_(1)          # views and in-place work take nothing
        _ = summed * 3        # two

    trace = traced(function, torch.zeros(1000))
    assert dict(trace.peak) == {"activations": 2 * 4000}
    assert trace.live["activations"] == 0


def test_trace_counts_saved_tensors_until_the_backward_pass_ends() -> None:
    weight = torch.ones(1000, requires_grad=True)

    def function(weight: Tensor) -> None:
        loss = (weight * 2).exp().sum()  # the doubled one and its exponential; the first may go
        loss.backward()

    trace = traced(function, weight)
    assert 2 * 4000 <= sum(trace.peak.values()) <= 3 * 4000 + 64
    assert trace.live["activations"] == 4000  # the gradient


def test_trace_counts_products_and_ignores_views() -> None:
    trace = traced(lambda a, b: (a @ b).t().relu(), torch.zeros(8, 16), torch.zeros(16, 32))
    assert trace.work["matrix"].calls == [(2 * 8 * 16 * 32, 4 * (8 * 16 + 16 * 32 + 8 * 32))]
    assert len(trace.work["other"].calls) == 1


# One pass of the network.


@pytest.mark.parametrize(("checkpointing", "crossings"), [("none", 4), ("full", 6)])
@pytest.mark.parametrize("top_k", [1, 2])
def test_pass_sends_rows_once_a_crossing_and_again_where_recomputed(checkpointing: str, crossings: int, top_k: int) -> None:
    run = config(routing={"top_k": top_k}, parallel={"ep_size": 2, "activation_checkpointing": checkpointing})
    with fake_world(4):
        shapes = trace_pass(run, layout())
    rows = 4 * run.model.tokens_per_image * top_k
    assert shapes.rows_leaving == 2 * rows // 2  # two layers, half of the rows
    assert shapes.exchange_bytes == crossings * 32 * 4 * shapes.rows_leaving


@pytest.mark.parametrize("method", METHODS)
def test_pass_of_every_method_sends_the_rows_that_it_lists(method: str) -> None:
    run = small_config(**{**of_method(method), "parallel": {"ep_size": 2}})
    with fake_world(2):
        shapes = trace_pass(run, layout(world_size=2))
    assert shapes.exchange_bytes == 4 * run.model.hidden_size * 4 * shapes.rows_leaving > 0


def test_pass_work_is_the_accounted_one() -> None:
    run = config(parallel={"expert_backend": "loop"}, routing={"rcl_weight": 0.0})
    with fake_world(1):
        shapes = trace_pass(run, layout(world_size=1))
    images, width, tokens = 4, 32, run.model.tokens_per_image
    work = shapes.work["matrix"].flops + shapes.work["attention"].flops
    # Accounted: three forward passes. Fused attention makes its scores anew; raw pixels, labels and times need no gradient.
    again = 4 * 2 * images * tokens * tokens * width
    assert work == pytest.approx(images * training_flops_per_image(run) + again, rel=0.02)


def test_pass_holds_activations_in_proportion_to_the_batch_and_less_when_recomputed() -> None:
    with fake_world(4):
        def activations(micro: int, mode: str = "none") -> int:
            run = config(parallel={"ep_size": 2, "activation_checkpointing": mode})
            return trace_pass(run, layout(micro_batch=micro)).peak["activations"]

        sizes = [activations(n) for n in (64, 128, 192)]
        recomputed = activations(192, "full")
    # Nearly: which operation is the fullest moment may change with the size.
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.05)
    assert recomputed < 0.7 * sizes[2]


# States under ZeRO.


def test_states_partition_copies_whole_parameters_that_it_touches() -> None:
    part = _cut([10, 50, 4], 4)  # 64 of 64: sixteen a rank; the middle one is touched by all, the first by one
    assert (part.padded, part.owned) == (64, 16)
    assert part.copied == 60
    assert _cut([10, 50, 3], 4).padded == 64


@pytest.mark.parametrize("stage", [0, 2])
def test_states_of_one_rank_hold_everything(stage: int) -> None:
    network = nn.Linear(10, 10)
    states = rank_states(config(), network, layout(world_size=1, zero_stage=stage))
    assert (states.weights, states.gradients, states.ema) == (440, 440, 440)
    assert states.optimizer == (12 if stage else 8) * 110


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("sections", [{}, {"ema_decays": [0.999, 0.9999], "ema_sigma_rels": [0.05]}])
def test_plan_and_dry_run_agree_on_states(stage: int, sections: dict) -> None:
    run = config(optimizer=sections)
    dry = plan_memory(run, world_size=4, zero_stage=stage, precision="fp32")
    with fake_world(4):
        memory = plan_step(run, layout(zero_stage=stage), cluster()).memory
    assert len(run.optimizer.averages) == (3 if sections else 1)
    for kind in ("weights", "optimizer", "ema"):
        assert getattr(memory, kind) == pytest.approx(getattr(dry, kind), rel=1e-3), kind  # but for DeepSpeed's alignment


def test_plan_of_an_offloaded_optimizer_holds_it_on_the_host() -> None:
    run = config()
    values = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    batches = plan_batches(run, 4)
    deepspeed = resolve_deepspeed(values, run, batches, source="test")
    offloaded = layout_of(batches, deepspeed)
    with fake_world(4):
        here, there = (plan_step(run, one, cluster()) for one in (replace(offloaded, offload=False), offloaded))
    assert (there.memory.optimizer, there.memory.ema) == (0, 0)
    owned = here.memory.ema // 4
    assert there.memory.host == here.memory.optimizer + here.memory.ema + 4 * owned
    assert here.memory.total - there.memory.total >= here.memory.optimizer + here.memory.ema
    assert there.time.update > here.time.update
    assert any("in host memory" in line for line in plan_lines(there)) and not any("host" in line for line in plan_lines(here))
    dry = plan_memory(run, world_size=4, zero_stage=2, precision="fp32", offload=deepspeed.offloads)
    assert (dry.host, dry.device) == (dry.optimizer + dry.ema, dry.weights + dry.gradients)


def test_plan_of_spread_expert_groups_exchanges_between_nodes() -> None:
    run = config(parallel={"ep_size": 2})
    spread = layout(data_before_expert=True)
    with fake_world(4):
        near, far = (plan_step(run, one, cluster(nodes=2, gpus_per_node=2)).traffic for one in (layout(), spread))
    assert near["exchange"].between_nodes == 0 < near["exchange"].inside_node
    assert far["exchange"] == Link(0, near["exchange"].inside_node)
    assert far["gradients"].between_nodes < near["gradients"].between_nodes


def test_plan_parameters_of_a_rank_are_its_share() -> None:
    run = config()
    count = count_parameters(run)
    with fake_world(4):
        plan = plan_step(run, layout(), cluster())
    assert plan.parameters_per_rank == count.dense + count.unconditional + count.routed // 2
    assert plan.flops == 16 * training_flops_per_image(run)


# Links and time.


def test_ring_crosses_the_border_of_a_node_once_for_all_its_ranks() -> None:
    two_nodes = cluster(nodes=2)
    assert _ring(800, 4, 1, cluster()) == Link(600, 0)
    assert _ring(800, 8, 1, two_nodes) == Link(700 - 175, 175)
    assert _ring(800, 2, 4, two_nodes) == Link(0, 400)  # one rank a node
    assert _ring(800, 1, 1, cluster()) == Link(0, 0)


def test_exchange_inside_a_node_stays_there_and_across_nodes_does_not() -> None:
    run = config(parallel={"ep_size": 4})
    with fake_world(4):
        inside = plan_step(run, layout(), cluster()).traffic["exchange"]
        across = plan_step(run, layout(), cluster(nodes=2, gpus_per_node=2)).traffic["exchange"]
    assert inside.between_nodes == 0
    assert across.inside_node + across.between_nodes == inside.inside_node
    assert across.between_nodes == 2 * across.inside_node  # one neighbour here, two there


def test_predicted_time_follows_the_device() -> None:
    with fake_world(4):
        plan, slow = (plan_step(config(), layout(), cluster(flops={"fp32": rate, "bf16": rate})) for rate in (1e9, 0.5e9))
        perfect = plan_step(config(), layout(), cluster(), efficiency=Efficiency(1.0, 1.0, 1.0, 1.0))
    assert slow.time.matrix == pytest.approx(2 * plan.time.matrix, rel=0.01)
    assert 0 < perfect.mfu < 1
    assert perfect.images_per_second == pytest.approx(16 / perfect.time.total)


# The search.


def test_search_estimate_of_a_deep_network_is_that_of_its_full_trace() -> None:
    run = small_config(model={"hidden_size": 32, "depth": 12}, parallel={"ep_size": 2})
    with fake_world(4):
        plan = plan_step(run, layout(micro_batch=64), cluster())
        needed, seconds = _estimate(run, layout(micro_batch=64), cluster())
    assert needed == pytest.approx(plan.memory.total, rel=0.02)
    assert seconds == pytest.approx(plan.time.total, rel=0.02)


def searchable() -> RunConfig:
    return config(model={"hidden_size": 32, "depth": 2}, train={"global_batch_size": 128})


def test_search_takes_the_largest_micro_batch_that_fits() -> None:
    with fake_world(4):
        roomy, _ = best_layout(searchable(), layout(), cluster())
        tight, tried = best_layout(searchable(), layout(), cluster(memory=0.6 * roomy.memory.total))
    assert roomy.layout.micro_batch == 32
    assert tight.fits
    assert tight.memory.total < roomy.memory.total
    assert tight.layout.micro_batch * tight.layout.accumulation == 32
    assert [choice.seconds for choice in tried] == sorted(choice.seconds for choice in tried)
    assert {choice.fits for choice in tried} == {True, False}
    marked = [line.endswith("does not fit") for line in choice_lines(tried, limit=len(tried))[1:]]
    assert marked == [choice.bytes > (1 - RESERVE) * tight.cluster.device.memory for choice in tried]


def test_plan_of_what_shapes_cannot_follow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values = config().model_dump(mode="json") | {"precision": {"compute": "fp8"}}
    monkeypatch.setattr(RunConfig, "model_dump", lambda self, **options: values)
    with fake_world(4), pytest.raises(ConfigError, match=r"precision.compute=fp8 cannot be planned, only auto or fp32 or bf16"):
        trace_pass(config(), layout())


def test_search_where_nothing_fits_names_the_smallest_need() -> None:
    with fake_world(4), pytest.raises(ConfigError, match=r"no layout fits.*smallest need is .* GB \(ep_size=4"):
        best_layout(searchable(), layout(), cluster(memory=1000.0))


# Bad input, and the tool.


def test_devices_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="--gpu h10: not in the table; did you mean h100"):
        find_device("h10")
    with pytest.raises(ConfigError, match=r"--network infiniband: .*known are ib-ndr400"):
        find_network("infiniband")
    assert find_device("H200").memory > H100.memory
    assert bf16_peak("NVIDIA H100 80GB HBM3") == H100.flops["bf16"]
    assert bf16_peak("NVIDIA H100 PCIe") == DEVICES["h100-pcie"].flops["bf16"] < H100.flops["bf16"]
    assert bf16_peak("NVIDIA H200 NVL") == DEVICES["h200-nvl"].flops["bf16"] < bf16_peak("NVIDIA H200")
    assert bf16_peak("Tesla T4") is None


def test_cluster_without_nodes_is_refused() -> None:
    with pytest.raises(ConfigError, match="--nodes 0: must be at least 1"):
        cluster(nodes=0)


def run_tool(*arguments: str) -> subprocess.CompletedProcess:
    return run([sys.executable, str(REPOSITORY / "tools" / "plan.py"), *arguments], cwd=REPOSITORY, env=environment(), timeout=500)


def test_tool_prints_tables_and_writes_json(tmp_path: Path) -> None:
    done = run_tool("--recipe", "promoe_s", "--gpus-per-node", "4", "--set", "train.global_batch_size=64", "--out",
                    str(tmp_path / "plan.json"))
    assert done.returncode == 0, done.stderr
    plans = json.loads((tmp_path / "plan.json").read_text())
    assert plans["recipe"]["parameters"]["total"] == count_parameters(load_config("promoe_s")).total
    kinds = plans["best"]["memory_bytes"]
    names = ("weights", "gradients", "optimizer", "ema", "activations", "exchange", "buckets")
    assert kinds["total"] == sum(kinds[name] for name in names)
    estimate = min(choice["seconds"] for choice in plans["tried"])
    assert plans["best"]["predicted"]["seconds"]["total"] == pytest.approx(estimate, rel=0.02)
    assert "fits" in done.stdout


def test_tool_with_ranks_that_do_not_divide_the_batch_says_what_to_change() -> None:
    done = run_tool("--recipe", "promoe_s", "--nodes", "3", "--gpus-per-node", "7")
    assert done.returncode == 2
    assert "train.global_batch_size=256 cannot be cut into 21 equal shares" in done.stderr


