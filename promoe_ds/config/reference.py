"""Every field of a recipe, as a person reads it: what `--fields` prints and docs/recipes.md
holds.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from pydantic.fields import FieldInfo

from promoe_ds.config.schema import RunConfig
from promoe_ds.config.section import Section
from promoe_ds.errors import ConfigError

_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True, kw_only=True)
class FieldFacts:
    """One field: its dotted name, what it takes, what it is if left out ("" where it must be set),
    what it means.
    """

    name: str
    takes: str
    default: str
    meaning: str


def list_fields() -> dict[str, list[FieldFacts]]:
    """Return the fields of every section, by section and in order; those of the recipe itself stand
    under "".
    """
    found: dict[str, list[FieldFacts]] = {"": []}
    for name, info in RunConfig.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            found[name] = [
                _facts(f"{name}.{leaf}", each)
                for leaf, each in info.annotation.model_fields.items()
            ]
        else:
            found[""].append(_facts(name, info))
    return found


def section_purpose(section: str) -> str:
    """Return the first paragraph of a section's docstring."""
    annotation = RunConfig if not section else RunConfig.model_fields[section].annotation
    return " ".join((annotation.__doc__ or "").partition("\n\n")[0].split())


def field_tables() -> str:
    """Return all sections as Markdown, a table each."""
    parts = []
    for section, fields in list_fields().items():
        rows = [
            f"| `{each.name}` | {_cell(each.takes)} | {_cell(each.default or 'must be set')} |"
            f" {each.meaning} |"
            for each in fields
        ]
        parts.append(
            "\n".join(
                [
                    f"## {section or 'The recipe'}",
                    "",
                    section_purpose(section),
                    "",
                    "| field | takes | if left out | |",
                    "|---|---|---|---|",
                    *rows,
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def field_lines(section: str = "") -> str:
    """Return fields as text for a terminal: all, or those of one section.

    Raises: ConfigError if there is no such section.
    """
    tables = list_fields()
    if section and section not in tables:
        raise ConfigError(
            f"--fields {section}: no such section; there are"
            f" {', '.join(name for name in tables if name)}"
        )
    lines = []
    for name in [section] if section else tables:
        for each in tables[name]:
            default = f"default {each.default}" if each.default else "must be set"
            lines.append(f"{each.name}  ({each.takes}; {default})\n    {each.meaning}")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _facts(name: str, info: FieldInfo) -> FieldFacts:
    default = "" if info.is_required() else _plain(info.get_default(call_default_factory=True))
    return FieldFacts(
        name=name,
        takes=_describe_type(info.annotation, info.metadata),
        default=default,
        meaning=info.description or "",
    )


def _describe_type(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """Return e.g. `int > 0`, `auto | true | false`, `[float >= 0 < 1, ...]`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _describe_type(arguments[0], arguments[1:])
    if origin is Literal:
        return " | ".join(_plain(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(
            _describe_type(each, metadata) if each is not type(None) else "null"
            for each in arguments
        )
    if origin is tuple:
        inner = ("..." if each is Ellipsis else _describe_type(each) for each in arguments)
        return f"[{', '.join(inner)}]"
    if origin is dict:
        return "mapping"
    return " ".join([annotation.__name__, *_bounds(metadata)])


def _bounds(metadata: typing.Sequence[Any]) -> list[str]:
    """Return the limits among a type's annotations."""
    limits = []
    for each in metadata:
        for part in getattr(
            each, "metadata", [each]
        ):  # a pydantic Field inside Annotated carries its own
            limits += [
                f"{sign} {_plain(getattr(part, bound))}"
                for bound, sign in _BOUNDS.items()
                if hasattr(part, bound)
            ]
    return limits


def _plain(value: Any) -> str:
    """Return a value as YAML writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_plain(each) for each in value)}]"
    if isinstance(value, int) and value >= 2**62:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else str(value)
