"""Sharded experts: which ones a rank keeps, how DeepSpeed recognises them, and their names in a
checkpoint.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from deepspeed.moe.layer import MoE

from promoe_ds.backends.expert_parallel import ShardedExperts, expert_file_key, mark_experts
from promoe_ds.config.parallel import ResolvedDispatch
from promoe_ds.moe import DISPATCHERS, StackedExperts
from promoe_ds.moe.experts import EXPERT_PARAMETERS

from ..builders import random_tensor, randomise

WIDTH, HIDDEN = 8, 16

every_type = pytest.mark.parametrize("expert_type", EXPERT_PARAMETERS)


def whole(expert_type: str) -> StackedExperts:
    return randomise(StackedExperts(4, WIDTH, HIDDEN, expert_type=expert_type))


def shards(expert_type: str, ep_size: int) -> list[ShardedExperts]:
    """Shard experts on the meta device and fill each rank's with its own of `whole`."""
    with torch.device("meta"):
        full = StackedExperts(4, WIDTH, HIDDEN, expert_type=expert_type)
    result = [
        ShardedExperts(full, ep_size=ep_size, ep_rank=rank).to_empty(device="cpu")
        for rank in range(ep_size)
    ]
    for shard in result:
        first = shard.first_expert
        for name, value in whole(expert_type).named_parameters():
            getattr(shard, name).data.copy_(value[first : first + shard.num_local_experts])
    return result


@every_type
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_shards_together_are_the_whole(expert_type: str, ep_size: int) -> None:
    parts, full = shards(expert_type, ep_size), whole(expert_type)
    assert [part.first_expert for part in parts] == [rank * 4 // ep_size for rank in range(ep_size)]
    rows, counts = random_tensor(10, WIDTH), torch.tensor([4, 0, 5, 1])
    results = []
    for part in parts:
        here = slice(part.first_expert, part.first_expert + part.num_local_experts)
        start, length = int(counts[: here.start].sum()), int(counts[here].sum())
        results.append(part(rows[start : start + length], counts[here]))
    # Grouped products of fewer experts may add in another order.
    torch.testing.assert_close(torch.cat(results), full(rows, counts), rtol=1e-5, atol=1e-6)


@every_type
def test_shard_is_recognised_by_deepspeed(expert_type: str) -> None:
    shard = shards(expert_type, 2)[1]
    mark_experts(torch.nn.ModuleList([shard]))  # materialising replaced the parameters
    assert isinstance(shard, MoE)
    assert [name for name, _ in shard.named_parameters()] == list(EXPERT_PARAMETERS[expert_type])
    assert all(
        (parameter.allreduce, parameter.group_name) == (False, "ep_size_2")
        for parameter in shard.parameters()
    )


@every_type
def test_shard_state_has_a_key_per_expert_and_is_restored(expert_type: str) -> None:
    first, second = shards(expert_type, 2)
    state = second.state_dict()
    assert set(state) == {
        f"deepspeed_moe.experts.deepspeed_experts.{expert}.{name}"
        for expert in (0, 1)
        for name in EXPERT_PARAMETERS[expert_type]
    }
    assert (
        expert_file_key("blocks.1.moe.routed.up_weight", 1)
        == "blocks.1.moe.routed.deepspeed_moe.experts.deepspeed_experts.1.up_weight"
    )
    first.load_state_dict(state)
    assert all(
        torch.equal(getattr(first, name), value) for name, value in second.named_parameters()
    )


def test_every_dispatch_of_the_config_has_a_path() -> None:
    assert set(DISPATCHERS) == set(get_args(ResolvedDispatch)) - {"local"}
