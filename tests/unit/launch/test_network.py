"""Which interface joins the hosts, from what their names stand for; clocks."""

from __future__ import annotations

import pytest

from promoe_ds.errors import LaunchError
from promoe_ds.launch import network
from promoe_ds.launch.network import choose_interface, local_interfaces, reached_by
from promoe_ds.launch.preflight import _check_clock, _Hosts


def _hosts(interfaces: dict[str, dict[str, str]], **addresses: dict[str, str]) -> dict:
    return {
        host: {"interfaces": known, "addresses": addresses.get(host, {})}
        for host, known in interfaces.items()
    }


@pytest.fixture(autouse=True)
def resolved(monkeypatch) -> dict[str, str]:
    """What this host resolves names to."""
    here: dict[str, str] = {}
    monkeypatch.setattr(network, "resolve", lambda names: here)
    return here


def test_loopback_is_an_interface_of_this_host() -> None:
    assert "127.0.0.1" in local_interfaces().values()


def test_own_name_on_the_loopback_is_looked_up_on_other_hosts(resolved) -> None:
    """As Debian writes /etc/hosts: host1 knows itself by 127.0.1.1 only, which `resolve` leaves
    out.
    """
    resolved["host2"] = "10.0.0.2"
    hosts = _hosts(
        {
            "host1": {"lo": "127.0.0.1", "eth0": "10.0.0.1"},
            "host2": {"lo": "127.0.0.1", "eth0": "10.0.0.2"},
        },
        host1={"host2": "10.0.0.2"},
        host2={"host1": "10.0.0.1"},
    )
    assert reached_by(hosts) == {"host1": "10.0.0.1", "host2": "10.0.0.2"}
    assert choose_interface("", {}, hosts) == "eth0"


@pytest.mark.parametrize("here", [{}, {"host1": "203.0.113.9"}])
def test_address_of_none_of_the_hosts_interfaces_gives_way_to_one_that_is(resolved, here) -> None:
    resolved |= here
    hosts = _hosts(
        {"host1": {"eth0": "10.0.0.1"}, "host2": {"eth0": "10.0.0.2"}}, host2={"host1": "10.0.0.1"}
    )
    assert reached_by(hosts) == {"host1": "10.0.0.1"}


def test_interface_of_the_names_addresses_is_taken_only_if_clear(resolved) -> None:
    hosts = _hosts(
        {
            "a": {"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"},
            "b": {"eth0": "10.0.0.2", "ib0": "10.1.0.2"},
        }
    )
    assert choose_interface("ib0", {"GLOO_SOCKET_IFNAME": "eth0"}, hosts) == "ib0"
    assert choose_interface("", {"GLOO_SOCKET_IFNAME": "ib0"}, hosts) == "ib0"
    with pytest.raises(LaunchError, match=r"^b: .*interface lo .*--interface"):
        choose_interface("lo", {}, hosts)
    resolved["a"] = "10.0.0.1"
    with pytest.raises(
        LaunchError, match=r"a: eth0; b: none of eth0 10.0.0.2, ib0 10.1.0.2.*--interface"
    ):
        choose_interface("", {}, hosts)
    resolved["b"] = "10.0.0.2"
    assert choose_interface("", {}, hosts) == "eth0"


@pytest.mark.parametrize(
    ("ahead", "named"), [(1.5, ""), (-1.5, ""), (-90.0, "90.0 s behind"), (3.0, "3.0 s ahead")]
)
def test_clocks_apart_are_found(monkeypatch, ahead, named) -> None:
    hosts = _Hosts({})
    monkeypatch.setattr(hosts, "each", lambda action: [("host2", ahead)])
    _check_clock(None, hosts)
    problem = "".join(hosts.problems)
    assert bool(problem) == bool(named) and named in problem
