"""Which interface joins the hosts, from what their names stand for."""

from __future__ import annotations

import pytest

from promoe_ds.launch import network
from promoe_ds.launch.network import choose_interface, reached_by


def test_own_name_on_the_loopback_is_looked_up_on_other_hosts(monkeypatch) -> None:
    """As Debian writes /etc/hosts: host1 knows itself by 127.0.1.1 only, which `resolve` leaves out; host2 knows both."""
    monkeypatch.setattr(network, "resolve", lambda names: {"host2": "10.0.0.2"})
    facts = {"host1": {"interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.1"}, "addresses": {"host2": "10.0.0.2"}},
             "host2": {"interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.2"}, "addresses": {"host1": "10.0.0.1"}}}
    addresses = reached_by(facts)
    assert addresses == {"host1": "10.0.0.1", "host2": "10.0.0.2"}
    assert choose_interface("", {}, {host: known["interfaces"] for host, known in facts.items()}, addresses) == "eth0"


@pytest.mark.parametrize("here", [{}, {"host1": "203.0.113.9"}])
def test_address_of_none_of_the_hosts_interfaces_gives_way_to_one_that_is(monkeypatch, here) -> None:
    monkeypatch.setattr(network, "resolve", lambda names: here)
    facts = {"host1": {"interfaces": {"eth0": "10.0.0.1"}, "addresses": {}},
             "host2": {"interfaces": {"eth0": "10.0.0.2"}, "addresses": {"host1": "10.0.0.1"}}}
    assert reached_by(facts) == {"host1": "10.0.0.1"}
