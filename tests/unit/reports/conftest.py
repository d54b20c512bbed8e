"""A run of two layers for every test of its report, and one in which an expert dies."""

from __future__ import annotations

from pathlib import Path

import pytest

from promoe_ds.config import load_config
from promoe_ds.reports.load.run import RunView

from .routing_logs import interval, write

SURPRISING_NAME = "a<b>&\"c'"


def make_run(folder: Path, *, dies: bool = False) -> Path:
    """Write a run of two layers; in one that dies, an expert of layer 3 gets nothing after step
    100, another hardly any.
    """
    details = {
        "tokens_per_class": {"steps": 5, "counts": [[5, 1, 2, 2]] * 10 + [[0] * 4]},
        "tokens_per_position": {"steps": 5, "counts": [[p % 4, 1, 1, 1] for p in range(16)]},
    }
    lines = interval(*range(5, 205, 5), tokens=[40, 30, 20, 30], details=details)
    for each in (each for each in lines if dies and each["layer"] == 3):
        each["tokens_per_expert"] = [40, 30, 0 if each["step"] > 100 else 20, 1]
    config = load_config("digits_promoe", ["model.depth=4"])
    (write(folder, lines) / "config.yaml").write_text(config.model_dump_json())
    (folder / "metrics.jsonl").write_text('{"step": 200, "images_per_second": 800.0}\nbroken')
    return folder


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> list[RunView]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        RunView.open(make_run(folder / "fed")),
        RunView.open(make_run(folder / SURPRISING_NAME, dies=True)),
    ]
