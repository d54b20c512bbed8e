"""Network interfaces: which one joins the hosts, and this host's addresses."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping, Sequence

from promoe_ds.errors import LaunchError

_SIOCGIFADDR = 0x8915  # <linux/sockios.h>
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def local_interfaces() -> dict[str, str]:
    """Return the IPv4 address of every interface of this host that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # no address
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def choose_interface(wanted: str, environment: Mapping[str, str], interfaces: Mapping[str, Mapping[str, str]],
                     addresses: Mapping[str, str]) -> str:
    """Return the name of the interface that joins the hosts.

    Args:
        wanted: what the user asked for, "" if nothing; then GLOO_SOCKET_IFNAME counts, then the interface whose address the
            host's name stands for, if it has the same name on all.
        environment: of the ranks.
        interfaces: for every host, its interfaces' addresses.
        addresses: for every host, the address that its name stands for.
    Raises: LaunchError naming the host that lacks it.
    """
    name = wanted or environment.get(INTERFACE_VARIABLES[0], "").split(",")[0]
    if name:
        for host, known in interfaces.items():
            if name not in known:
                raise LaunchError(f"{host}: has no interface {name} with an address (it has {_listed(known)}): give another with "
                                  "--interface")
        return name
    found = {host: next((name for name, address in known.items() if address == addresses.get(host)), "")
             for host, known in interfaces.items()}
    names = set(found.values())
    if len(names) == 1 and "" not in names:
        return names.pop()
    shown = "; ".join(f"{host}: {found[host] or 'none of ' + _listed(interfaces[host])}" for host in interfaces)
    raise LaunchError(f"the interface that joins the hosts is not clear from their names' addresses ({shown}): give it with "
                      "--interface")


def resolve(names: Sequence[str]) -> dict[str, str]:
    """Return the IPv4 address of every name that this host can resolve to one that others can reach."""
    addresses = {}
    for name in names:
        try:
            found = [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)]
        except OSError:
            continue
        if not ipaddress.ip_address(found[0]).is_loopback:
            addresses[name] = found[0]
    return addresses


def reached_by(facts: Mapping[str, Mapping[str, Mapping[str, str]]]) -> dict[str, str]:
    """Return the address that each host's name stands for: here, or where that is none of its own, on any other host.

    (Debian writes 127.0.1.1 for a host's own name into its /etc/hosts.)

    Args:
        facts: for every host, its `interfaces` and the `addresses` that it knows of all.
    """
    here, addresses = resolve(list(facts)), {}
    for name, known in facts.items():
        told = [source[name] for source in (here, *(answer["addresses"] for answer in facts.values())) if name in source]
        own = set(known["interfaces"].values())
        if told:
            addresses[name] = next((address for address in told if address in own), told[0])
    return addresses


def _listed(interfaces: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {address}" for name, address in interfaces.items()) or "none"
