"""What mkdocs puts into the pages from the code, and what it refuses.

A page's line `<!-- made: fields --> ...` becomes the tables of a recipe's fields, `commands` every
command's --help, `python` the documentation of every public name, and so on. The build fails where
a public name has none, and where a page would fetch something from another server.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from tempfile import NamedTemporaryFile
from unittest import mock

import griffe
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
_MADE = re.compile(r"^<!-- made: (\w+) -->.*$", re.MULTILINE)
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


def rooms() -> str:
    """Return every room of the package with the first lines of its docstring."""
    files = sorted(ROOT.glob("promoe_ds/*/__init__.py"))
    said = {file.parent.name: ast.get_docstring(ast.parse(file.read_text())) for file in files}
    return _table(
        ("room", "holds"),
        [(f"`{name}`", " ".join(words.split("\n\n")[0].split())) for name, words in said.items()],
    )


def devices() -> str:
    """Return the planner's devices."""
    from promoe_ds.backends.devices import DEVICES

    head = (
        "`--gpu`",
        "memory GB",
        "bf16 TFLOP/s",
        "fp32 TFLOP/s",
        "memory TB/s",
        "in the node GB/s",
    )
    rows = [
        (
            f"`{name}`",
            *(
                f"{value:g}"
                for value in (
                    device.memory / 1e9,
                    device.flops["bf16"] / 1e12,
                    device.flops["fp32"] / 1e12,
                    device.memory_bandwidth / 1e12,
                    device.link_bandwidth / 1e9,
                )
            ),
        )
        for name, device in DEVICES.items()
    ]
    return _table(head, rows)


def paper() -> str:
    """Return the rows of the paper's tables, with this package's counts."""
    from promoe_ds.config import count_parameters, load_config

    rows = []
    with (
        (ROOT / "docs/measured/paper_tables.csv").open(encoding="utf-8") as file,
        NamedTemporaryFile("w", suffix=".yaml") as superclasses,
    ):
        superclasses.writelines(f"s{first}: {[*range(first, 1000, 12)]}\n" for first in range(12))
        superclasses.flush()
        for table, model, arguments, published, *figures in list(csv.reader(file))[1:]:
            recipe, _, overrides = arguments.removeprefix("--recipe ").partition(" --set ")
            settings = overrides.replace("FILE", superclasses.name).split()
            count = count_parameters(load_config(recipe, settings))
            counts = (readable(count.activated), readable(count.total))
            rows.append((table, model, f"`{arguments}`", *counts, published, *figures))
    head = ("table", "model", "arguments", "activated", "total", "published", "FID / IS, cfg 1.0")
    return _table((*head, "cfg 1.5"), rows)


def readable(count: int) -> str:
    """Return a number of parameters as a person writes it."""
    return f"{count / 1e9:.3f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _help(name: str, target: str) -> str:
    output = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [name, "--help"]),
        mock.patch.dict(os.environ, COLUMNS="80"),
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
    if thing.is_module:
        members = [thing[name] for name in thing.exports or ()]
    else:
        members = [each for each in thing.members.values() if thing.is_class and each.is_function]
    for member in members:
        if member.is_public:
            yield from _undocumented(member)


def python() -> str:
    """Return the directives that document every public name."""
    return "\n".join(f"::: promoe_ds.{name}\n" for name in public_names())


def example() -> str:
    """Return the example of a router."""
    text = (ROOT / "examples/custom_router.py").read_text(encoding="utf-8")
    return f"```python\n{text}```"


_MAKERS = {
    each.__name__: each for each in (fields, commands, python, rooms, devices, paper, example)
}
