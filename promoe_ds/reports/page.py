"""The page of every report: one file that opens offline, on a phone and in the dark.

A page is a list of parts, each a kind and what it shows; page.html.j2 has their markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from promoe_ds.errors import DataError
from promoe_ds.files import replace_text
from promoe_ds.reports.charts import Chart, csv_text, vl_convert
from promoe_ds.reports.theme import THEMES, slug, vega_config

Part = dict[str, Any]
Rows = Sequence[Sequence[object]]


@dataclass(frozen=True)
class Page:
    """kind: of report; name: what it is of; facts: a line about each; notes: what was left out;
    parts: as `part` makes them.
    """

    kind: str
    name: str
    facts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


def part(kind: str, **values: Any) -> list[Part]:
    """Return a part of a page, nothing if it has nothing to show.

    Kinds: heading (text), text (text), cards (items: name, value, words, level), findings
    (items: level, tag, title, text), warning (title, text, items), figures (items, of
    `figures`), details (title, text, items, is_open), table (rows, the first is the head),
    terms (items: term, text), pictures (items: caption, url, width, height).
    """
    return [{"kind": kind, **values}] if any(values.values()) else []


def figures(
    groups: Sequence[Sequence[Chart | None]], labels: Sequence[str]
) -> list[list[dict[str, Any]]]:
    """Return charts, those of several runs side by side; what one of them lacks says so.

    Args:
        groups: each the same chart of every run, None if a run has none; labels: the runs' names.
    """
    names = labels if len(labels) > 1 else [""]
    return [
        [
            {"label": label, "chart": chart, "title": next(each.title for each in group if each)}
            for label, chart in zip(names, group, strict=True)
        ]
        for group in groups
        if any(group)
    ]


def render(page: Page) -> str:
    """Return the document.

    Raises: ConfigError without vl-convert.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "slug": slug,
        "breakable": lambda name: Markup("_<wbr>").join(str(name).split("_")),
    }
    text = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        page=page,
        themes=THEMES,
        script=Markup(vl_convert().javascript_bundle()),
        configs={theme: vega_config(theme) for theme in THEMES},
    )


def write_page(path: Path, page: Page) -> int:
    """Write the document in one move; return its bytes.

    Raises: DataError if it cannot be written; ConfigError without vl-convert.
    """
    write_text(path, render(page))
    return path.stat().st_size


def write_text(path: Path, text: str) -> None:
    """Write a file of a report in one move.

    Raises: DataError if it cannot be written.
    """
    try:
        replace_text(path, text)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}: name another place") from None


def write_charts(
    folder: Path, charts: Sequence[Chart], tables: Mapping[str, Rows] | None = None
) -> int:
    """Write every chart as PNG and CSV, and further tables as CSV; return how many charts.

    Raises: DataError if the folder cannot be written; ConfigError without vl-convert.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            chart.write(folder)
        for name, rows in (tables or {}).items():
            (folder / f"{name}.csv").write_text(csv_text(rows), encoding="utf-8")
    except OSError as error:
        raise DataError(f"--export {folder} cannot be written: {error.strerror}") from None
    return len(charts)
