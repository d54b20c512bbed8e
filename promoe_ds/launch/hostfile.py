"""The hostfile: one `NAME slots=N` a line, read more strictly than by DeepSpeed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from promoe_ds.errors import LaunchError

#: Names go into shell and pdsh command lines: nothing that either would expand.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_LINE = re.compile(r"(\S+)\s+slots=(\S+)")
_MOST_SLOTS = 1024


@dataclass(frozen=True)
class Host:
    """A host and how many ranks run there."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Read a hostfile; empty lines and lines that begin with # are skipped.

    Raises: LaunchError naming file, line and what to write instead.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LaunchError(f"--hostfile {path.absolute()}: no such file. Name an existing one; to train on this host alone, use "
                          "launch_scripts/single_node.sh") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--hostfile {path}: cannot be read ({error})") from None
    hosts: dict[str, Host] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        host = _parse_line(line, f"{path}, line {number}")
        if host.name in hosts:
            raise LaunchError(f"{path}, line {number}: {host.name} is listed twice: keep one line with all its slots")
        hosts[host.name] = host
    if not hosts:
        raise LaunchError(f"{path}: no host in it: write a line such as `gpu01 slots=8` for each")
    return list(hosts.values())


def write_hostfile(path: Path, hosts: Sequence[Host]) -> None:
    """Write a hostfile that DeepSpeed reads."""
    path.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts), encoding="utf-8")


def _parse_line(line: str, where: str) -> Host:
    match = _LINE.fullmatch(line)
    if match is None:
        raise LaunchError(f"{where}: {line!r} is not of the form `NAME slots=N`, e.g. `gpu01 slots=8`")
    name, slots = match.groups()
    if not _NAME.fullmatch(name):
        raise LaunchError(f"{where}: {name!r} is no host name: only letters, digits, dots, hyphens and underscores; put user "
                          "names and ports into ~/.ssh/config")
    if not slots.isascii() or not slots.isdigit() or not 1 <= int(slots) <= _MOST_SLOTS:
        raise LaunchError(f"{where}: slots={slots} must be a number from 1 to {_MOST_SLOTS}: the ranks on {name}, one for each GPU")
    return Host(name, int(slots))
