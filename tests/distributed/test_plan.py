"""The planner against real ranks, and the large recipes on as many ranks as they are for, none of
which exist.
"""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.memory import ZERO_2, Comparison, compare_with_measurement, largest, measure_ranks
from promoe_ds.config import count_parameters, load_config

from ..processes import REPOSITORY, environment, run

#: promoe_s takes hundreds of megabytes on each of four ranks, so that the libraries' own tens do
# not decide.
COMMON = ("data.dataset=synthetic", "data.synthetic_samples=16", "train.global_batch_size=4")


@pytest.fixture(
    scope="module",
    params=[*(pytest.param(ranks, marks=pytest.mark.combinations) for ranks in (1, 2)), 4],
)
def comparison(request: pytest.FixtureRequest) -> Comparison:
    config = load_config("promoe_s", [*COMMON, f"parallel.ep_size={request.param}"])
    return compare_with_measurement(config, ZERO_2, request.param)


def test_plan_memory_and_exchange_are_those_of_real_ranks(comparison: Comparison) -> None:
    assert comparison.memory_ratio == pytest.approx(1.0, abs=0.1)
    assert comparison.measured_exchange == comparison.planned_exchange
    assert (comparison.measured_exchange > 0) == (len(comparison.ranks) > 1)


@pytest.mark.combinations
def test_memory_of_four_ranks_is_under_half_of_plain_data_parallelism(
    comparison: Comparison,
) -> None:
    if len(comparison.ranks) < 4:
        pytest.skip("the claim is about experts over four ranks")
    plain = measure_ranks(load_config("promoe_s", COMMON), 4, zero=None)
    assert largest(comparison.ranks) <= 0.45 * largest(plain)


LARGE = """
import json, sys
from promoe_ds.config import load_config, plan_batches, resolve_deepspeed
from promoe_ds.backends.devices import DEVICES
from promoe_ds.planning.cluster import Cluster, layout_of
from promoe_ds.planning.planner import plan_step
from promoe_ds.planning.shapes import fake_world
import deepspeed, torch.distributed as dist
from deepspeed.ops import __compatible_ops__
from deepspeed.utils import groups
from promoe_ds.backends.deepspeed_private import make_expert_groups

world, found = int(sys.argv[1]), {}
cluster = Cluster(nodes=world // 8, gpus_per_node=8, device=DEVICES["h100"], network_bandwidth=50e9)
with fake_world(world):
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
    for name in sys.argv[2:]:
        config = load_config(name)
        group = make_expert_groups(config.parallel.ep_size, 60)
        batches = plan_batches(config, world)
        zero = {"stage": 2, "overlap_comm": True}
        values = {"zero_optimization": zero, "bf16": {"enabled": True}}
        layout = layout_of(batches, resolve_deepspeed(values, config, batches, source="test"))
        plan = plan_step(config, layout, cluster)
        replicas = groups._get_expert_data_parallel_group(f"ep_size_{config.parallel.ep_size}")
        found[name] = {**plan.as_json(), "experts_on": dist.get_process_group_ranks(group),
                       "replicas_on": dist.get_process_group_ranks(replicas)}
json.dump(found, sys.stdout)
"""


@pytest.mark.parametrize(
    ("world_size", "recipes"),
    [
        (512, ("promoe_45b", "promoe_16b", "promoe_t2i_8b")),
        pytest.param(
            128, ("promoe_8b", "promoe_3b", "promoe_t2i_3b"), marks=pytest.mark.combinations
        ),
    ],
)
def test_large_recipe_on_ranks_that_do_not_exist_has_its_groups_bytes_and_memory(
    world_size: int, recipes: tuple[str, ...]
) -> None:
    done = run(
        [sys.executable, "-c", LARGE, str(world_size), *recipes],
        cwd=REPOSITORY,
        env=environment(),
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index('{"promoe') :])
    for name in recipes:
        config, plan = load_config(name), found[name]
        model, ep_size, count = config.model, config.parallel.ep_size, count_parameters(config)
        assert plan["experts_on"] == list(range(ep_size))
        assert plan["replicas_on"] == list(range(0, world_size, ep_size))
        assert (
            plan["parameters"]["per_rank"]
            == count.dense + count.unconditional + count.routed // ep_size
        )
        assert plan["memory_bytes"]["fits"]
        layout = plan["layout"]
        images = layout["micro_batch"] * layout["accumulation"]
        assert images * world_size == config.train.global_batch_size
        # Rows of seven in eight experts, bf16, out and back, forward and backward, twice more where
        # recomputed; counts beside.
        rows = images * model.tokens_per_image * (ep_size - 1) // ep_size
        crossings = 6 if config.parallel.activation_checkpointing == "full" else 4
        expected = len(config.moe_block_indices) * rows * crossings * model.hidden_size * 2
        exchange = plan["bytes_sent_per_rank_and_step"]["exchange"]
        assert exchange["between_nodes"] == 0
        assert exchange["inside_node"] == pytest.approx(expected, rel=1e-3)
