"""What the site says of the house is so: paths that code names, drawings."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_pages_that_the_code_names_are_there() -> None:
    named = {
        (path.relative_to(ROOT).as_posix(), name)
        for folder in ("promoe_ds", "tools", "benchmarks", "launch_scripts", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".sbatch", ".yaml", ".txt", ".j2")
        for name in re.findall(r"\bdocs/[\w/.]+\.\w+", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 10
    assert sorted((path, name) for path, name in named if not (ROOT / name).is_file()) == []


def test_drawings_are_what_the_script_draws_of_the_house_as_it_is() -> None:
    script = runpy.run_path(str(DOCS / "pictures.py"))
    stale = [
        name
        for name, make in script["DRAWINGS"].items()
        for variant in script["PALETTES"]
        if (DOCS / f"images/{name}_{variant}.svg").read_text("utf-8") != make(variant)
    ]
    assert stale == [], "python docs/pictures.py makes them anew"
