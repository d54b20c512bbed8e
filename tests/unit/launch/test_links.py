"""The network probe: every pair once, hosts of a round disjoint, what is slow stands out."""

from __future__ import annotations

import itertools

import pytest

from promoe_ds.errors import LaunchError
from promoe_ds.launch.network import choose_interface
from promoe_ds.launch.preflight.checks import clock_findings
from promoe_ds.launch.preflight.links import Link, link_table, rounds, slow_links


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_rounds_every_pair_meets_once_in_few_rounds(count) -> None:
    names = [f"h{i}" for i in range(count)]
    found = list(rounds(names))
    for pairs in found:
        assert len({name for pair in pairs for name in pair}) == 2 * len(pairs)
    met = [frozenset(pair) for pairs in found for pair in pairs]
    assert sorted(map(sorted, met)) == sorted(map(sorted, itertools.combinations(names, 2)))
    assert len(found) <= count


def _links(slow: str, bandwidth: float = 1e9, trip: float = 1e-4) -> list[Link]:
    usual, odd = {"bits_per_second": 1e10, "round_trip": 1e-4}, {"bits_per_second": bandwidth, "round_trip": trip}
    return [Link(source=a, target=b, **(odd if slow in (a, b) else usual))
            for a, b in itertools.permutations("abc", 2)]


def test_slow_links_a_slow_host_of_three_is_found() -> None:
    assert {(link.source, link.target) for link in slow_links(_links("c"))} == {("a", "c"), ("b", "c"), ("c", "a"), ("c", "b")}
    assert len(slow_links(_links("c", bandwidth=1e10, trip=5e-3))) == 4
    assert slow_links(_links("nobody")) == []


def test_slow_links_a_broken_one_is_listed_with_its_problem() -> None:
    links = [*_links("nobody"), Link(source="a", target="d", problem="no connection (refused)")]
    assert [link.target for link in slow_links(links)] == ["d"]
    assert link_table(links)[-1].split()[:2] == ["a", "d"]
    assert "no connection (refused)" in link_table(links)[-1]


def test_interface_of_the_names_addresses_is_taken_only_if_clear() -> None:
    known = {"a": {"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"}, "b": {"eth0": "10.0.0.2", "ib0": "10.1.0.2"}}
    assert choose_interface("", {}, known, {"a": "10.0.0.1", "b": "10.0.0.2"}) == "eth0"
    assert choose_interface("ib0", {"GLOO_SOCKET_IFNAME": "eth0"}, known, {}) == "ib0"
    assert choose_interface("", {"GLOO_SOCKET_IFNAME": "ib0"}, known, {}) == "ib0"
    with pytest.raises(LaunchError, match=r"not clear .*a: eth0; b: none of eth0 10.0.0.2, ib0 10.1.0.2.*--interface"):
        choose_interface("", {}, known, {"a": "10.0.0.1"})
    with pytest.raises(LaunchError, match="b: has no interface lo"):
        choose_interface("lo", {}, known, {})


def test_clocks_apart_are_found() -> None:
    assert clock_findings("a", 1.5) == clock_findings("a", -1.5) == []
    (finding,) = clock_findings("a", -90.0)
    assert str(finding).startswith("a: its clock is 90.0 s behind this host's: run a time service")
