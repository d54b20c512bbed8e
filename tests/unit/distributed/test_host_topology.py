"""Whether expert groups cross hosts, and what is said then."""

from __future__ import annotations

import pytest

from promoe_ds.distributed.host_topology import spanning_problem

BLOCKS, CYCLE = ["a", "a", "b", "b"], ["a", "b", "a", "b"]
CONSECUTIVE, STRIDED = [(0, 1), (2, 3)], [(0, 2), (1, 3)]


@pytest.mark.parametrize(
    ("hosts", "groups"),
    [
        (BLOCKS, CONSECUTIVE),
        (CYCLE, STRIDED),
        (["a"] * 4, [(0, 1, 2, 3)]),
        (CYCLE, [(0,), (1,), (2,), (3,)]),
    ],
)
def test_placement_groups_within_hosts_are_no_problem(hosts, groups) -> None:
    assert spanning_problem(hosts, groups) == ""


@pytest.mark.parametrize(
    ("hosts", "groups", "message"),
    [
        (
            BLOCKS,
            STRIDED,
            (
                "ranks 0 on a, 2 on b spans hosts, tokens cross the network in every layer; set "
                "use_data_before_expert_parallelism to false in the DeepSpeed JSON"
            ),
        ),
        (
            CYCLE,
            CONSECUTIVE,
            (
                "ranks 0 on a, 1 on b spans hosts, tokens cross the network in every layer; set "
                "use_data_before_expert_parallelism to true in the DeepSpeed JSON"
            ),
        ),
        (
            BLOCKS,
            [(0, 1, 2, 3)],
            (
                "ranks 0 on a, 1 on a, 2 on b, 3 on b spans hosts, tokens cross the network in"
                " every layer; lower parallel.ep_size to 2, which divides the 2 ranks of a host"
            ),
        ),
    ],
)
def test_placement_groups_across_hosts_are_named_with_a_remedy(hosts, groups, message) -> None:
    assert spanning_problem(hosts, groups) == f"the expert group of {message}"
