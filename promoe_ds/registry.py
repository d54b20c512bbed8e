"""Tables of what a recipe chooses by name, filled next to the classes that they list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Name = TypeVar("Name", bound=str)
Entry = TypeVar("Entry")


def register(table: dict[Name, Any], name: Name) -> Callable[[Entry], Entry]:
    """Return a decorator that enters a class or a function into `table` under `name`."""

    def enter(entry: Entry) -> Entry:
        table[name] = entry
        return entry

    return enter
