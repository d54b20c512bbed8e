"""What mkdocs puts into the pages from the code, and what it refuses.

A page's comment `<!-- made: fields -->` becomes the tables of a recipe's fields, `commands` every
command's --help, `python` the documentation of every public name. The build fails where a public
name has none, and where a page would fetch something from another server.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from unittest import mock

import griffe
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
_MADE = re.compile(r"^<!-- made: (\w+) -->$", re.MULTILINE)
_FETCHED = re.compile(
    r'<(?:script|img|link|iframe|source)\b[^>]*(?:src|href)="(?:https?:)?//[^>]*>'
)


def on_page_markdown(markdown: str, **unused: object) -> str:
    """Replace the comments by what the code says."""
    return _MADE.sub(lambda match: _MAKERS[match[1]](), markdown)


def on_post_build(config: dict, **unused: object) -> None:
    """Refuse pages that need a network.

    Raises: PluginError naming page and element.
    """
    for page in sorted(Path(config["site_dir"]).rglob("*.html")):
        if found := _FETCHED.search(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page}: fetches from another server: {found[0]}")


def fields() -> str:
    """Return the tables of a recipe's fields."""
    from promoe_ds.config.reference import field_tables

    return field_tables()


def commands() -> str:
    """Return every command's --help under a heading."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    return "\n".join(
        f"## {name}\n\n```text\n{_help(name, target)}\n```\n" for name, target in scripts.items()
    )


def _help(name: str, target: str) -> str:
    output = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [name, "--help"]),
        mock.patch.dict(os.environ, COLUMNS="92"),
        contextlib.redirect_stdout(output),
        contextlib.suppress(SystemExit),
    ):
        EntryPoint(name, target, "console_scripts").load()()
    return output.getvalue().strip()


def public_names() -> list[str]:
    """Return the names that `promoe_ds` exports.

    Raises: PluginError if one, or a public member that a class defines itself, has no docstring.
    """
    package = griffe.load("promoe_ds", search_paths=[ROOT])
    names = [name for name in package.exports or () if not name.startswith("__")]
    if missing := [each for name in names for each in _undocumented(package[name])]:
        raise PluginError(f"public, without a docstring: {', '.join(missing)}")
    return names


def _undocumented(thing: griffe.Object | griffe.Alias) -> Iterator[str]:
    if not thing.has_docstring:
        yield thing.path
    for member in thing.members.values() if thing.is_class else ():
        if member.is_public and member.is_function:
            yield from _undocumented(member)


def python() -> str:
    """Return the directives that document every public name."""
    return "\n".join(f"::: promoe_ds.{name}\n" for name in public_names())


_MAKERS = {"fields": fields, "commands": commands, "python": python}
