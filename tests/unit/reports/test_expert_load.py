"""What is found in a run: starved experts, lost time, findings, numbers by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from promoe_ds.cli.expert_load import main
from promoe_ds.config import count_parameters, load_config, training_flops_per_image
from promoe_ds.reports.load import findings
from promoe_ds.reports.load.page import layer_rows
from promoe_ds.reports.load.run import RunView

from .routing_logs import interval, write


def test_starved_experts_are_found_with_the_step_when_they_began(views) -> None:
    assert views[0].starved == []
    assert [(e.layer, e.expert, e.is_dead, e.since) for e in views[1].starved] == [
        (3, 2, True, 100),
        (3, 3, False, 0),
    ]


@pytest.mark.parametrize(
    ("dies_at", "missing", "found"),
    [
        (960, None, [(960, False)]),  # within the last tenth, which is what counts as now
        (0, None, [(0, True)]),
        (0, 500, [(0, True)]),  # an interval without tokens says nothing about an expert
        (990, None, []),  # one interval is no death
    ],
)
def test_dead_expert_is_found_with_the_step_when_it_died(tmp_path, dies_at, missing, found) -> None:
    lines = interval(*range(10, 1010, 10), layers=(1,), length=10, tokens=[9, 9, 9, 9])
    for each in lines:
        tokens = [9, 9, 9, 9 if each["step"] <= dies_at else 0]
        each["tokens_per_expert"] = tokens if each["step"] != missing else [0, 0, 0, 0]
    view = RunView.open(write(tmp_path, lines))
    assert [(each.since, each.is_always) for each in view.starved if each.is_dead] == found
    assert layer_rows(view)[1][8] == len(found)  # the table says the same


def make_measured_run(folder: Path, tokens: list[int], uneven: float) -> RunView:
    """Write a run whose fullest rank is measured pass by pass."""
    details = {"rank_max_over_mean": uneven}
    write(folder, interval(*range(10, 110, 10), length=10, tokens=tokens, details=details))
    config = load_config("digits_promoe", ["model.depth=4"])
    (folder / "config.yaml").write_text(config.model_dump_json())
    return RunView.open(folder)


def test_finding_of_lost_time_promises_what_another_order_changes(tmp_path) -> None:
    """What comes and goes from pass to pass is not credited to the advice."""
    even = make_measured_run(tmp_path / "even", [1000, 1000, 1000, 1000], 1.5)
    found = next(each for each in findings.find(even) if "lost to imbalance" in each.title)
    assert "no other order" in found.text and "--placement" not in found.text
    assert (
        f"{even.time_lost(even.present.uneven_L):.1%} remains" in found.text
        and even.time_lost(np.ones(2)) == 0
    )
    heavy = make_measured_run(tmp_path / "heavy", [1600, 1400, 400, 600], 1.8)
    found = next(each for each in findings.find(heavy) if "lost to imbalance" in each.title)
    assert heavy.present.uneven_L.tolist() == [1.5, 1.5] and heavy.advised.uneven_L.tolist() == [
        1.0,
        1.0,
    ]
    assert heavy.advised_uneven.tolist() == pytest.approx(
        [1.2, 1.2]
    )  # 1.8 as measured, times 1.0 of 1.5
    assert (
        f"bring that to {heavy.time_lost(np.full(2, 1.2)):.1%}" in found.text
        and "--placement FILE" in found.text
    )


def test_time_lost_by_hand(views) -> None:
    view, config = views[0], load_config("digits_promoe", ["model.depth=4"])
    # Each layer: 240 rows in 5 steps, the fullest rank 1.2 times the mean; 64 images a step.
    extra = 2 * (240 / 5) * 0.2 * 6 * count_parameters(config).routed_per_expert
    x = extra / (64 * training_flops_per_image(config))
    assert view.time_lost(view.present_uneven) == pytest.approx(x / (1 + x))
    assert view.time_lost(np.ones(2)) == 0
    assert view.images_per_second == 800.0


def test_findings_name_the_pathology_its_place_and_a_remedy(views) -> None:
    assert [each.level for each in findings.find(views[0])] == ["good"]
    found = {each.title: each for each in findings.find(views[1])}
    assert "layer 3 expert 2 (dead since step 100)" in found["1 dead expert"].text
    assert "routing.rcl_weight" in found["1 dead expert"].text
    assert "layer 3 expert 3 (starved from the start)" in found["1 starved expert"].text
    assert "Layer 3 is uneven: 2.25 times the mean" in found


def test_command_names_files_as_they_are_called(tmp_path, capsys) -> None:
    """A terminal's markup and emoji codes are parts of names."""
    names = ("run[bold]", "run:on:")
    for name in names:
        write(tmp_path / name, interval(5))
    main([str(tmp_path / names[0]), "--compare", str(tmp_path / names[1])])
    printed = capsys.readouterr().out
    assert f"report: {tmp_path / names[0]}/expert_load.html" in printed
    assert all(f"─ {name} ─" in printed for name in names)


def test_layer_rows_add_up_the_window(views) -> None:
    head, first, second = layer_rows(views[0])
    row = dict(zip(head, first, strict=True))
    assert (row["layer"], row["max/mean"], row["dead"], row["conditional tokens"]) == (
        1,
        1.333,
        0,
        4 * 240,
    )
    assert row["fullest rank / mean"] == 1.2
    assert dict(zip(head, second, strict=True))["layer"] == 3
