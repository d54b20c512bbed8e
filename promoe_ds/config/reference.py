"""Every field of a recipe, as a person reads it: what `--fields` prints and the page of recipes
shows.
"""

import json
from typing import Any, NamedTuple

from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import ConfigError

_TYPES = {"integer": "int", "number": "float", "boolean": "bool", "string": "str"}
_TYPES["object"] = "mapping"
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
_NEEDED = "must be set"


class FieldFacts(NamedTuple):
    """One field: its dotted name, what it takes, what it is if left out, what it means."""

    name: str
    takes: str
    default: str
    meaning: str


def list_fields() -> dict[str, list[FieldFacts]]:
    """Return the fields of every section, by section and in order; those of the recipe itself are
    under "".
    """
    whole = RunConfig.model_json_schema()
    sections = {
        name: whole["$defs"][each["$ref"].rpartition("/")[2]]
        for name, each in whole["properties"].items()
        if "$ref" in each
    }
    own = {name: each for name, each in whole["properties"].items() if name not in sections}
    return {
        section: [
            FieldFacts(
                f"{section}.{name}" if section else name,
                _takes(field),
                _plain(field["default"]) if "default" in field else _NEEDED,
                field["description"],
            )
            for name, field in schema["properties"].items()
        ]
        for section, schema in {"": {"properties": own}, **sections}.items()
    }


def field_tables() -> str:
    """Return all sections as Markdown, a table each."""
    parts = []
    for section, fields in list_fields().items():
        owner: Any = RunConfig.model_fields[section].annotation if section else RunConfig
        purpose = " ".join(owner.__doc__.partition("\n\n")[0].split())
        rows = [
            f"| `{name}` | {_cell(takes)} | {_cell(default)} | {meaning} |"
            for name, takes, default, meaning in fields
        ]
        table = ["| field | takes | if left out | |", "|---|---|---|---|", *rows]
        parts += [f"## {section or 'The recipe'}", purpose, "\n".join(table)]
    return "\n\n".join(parts) + "\n"


def field_lines(section: str = "") -> str:
    """Return fields as text for a terminal: all, or those of one section.

    Raises: ConfigError if there is no such section.
    """
    tables = list_fields()
    if section not in tables:
        raise ConfigError(
            f"--fields {section}: no such section; there are {', '.join(filter(None, tables))}"
        )
    chosen = tables[section] if section else [each for part in tables.values() for each in part]
    lines = []
    for name, takes, default, meaning in chosen:
        left_out = default if default == _NEEDED else f"default {default}"
        lines.append(f"{name}  ({takes}; {left_out})\n    {meaning}\n")
    return "".join(lines)


def _cell(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _takes(schema: dict[str, Any]) -> str:
    """Return e.g. `int > 0`, `auto | true | false`, `[float >= 0 < 1, ...]`."""
    if "anyOf" in schema:
        return " | ".join(_takes(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(_plain(each) for each in schema["enum"])
    if schema["type"] == "array":
        items = schema.get("prefixItems") or [schema["items"], None]
        return f"[{', '.join(_takes(each) if each else '...' for each in items)}]"
    limits = [f"{sign} {_plain(schema[key])}" for key, sign in _BOUNDS.items() if key in schema]
    return " ".join([_TYPES.get(schema["type"], schema["type"]), *limits])


def _plain(value: Any) -> str:
    """Return a value as YAML writes it."""
    if value == 2**63:
        return "2^63"
    if isinstance(value, list):
        return f"[{', '.join(_plain(each) for each in value)}]"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')
