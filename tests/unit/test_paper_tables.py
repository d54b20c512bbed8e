"""Every command of docs/measured/paper_tables.csv loads, and its parameter counts are those of the
paper.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from promoe_ds.config import count_parameters, load_config
from tests.unit.builders import superclass_map

DOCUMENT = Path(__file__).parents[2] / "docs/measured/paper_tables.csv"
with DOCUMENT.open(encoding="utf-8") as file:
    ROWS = list(csv.DictReader(file))
#: Tables whose every row the document must state.
TABLES = {"1", "2, 3", *map(str, range(4, 14)), "Fig. 3(c)"}


def _number(text: str) -> float:
    return float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["arguments"])
def test_paper_row_loads_with_published_counts(row, tmp_path) -> None:
    recipe, _, overrides = row["arguments"].removeprefix("--recipe ").partition(" --set ")
    count = count_parameters(
        load_config(recipe, overrides.replace("FILE", str(superclass_map(tmp_path))).split())
    )
    if row["published"] and "diffmoe" not in recipe:
        activated, total = (_number(text) for text in row["published"].split(" / "))
        # The paper rounds down here and there: 130.57M is "130M".
        assert count.activated == pytest.approx(activated, rel=0.006)
        assert count.total == pytest.approx(total, rel=0.01)


def test_paper_tables_every_table_is_there() -> None:
    assert {row["table"] for row in ROWS} == TABLES
    assert len(ROWS) > 40
