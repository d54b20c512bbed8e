"""Network interfaces: this host's addresses, and which interface joins the hosts."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from promoe_ds.errors import LaunchError

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def local_interfaces() -> dict[str, str]:
    """Return the first IPv4 address of every interface of this host that has one."""
    found = {
        name: [one.address for one in addresses if one.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }
    return {name: addresses[0] for name, addresses in found.items() if addresses}


def resolve(names: Sequence[str]) -> dict[str, str]:
    """Return the IPv4 address of every name that this host resolves, loopback left out."""
    addresses = {}
    for name in names:
        try:
            address = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
        except OSError:
            continue
        if not ipaddress.ip_address(address).is_loopback:
            addresses[name] = str(address)
    return addresses


def choose_interface(
    wanted: str, environment: Mapping[str, str], hosts: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return the name of the interface that joins the hosts.

    Args:
        wanted: the user's, "" for none. Then comes the ranks' GLOO_SOCKET_IFNAME, then the
            interface with the address of each host's name, if it has the same name on all hosts.
        environment: of the ranks.
        hosts: for every host, its `interfaces` and the `addresses` of all names there
            (agent.describe).
    Raises: LaunchError naming the host that lacks it.
    """
    interfaces = {host: known["interfaces"] for host, known in hosts.items()}
    name = wanted or environment.get(INTERFACE_VARIABLES[0], "").split(",")[0]
    if name:
        for host, known in interfaces.items():
            if name not in known:
                raise LaunchError(
                    f"{host}: has no interface {name} with an address (it has {_listed(known)}): "
                    "name another with --interface"
                )
        return name
    addresses = reached_by(hosts)
    found = {
        host: next((name for name, address in known.items() if address == addresses.get(host)), "")
        for host, known in interfaces.items()
    }
    names = set(found.values())
    if len(names) == 1 and "" not in names:
        return names.pop()
    shown = "; ".join(
        f"{host}: {found[host] or 'none of ' + _listed(known)}"
        for host, known in interfaces.items()
    )
    raise LaunchError(
        f"the addresses of the hosts' names do not give one common interface ({shown}): name it "
        "with --interface"
    )


def reached_by(hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return each host's address: as its name is resolved here or, if it is not its own, elsewhere.

    Debian writes 127.0.1.1 for a host's own name into its /etc/hosts.
    """
    here, reached = resolve(list(hosts)), {}
    for name, known in hosts.items():
        sources = (here, *(host["addresses"] for host in hosts.values()))
        if found := [source[name] for source in sources if name in source]:
            own = set(known["interfaces"].values())
            reached[name] = next((address for address in found if address in own), found[0])
    return reached


def _listed(interfaces: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {address}" for name, address in interfaces.items()) or "none"
