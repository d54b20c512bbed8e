"""The hostfile: one `NAME slots=N` a line; lists of hosts with brackets.

It is read more strictly than by DeepSpeed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from promoe_ds.errors import LaunchError

#: Names go into shell and pdsh command lines: nothing that either would expand.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_LINE = re.compile(r"(\S+)\s+slots=(\S+)")
_SLOTS = re.compile(r"[0-9]{1,9}")
_MOST_SLOTS = 1024
_MOST_HOSTS = 65536


@dataclass(frozen=True)
class Host:
    """A host and how many ranks run there."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Read a hostfile: comments and empty lines are skipped, `gpu[01-04] slots=8` is four hosts.

    Raises: LaunchError naming file, line and what to write instead.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise LaunchError(
            f"--hostfile {path.absolute()}: no such file. Name an existing one; to train on this "
            "host alone, use launch_scripts/single_node.sh"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--hostfile {path}: cannot be read ({error})") from None
    hosts: dict[str, Host] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        for host in _parse_line(line, f"{path}, line {number}") if line else ():
            if host.name.lower() in hosts:
                raise LaunchError(
                    f"{path}, line {number}: {host.name} is listed twice: "
                    "keep one line with all its slots"
                )
            hosts[host.name.lower()] = host
    if not hosts:
        raise LaunchError(f"{path}: no host in it: write a line such as `gpu01 slots=8` for each")
    return list(hosts.values())


def expand_hosts(text: str) -> list[str]:
    """Return the names of a list such as `gpu[01-03,7]-ib,login1`, the way Slurm writes it.

    Raises: ValueError saying what is wrong with it.
    """
    names: list[str] = []
    for part in re.split(r",(?![^\[\]]*\])", text):
        pieces = re.split(r"\[([^\[\]]*)\]", part.strip())
        plain = "".join(pieces[::2])
        if not part.strip() or "[" in plain or "]" in plain:
            raise ValueError(f"{part!r} is no name, or its brackets do not match")
        choices = [_numbers(piece) if index % 2 else [piece] for index, piece in enumerate(pieces)]
        if math.prod(map(len, choices)) + len(names) > _MOST_HOSTS:
            raise ValueError(f"more than {_MOST_HOSTS} hosts")
        names += map("".join, product(*choices))
    return names


def _numbers(text: str) -> list[str]:
    """Return what brackets hold: `01-03,7` is 01, 02, 03, 7."""
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        if match is None:
            raise ValueError(f"[{text}]: {part!r} is neither a number nor a range such as 01-03")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + _MOST_HOSTS:
            raise ValueError(f"[{text}]: the range {part!r} is empty or longer than {_MOST_HOSTS}")
        numbers += [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    return numbers


def write_hostfile(path: Path, hosts: Sequence[Host]) -> None:
    """Write a hostfile that DeepSpeed reads."""
    path.write_text(
        "".join(f"{host.name} slots={host.slots}\n" for host in hosts), encoding="utf-8"
    )


def _parse_line(line: str, where: str) -> list[Host]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise LaunchError(
            f"{where}: {line!r} is not of the form `NAME slots=N`, e.g. `gpu01 slots=8`"
        )
    text, slots = match.groups()
    try:
        names = expand_hosts(text)
    except ValueError as error:
        raise LaunchError(f"{where}: {text!r} is no host name ({error})") from None
    for name in names:
        if not _NAME.fullmatch(name):
            raise LaunchError(
                f"{where}: {name!r} is no host name: only letters, digits, dots, hyphens and "
                "underscores; put user names, ports and IPv6 addresses into ~/.ssh/config"
            )
    if not _SLOTS.fullmatch(slots) or not 1 <= int(slots) <= _MOST_SLOTS:
        raise LaunchError(
            f"{where}: slots={slots} must be a number from 1 to {_MOST_SLOTS}: the ranks on "
            f"{text}, one for each GPU"
        )
    return [Host(name, int(slots)) for name in names]
