"""A run's figures and the statistics over seeds, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from promoe_ds.errors import DataError
from promoe_ds.reports.comparison.results import (
    METRICS,
    collect_result,
    load_by_layer,
    read_json,
    read_metrics,
    summarise,
)

from ..builders import small_config
from .synthetic import synthetic_result


def _result(**figures: float | None) -> dict:
    return {**dict.fromkeys(METRICS), **figures}


def _metric_line(step: int, loss: float | None, images_per_second: float = 100.0) -> dict:
    return {
        "step": step,
        "loss": loss,
        "loss_diffusion": loss,
        "images_per_second": images_per_second,
    }


def test_summarise_leaves_out_what_a_run_has_not() -> None:
    summary = summarise({0: _result(final_loss=1.0, frechet=3.0), 1: _result(final_loss=2.0)})
    assert summary["final_loss"]["mean"] == 1.5
    assert summary["frechet"] == {"n": 1, "mean": 3.0, "sd": None, "min": 3.0, "max": 3.0}
    assert summary["dead_experts"] is None


def test_paired_differences_pair_by_seed_by_hand() -> None:
    mine = {0: _result(final_loss=5.0), 1: _result(final_loss=7.0), 2: _result(final_loss=100.0)}
    first = {1: _result(final_loss=4.0), 0: _result(final_loss=3.0), 3: _result(final_loss=0.0)}
    # Seeds 0 and 1: 2 and 3; seed 2 has no partner.
    assert summarise(mine, first)["final_loss"] == {
        "n": 2,
        "mean": 2.5,
        "sd": pytest.approx(math.sqrt(0.5)),
        "min": 2.0,
        "max": 3.0,
    }
    assert summarise(mine, first)["accuracy"] is None


def _write_run(folder: Path, *, step: int = 10) -> Path:
    (folder / "judgement.json").write_text(
        json.dumps({"checkpoint_step": step, "device": "cpu", "images": None, "heldout_loss": None})
    )
    metrics = [_metric_line(5, 2.0), _metric_line(10, 1.0)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    # Of ten steps the last fifth are 9 and 10: the line of step 5 does not count.
    routing = [
        {
            "step": step,
            "layer": layer,
            "tokens_per_expert": tokens,
            "conditional_tokens": 4,
            "unconditional_tokens": 0,
            "prototype_similarity": 0.0,
            "layer_bytes_exchanged": 0,
        }
        for step, layer, tokens in (
            (5, 1, [4, 0, 0, 0]),
            (10, 1, [1, 1, 1, 1]),
            (10, 3, [3, 1, 0, 0]),
        )
    ]
    (folder / "routing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in routing))
    return folder


def test_collect_result_reads_load_of_the_last_fifth_and_averages_layers(tmp_path) -> None:
    result = collect_result(_write_run(tmp_path), small_config(train={"max_steps": 10}))
    assert (result["final_loss"], result["loss_curve"], result["checkpoint_step"]) == (
        1.0,
        [[5, 2.0], [10, 1.0]],
        10,
    )
    assert [layer["max_over_mean"] for layer in result["layers"]] == [1.0, 3.0]
    assert (result["load_max_over_mean"], result["dead_experts"]) == (2.0, 1.0)
    assert (result["frechet"], result["accuracy"], result["images"]) == (None, None, None)
    assert (
        set(METRICS)
        <= result.keys()
        == synthetic_result(0).keys() - {"seed", "samples", "sample_seed", "environment"}
    )


def test_collect_result_averages_the_last_tenth_and_takes_the_median_time_without_the_first_line(
    tmp_path,
) -> None:
    _write_run(tmp_path)
    lines = [
        _metric_line(step, float(step), 1.0 if step == 1 else 256 * step) for step in range(1, 31)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = collect_result(
        tmp_path, small_config(train={"max_steps": 10, "global_batch_size": 256})
    )
    assert result["final_loss"] == 29.0  # 28, 29, 30
    assert result["step_ms"] == pytest.approx(1000 / 16)  # of 2 ... 30


def test_load_by_layer_by_hand(tmp_path) -> None:
    _write_run(tmp_path)
    lines = [
        {
            "step": 10,
            "layer": layer,
            "tokens_per_expert": tokens,
            "conditional_tokens": 4,
            "unconditional_tokens": 0,
            "prototype_similarity": 0.0,
            "layer_bytes_exchanged": 0,
        }
        for layer, tokens in ((1, [2, 2, 0, 0]), (3, [0] * 4))
    ]
    (tmp_path / "routing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Half of the four experts share evenly: log 2 over log 4. Without tokens nothing can be said.
    assert load_by_layer(tmp_path, small_config(train={"max_steps": 10})) == [
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
    result = collect_result(
        tmp_path, small_config(routing={"method": "dense"}, train={"max_steps": 10})
    )
    assert (result["layers"], result["load_max_over_mean"], result["dead_experts"]) == (
        None,
        None,
        None,
    )


def test_collect_result_of_an_unfinished_training_is_refused(tmp_path) -> None:
    with pytest.raises(
        DataError, match="the newest checkpoint is of step 5, not of the last one, 10"
    ):
        collect_result(_write_run(tmp_path, step=5), small_config(train={"max_steps": 10}))


def test_read_metrics_leaves_out_what_is_not_finite_and_a_cut_line(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        f'{json.dumps(_metric_line(1, None))}\n{json.dumps(_metric_line(2, 0.5))}\n{{"step": 3, "lo'
    )
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
