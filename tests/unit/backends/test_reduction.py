"""Gradients of a pass end in flat sums: joined or where they are, over passes, with gaps zero."""

from __future__ import annotations

from types import SimpleNamespace

import deepspeed.comm
import pytest
import torch
import torch.distributed as dist
from torch import nn

from promoe_ds.backends.reduction_private import GradientReducer
from promoe_ds.errors import ConfigError

BUCKET = 40
SIZES = (3, 30, 5, 7)
PARTITION = 50


class _Mapping:
    """Where this rank's part of a parameter is: all of it, at `start` of the flat tensor."""

    def __init__(self, start: int, numel: int) -> None:
        self.lp_fragment_address = SimpleNamespace(start=0, numel=numel)
        self._there = SimpleNamespace(start=start, numel=numel)

    def get_hp_fragment_address(self) -> SimpleNamespace:
        return self._there


def zero_optimizer(**changes) -> SimpleNamespace:
    """Return what the reducer takes of ZeRO; the third parameter belongs to another rank."""
    parameters, start = [nn.Parameter(torch.zeros(size)) for size in SIZES], 0
    for index, parameter in enumerate(parameters):
        parameter._hp_mapping = None if index == 2 else _Mapping(start, parameter.numel())
        start += 0 if index == 2 else parameter.numel() + 1  # a gap of one
    values = {
        "_grad_acc_hooks": [],
        "averaged_gradients": {},
        "bit16_groups": [parameters],
        "communication_data_type": torch.float32,
        "device": "cpu",
        "dp_process_group": "all",
        "gradient_accumulation_dtype": torch.float32,
        "independent_gradient_partition_epilogue": None,
        "is_gradient_accumulation_boundary": lambda: True,
        "optimizer": SimpleNamespace(state={}),
        "overlap_comm": False,
        "partition_gradients": True,
        "partition_size": [PARTITION],
        "process_gradients": None,
        "real_dp_process_group": ["all"],
        "reduce_bucket_size": BUCKET,
        "reduce_ready_partitions_and_remove_grads": None,
        "single_partition_of_fp32_groups": [torch.zeros(PARTITION)],
    }
    return SimpleNamespace(**values | changes)


def make_gradients(zero: SimpleNamespace, used: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    """Give the used parameters gradients of 1, 2, 3, 4, the last one first."""
    for index in reversed(used):
        (zero.bit16_groups[0][index] * (index + 1.0)).sum().backward()


def expected(*values: float) -> torch.Tensor:
    flat = torch.zeros(PARTITION)
    for (start, end), value in zip(((0, 3), (4, 34), (35, 42)), values, strict=True):
        flat[start:end] = value
    return flat


@pytest.fixture
def ranks(monkeypatch) -> SimpleNamespace:
    """Be one of ranks with equal gradients; `sent` has the numbers of each sum over them."""
    ranks = SimpleNamespace(count=2, sent=[], seen=[])

    def all_reduce(bucket, **unused):
        ranks.sent.append(bucket.numel())
        bucket.mul_(ranks.count)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "get_world_size", lambda group=None: ranks.count)
    monkeypatch.setattr(deepspeed.comm, "all_reduce", all_reduce)
    return ranks


def reducer_of(zero: SimpleNamespace, ranks: SimpleNamespace) -> GradientReducer:
    return GradientReducer(zero, lambda *gradients: ranks.seen.append(gradients))


def check_seen(zero: SimpleNamespace, ranks: SimpleNamespace, passes: int, factor: float) -> None:
    """Check that each pass was seen in its order, before anything was summed."""
    assert len(ranks.seen) == passes
    norms_4 = torch.tensor([4 * 7**0.5, 3 * 5**0.5, 2 * 30**0.5, 3**0.5]) * factor
    for parameters, norms in ranks.seen:
        assert list(map(id, parameters)) == list(map(id, reversed(zero.bit16_groups[0])))
        torch.testing.assert_close(torch.stack(norms), norms_4)


@pytest.mark.parametrize("overlap", [False, True])
def test_large_gradients_are_summed_alone_others_together_and_passes_add_up(ranks, overlap) -> None:
    ends = iter([False, True])
    zero = zero_optimizer(
        overlap_comm=overlap, is_gradient_accumulation_boundary=lambda: next(ends)
    )
    reducer = reducer_of(zero, ranks)
    for _ in range(2):
        make_gradients(zero)
        assert all(parameter.grad is None for parameter in zero.bit16_groups[0])
        zero.independent_gradient_partition_epilogue()
    assert ranks.sent == [30, 15] * 2
    check_seen(zero, ranks, passes=2, factor=1.0)
    total = expected(4.0, 8.0, 16.0)
    torch.testing.assert_close(reducer.own_norms(), [total.norm()])
    torch.testing.assert_close(reducer.take_sum(0), total, rtol=0, atol=0)


def test_zero_1_sums_once_what_passes_have_added_up(ranks) -> None:
    zero = zero_optimizer(partition_gradients=False)
    reducer = reducer_of(zero, ranks)
    for _ in range(2):
        make_gradients(zero)
    assert ranks.sent == []
    zero.independent_gradient_partition_epilogue()
    assert ranks.sent == [30, 15]
    check_seen(zero, ranks, passes=1, factor=2.0)
    torch.testing.assert_close(reducer.take_sum(0), expected(4.0, 8.0, 16.0), rtol=0, atol=0)


def test_rank_that_is_alone_sends_nothing_and_measures_once(ranks) -> None:
    ranks.count, zero = 1, zero_optimizer()
    reducer = reducer_of(zero, ranks)
    for _ in range(2):
        make_gradients(zero)
        zero.independent_gradient_partition_epilogue()
        norms = reducer.own_norms()
        assert all(a is b for a, b in zip(norms, ranks.seen[-1][1], strict=True))
        torch.testing.assert_close(reducer.take_sum(0), expected(1.0, 2.0, 4.0), rtol=0, atol=0)
    assert ranks.sent == []


def test_parameter_without_a_gradient_is_zero_and_none_at_all_is_reported(ranks) -> None:
    zero = zero_optimizer()
    reducer = reducer_of(zero, ranks)
    make_gradients(zero, (1, 2))
    zero.independent_gradient_partition_epilogue()
    torch.testing.assert_close(reducer.take_sum(0), expected(0.0, 4.0, 0.0), rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"deepspeed .*_grad_acc_hooks"):
        zero.process_gradients(zero.bit16_groups[0][0], 0)  # by a hook that is still there
    later = zero_optimizer()
    idle = reducer_of(later, ranks)
    later.independent_gradient_partition_epilogue()
    with pytest.raises(ConfigError, match=r"deepspeed .*_grad_acc_hooks"):
        idle.own_norms()


@pytest.mark.parametrize("name", ["_grad_acc_hooks", "process_gradients", "partition_size"])
def test_attribute_of_zero_that_has_moved_is_named(ranks, name) -> None:
    zero = zero_optimizer()
    delattr(zero, name)
    with pytest.raises(ConfigError, match=f"deepspeed.*SimpleNamespace.{name}"):
        reducer_of(zero, ranks)
