"""A run's figures and the statistics over seeds, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from promoe_ds.analysis.comparison.results import (
    METRICS,
    collect_result,
    describe,
    describe_layer,
    final_loss,
    paired_differences,
    read_json,
    read_metrics,
    step_milliseconds,
    summarise,
)
from promoe_ds.analysis.expert_load import LayerLoad
from promoe_ds.errors import DataError

from ..builders import small_config
from .made_up import made_up_result


def _result(**figures: float | None) -> dict:
    return {**dict.fromkeys(METRICS), **figures}


def _metric_line(step: int, loss: float | None, images_per_second: float = 100.0) -> dict:
    return {"step": step, "loss": loss, "loss_diffusion": loss, "images_per_second": images_per_second}


def test_describe_by_hand() -> None:
    # 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14 over n - 1 = 2.
    assert describe([1.0, 2.0, 6.0]) == {"n": 3, "mean": 3.0, "sd": pytest.approx(math.sqrt(7)), "min": 1.0, "max": 6.0}


def test_describe_one_value_has_no_deviation() -> None:
    assert describe([4.0]) == {"n": 1, "mean": 4.0, "sd": None, "min": 4.0, "max": 4.0}


def test_summarise_leaves_out_what_a_run_has_not() -> None:
    summary = summarise({0: _result(final_loss=1.0, frechet=3.0), 1: _result(final_loss=2.0)})
    assert summary["final_loss"]["mean"] == 1.5
    assert summary["frechet"] == {"n": 1, "mean": 3.0, "sd": None, "min": 3.0, "max": 3.0}
    assert summary["dead_experts"] is None


def test_paired_differences_pair_by_seed_by_hand() -> None:
    mine = {0: _result(final_loss=5.0), 1: _result(final_loss=7.0), 2: _result(final_loss=100.0)}
    first = {1: _result(final_loss=4.0), 0: _result(final_loss=3.0), 3: _result(final_loss=0.0)}
    # Seeds 0 and 1: 2 and 3; seed 2 has no partner.
    assert paired_differences(mine, first)["final_loss"] == {
        "n": 2, "mean": 2.5, "sd": pytest.approx(math.sqrt(0.5)), "min": 2.0, "max": 3.0}
    assert paired_differences(mine, first)["accuracy"] is None


def test_final_loss_averages_the_last_tenth_of_the_lines() -> None:
    lines = [_metric_line(step, float(step)) for step in range(1, 31)]
    assert final_loss(lines) == 29.0  # 28, 29, 30
    assert final_loss(lines[:4]) == 4.0  # at least one


def test_step_milliseconds_is_a_median_without_the_first_line() -> None:
    # 8 images at 1000, 400, 800 a second: 8, 20, 10 ms.
    lines = [_metric_line(1, 1.0, 1.0), _metric_line(2, 1.0, 1000.0), _metric_line(3, 1.0, 400.0), _metric_line(4, 1.0, 800.0)]
    assert step_milliseconds(lines, 8) == 10.0
    assert step_milliseconds(lines[:1], 8) is None


def test_describe_layer_by_hand() -> None:
    load = LayerLoad(layer=3, tokens_per_expert=[2, 2, 0, 0], conditional_tokens=4, unconditional_tokens=0,
                     prototype_similarity=0.0, bytes_exchanged=0)
    # Half of the four experts share evenly: log 2 over log 4.
    assert describe_layer(load) == {"layer": 3, "max_over_mean": 2.0, "entropy": pytest.approx(0.5), "dead_experts": 2,
                                    "shares": [0.5, 0.5, 0.0, 0.0]}


def test_describe_layer_without_tokens_has_no_evenness() -> None:
    load = LayerLoad(layer=1, tokens_per_expert=[0, 0], conditional_tokens=0, unconditional_tokens=4,
                     prototype_similarity=0.0, bytes_exchanged=0)
    assert describe_layer(load) == {"layer": 1, "max_over_mean": None, "entropy": None, "dead_experts": 2, "shares": [0.0, 0.0]}


def _write_run(folder: Path, *, step: int = 10) -> Path:
    (folder / "judgement.json").write_text(json.dumps({"checkpoint_step": step, "device": "cpu", "images": None,
                                                        "heldout_loss": None}))
    metrics = [_metric_line(5, 2.0), _metric_line(10, 1.0)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    # Of ten steps the last fifth are 9 and 10: the line of step 5 does not count.
    routing = [{"step": step, "layer": layer, "tokens_per_expert": tokens, "conditional_tokens": 4, "unconditional_tokens": 0,
                "prototype_similarity": 0.0, "layer_bytes_exchanged": 0}
               for step, layer, tokens in ((5, 1, [4, 0, 0, 0]), (10, 1, [1, 1, 1, 1]), (10, 3, [3, 1, 0, 0]))]
    (folder / "routing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in routing))
    return folder


def test_collect_result_reads_load_of_the_last_fifth_and_averages_layers(tmp_path) -> None:
    result = collect_result(_write_run(tmp_path), small_config(train={"max_steps": 10}))
    assert (result["final_loss"], result["loss_curve"], result["checkpoint_step"]) == (1.0, [[5, 2.0], [10, 1.0]], 10)
    assert [layer["max_over_mean"] for layer in result["layers"]] == [1.0, 3.0]
    assert (result["load_max_over_mean"], result["dead_experts"]) == (2.0, 1.0)
    assert (result["frechet"], result["accuracy"], result["images"]) == (None, None, None)
    assert set(METRICS) <= result.keys() == made_up_result(0).keys() - {"seed", "samples", "sample_seed", "environment"}


def test_collect_result_of_a_dense_model_has_no_load(tmp_path) -> None:
    (_write_run(tmp_path) / "routing.jsonl").unlink()
    result = collect_result(tmp_path, small_config(routing={"method": "dense"}, train={"max_steps": 10}))
    assert (result["layers"], result["load_max_over_mean"], result["dead_experts"]) == (None, None, None)


def test_collect_result_of_an_unfinished_training_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="the newest checkpoint is of step 5, not of the last one, 10"):
        collect_result(_write_run(tmp_path, step=5), small_config(train={"max_steps": 10}))


def test_read_metrics_leaves_out_what_is_not_finite_and_a_cut_line(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(_metric_line(1, None))}\n{json.dumps(_metric_line(2, 0.5))}\n{{\"step\": 3, \"lo")
    assert [line["step"] for line in read_metrics(path)] == [2]


@pytest.mark.parametrize(("text", "message"), [("", "no line with a finite loss"), ("{\n{}\n", "line 1: not JSON")])
def test_read_metrics_damaged_file_is_named(tmp_path, text, message) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema": 99}'])
def test_read_json_damaged_file_says_what_to_do(tmp_path, text) -> None:
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    with pytest.raises(DataError, match=r"result\.json: .*remove it, and the same command makes it again"):
        read_json(tmp_path / "result.json")
