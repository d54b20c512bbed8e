"""A run's figures and the statistics over seeds, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from promoe_ds.errors import DataError
from promoe_ds.evaluation.judges.table import JUDGES, figures_of
from promoe_ds.reports.comparison.results import (
    collect_result,
    load_by_layer,
    metrics_of,
    read_json,
    read_metrics,
    summarise,
)

from ..builders import small_config
from .routing_logs import line, write
from .synthetic import synthetic_result

METRICS = metrics_of("digits")


def _result(**figures: float | None) -> dict:
    return {**dict.fromkeys(METRICS), **figures}


def test_summarise_leaves_out_what_a_run_has_not() -> None:
    summary = summarise(
        {0: _result(final_loss=1.0, frechet=3.0), 1: _result(final_loss=2.0)}, METRICS
    )
    assert summary["final_loss"]["mean"] == 1.5
    assert summary["frechet"] == {"n": 1, "mean": 3.0, "sd": None, "min": 3.0, "max": 3.0}
    assert summary["dead_experts"] is None


def test_paired_differences_pair_by_seed_by_hand() -> None:
    mine = {0: _result(final_loss=5.0), 1: _result(final_loss=7.0), 2: _result(final_loss=100.0)}
    first = {1: _result(final_loss=4.0), 0: _result(final_loss=3.0), 3: _result(final_loss=0.0)}
    # Seeds 0 and 1: 2 and 3; seed 2 has no partner.
    assert summarise(mine, METRICS, first)["final_loss"] == {
        "n": 2,
        "mean": 2.5,
        "sd": pytest.approx(math.sqrt(0.5)),
        "min": 2.0,
        "max": 3.0,
    }
    assert summarise(mine, METRICS, first)["accuracy"] is None


CONFIG = small_config(train={"max_steps": 10})


def _write_run(folder: Path, *, step: int = 10, **judged: Any) -> Path:
    judgement = {"images": None, "heldout_loss": None, "information": None, **judged}
    (folder / "judgement.json").write_text(
        json.dumps({"checkpoint_step": step, "device": "cpu", **judgement})
    )
    _write_metrics(folder, {5: 2.0, 10: 1.0})
    # Of ten steps the last fifth are 9 and 10: the line of step 5 does not count.
    tokens = ((5, 1, [4, 0, 0, 0]), (10, 1, [1, 1, 1, 1]), (10, 3, [3, 1, 0, 0]))
    return write(folder, [line(step, layer, 0, each, bins=1) for step, layer, each in tokens])


def _write_metrics(folder: Path, losses: dict[int, float | None], end: str = "") -> Path:
    lines = [
        {
            "step": step,
            "loss_diffusion": loss,
            "images_per_second": 1.0 if step == 1 else 256 * step,
        }
        for step, loss in losses.items()
    ]
    path = folder / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(each)}\n" for each in lines) + end)
    return path


def test_collect_result_reads_load_of_the_last_fifth_and_averages_layers(tmp_path) -> None:
    result = collect_result(_write_run(tmp_path), CONFIG)
    assert (result["final_loss"], result["loss_curve"]) == (1.0, [[5, 2.0], [10, 1.0]])
    assert [layer["max_over_mean"] for layer in result["layers"]] == [1.0, 3.0]
    assert (result["load_max_over_mean"], result["dead_experts"]) == (2.0, 1.0)
    assert result["images"] is None and "frechet" not in result


@pytest.mark.parametrize("dataset", JUDGES)
def test_collect_result_has_the_figures_of_the_data_sets_judge(tmp_path, dataset) -> None:
    heldout, *others = (figure.name for figure in figures_of(dataset))
    images = {name: 0.5 + place for place, name in enumerate(others)}
    information = {"group": 0.25, "noise level": 0.125, "position": 0.0}
    folder = _write_run(tmp_path, images=images, heldout_loss=2.0, information=information)
    # What reads a run's figures needs of its recipe no more than this.
    data = CONFIG.data.model_copy(update={"dataset": dataset})
    result = collect_result(folder, CONFIG.model_copy(update={"data": data}))
    assert images.items() <= result.items() and result[heldout] == 2.0
    assert (result["information_group"], result["information_noise"]) == (0.25, 0.125)
    assert set(metrics_of(dataset)) <= result.keys()
    if dataset == "digits":
        of_run = {"seed", "samples", "sample_seed", "environment"}
        assert result.keys() == synthetic_result(0).keys() - of_run


def test_collect_result_averages_the_last_tenth_and_takes_the_median_time_without_the_first_line(
    tmp_path,
) -> None:
    _write_metrics(_write_run(tmp_path), {step: float(step) for step in range(1, 31)})
    train = {"max_steps": 10, "global_batch_size": 256}
    result = collect_result(tmp_path, small_config(train=train))
    assert result["final_loss"] == 29.0  # 28, 29, 30
    assert result["step_ms"] == pytest.approx(1000 / 16)  # of 2 ... 30


def test_load_by_layer_by_hand(tmp_path) -> None:
    # Half of the four experts share evenly: log 2 over log 4. Without tokens nothing can be said.
    loads = ((1, [2, 2, 0, 0]), (3, [0] * 4))
    write(tmp_path, [line(10, layer, 0, tokens, bins=1) for layer, tokens in loads])
    assert load_by_layer(tmp_path, CONFIG) == [
        {
            "layer": 1,
            "max_over_mean": 2.0,
            "entropy": pytest.approx(0.5),
            "dead_experts": 2,
            "shares": [0.5, 0.5, 0.0, 0.0],
        },
        {
            "layer": 3,
            "max_over_mean": None,
            "entropy": None,
            "dead_experts": 4,
            "shares": [0.0] * 4,
        },
    ]


def test_collect_result_of_a_dense_model_has_no_load(tmp_path) -> None:
    (_write_run(tmp_path) / "routing.jsonl").unlink()
    dense = small_config(routing={"method": "dense"}, train={"max_steps": 10})
    result = collect_result(tmp_path, dense)
    assert {result[name] for name in ("layers", "load_max_over_mean", "dead_experts")} == {None}


def test_collect_result_of_an_unfinished_training_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="checkpoint is of step 5, not of the last one, 10"):
        collect_result(_write_run(tmp_path, step=5), CONFIG)


def test_read_metrics_leaves_out_what_is_not_finite_and_a_cut_line(tmp_path) -> None:
    path = _write_metrics(tmp_path, {1: None, 2: 0.5}, end='{"step": 3, "lo')
    assert read_metrics(path, 8) == ([[2, 0.5]], [])


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no line with a finite loss"), ("{\n{}\n", "metrics.jsonl: line 1: ")],
)
def test_read_metrics_damaged_file_is_named(tmp_path, text, message) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_metrics(tmp_path / "metrics.jsonl", 8)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema": 99}'])
def test_read_json_damaged_file_says_what_to_do(tmp_path, text) -> None:
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    with pytest.raises(
        DataError, match=r"result\.json: .*remove it, and the same command makes it again"
    ):
        read_json(tmp_path / "result.json")
