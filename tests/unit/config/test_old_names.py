"""Recipes and saved configs of earlier versions: read under the names of today, each with a line
that says so.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from promoe_ds.config import load_config
from promoe_ds.config.loader import read_saved

from .said import refuses

EARLIER = Path(__file__).parents[2] / "fixtures/version_0_1"


def test_earlier_recipe_is_read_and_each_old_name_reported_once(told: list[str]) -> None:
    config = load_config(
        EARLIER / "recipe.yaml", ["optimizer.clip_norm=0.25", "parallel.exchange_dtype=same"]
    )
    assert (config.optimizer.max_grad_norm, config.optimizer.ema_sigma_rels) == (0.25, (0.1,))
    assert (config.parallel.dispatch, config.parallel.comm_dtype) == ("alltoall", "same")
    assert len(told) == 6
    for said in ("optimizer.ema_sigma_rels", "parallel.comm_dtype", "is now alltoall"):
        assert said in "\n".join(told)


def test_earlier_runs_config_is_what_its_recipe_says() -> None:
    saved, recipe = read_saved(EARLIER / "run/config.yaml"), load_config(EARLIER / "recipe.yaml")
    assert saved == recipe and saved.optimizer.max_grad_norm == 0.5


@pytest.mark.parametrize(
    ("old", "new"), [("deepspeed", "alltoall"), ("deepspeed_capacity", "deepspeed_moe")]
)
def test_old_value_of_dispatch_is_read(old: str, new: str) -> None:
    assert load_config("digits_promoe", [f"parallel.dispatch={old}"]).parallel.dispatch == new


def test_field_under_both_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text("base: digits_promoe\noptimizer: {clip_norm: 1.0, max_grad_norm: 2.0}\n")
    with refuses("clip_norm"):
        load_config(path)
