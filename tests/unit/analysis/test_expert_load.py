"""Summaries of routing.jsonl: sums by hand, damaged files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from promoe_ds.analysis.expert_load import LayerLoad, read_routing_log, summarise_load
from promoe_ds.errors import DataError


def _line(step: int, layer: int, bin_: int, tokens: list[int], traffic: int = 0) -> dict:
    return {"step": step, "layer": layer, "timestep_bin": bin_, "timestep_bins": 2, "tokens_per_expert": tokens,
            "conditional_tokens": sum(tokens), "unconditional_tokens": 1,
            "prototype_similarity": step / 100, "layer_bytes_exchanged": traffic}


LINES = [_line(10, 1, 0, [3, 1], 50), _line(10, 1, 1, [0, 4], 50), _line(20, 1, 0, [8, 0], 70), _line(20, 3, 0, [0, 0])]


def _write(folder: Path, lines: list[str]) -> Path:
    (folder / "routing.jsonl").write_text("\n".join(lines))
    return folder


def test_summary_adds_bins_and_steps_and_counts_traffic_once_a_step(tmp_path) -> None:
    first, second = summarise_load(read_routing_log(_write(tmp_path, [json.dumps(line) for line in LINES])))
    assert (first.layer, first.tokens_per_expert, first.conditional_tokens, first.unconditional_tokens) == (1, [11, 5], 16, 3)
    assert first.bytes_exchanged == 50 + 70
    assert first.prototype_similarity == 0.2
    assert first.shares == [11 / 16, 5 / 16]
    assert first.max_over_mean == 11 / 8
    assert first.coefficient_of_variation == pytest.approx(3 / 8)
    assert (second.layer, second.shares) == (3, [0.0, 0.0])
    assert math.isnan(second.max_over_mean)
    assert math.isnan(second.coefficient_of_variation)


def test_summary_last_steps_leaves_older_ones_out() -> None:
    assert summarise_load(LINES, last_steps=10)[0].tokens_per_expert == [8, 0]


def test_read_cut_last_line_is_left_out(tmp_path) -> None:
    lines = [json.dumps(LINES[0]), json.dumps(LINES[1])[:30]]
    assert len(read_routing_log(_write(tmp_path, lines))) == 1


@pytest.mark.parametrize(("lines", "message"), [
    ([], "is empty"), (["{", json.dumps(LINES[0])], "line 1: not JSON"), (['{"step": 3}', "{}"], "line 1: layer is missing")])
def test_read_damaged_log_is_named(tmp_path, lines, message) -> None:
    with pytest.raises(DataError, match=message):
        read_routing_log(_write(tmp_path, lines))


def test_read_missing_log_names_the_folder(tmp_path) -> None:
    with pytest.raises(DataError, match="no routing statistics there"):
        read_routing_log(tmp_path / "nowhere")


def test_even_load_is_one() -> None:
    load = LayerLoad(layer=0, tokens_per_expert=[5, 5, 5], conditional_tokens=15, unconditional_tokens=0,
                     prototype_similarity=0.0, bytes_exchanged=0)
    assert (load.max_over_mean, load.coefficient_of_variation) == (1.0, 0.0)
