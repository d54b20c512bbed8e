"""Damaged lines: every reader leaves them out with a reason, whatever is wrong with them, and goes on."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

from promoe_ds.analysis.expert_load import read_routing_log
from promoe_ds.analysis.expert_load.live import Follower
from promoe_ds.analysis.expert_load.report import render
from promoe_ds.analysis.expert_load.terminal import findings_text
from promoe_ds.analysis.expert_load.valid import problem_of
from promoe_ds.analysis.expert_load.view import RunView
from promoe_ds.errors import DataError

from .routing_logs import EXCHANGES, detail, interval, line, old, write

TOP: list[tuple[dict[str, Any], str]] = [
    ({"step": 0}, "step=0 is no whole number from 1 on"),
    ({"step": 7.5}, "step=7.5 is no whole number"),
    ({"step": True}, "step=True is no whole number"),
    ({"layer": -1}, "layer=-1 is no whole number"),
    ({"timestep_bin": 2}, "timestep_bin=2 of timestep_bins=2: the bin must be less"),
    ({"timestep_bin": -1}, "timestep_bin=-1 is no whole number from 0 on"),
    ({"timestep_bins": 10**9}, "the bins at most 10,000"),
    ({"tokens_per_expert": None}, "tokens_per_expert=None is no list of counts"),
    ({"tokens_per_expert": "abcd"}, "is no list of counts"),
    ({"tokens_per_expert": []}, "is no list of counts"),
    ({"tokens_per_expert": [-5, 1, 1, 1]}, "is no list of counts"),
    ({"tokens_per_expert": [1, 2, 3, 10**30]}, "is no list of counts"),
    ({"conditional_tokens": -1}, "conditional_tokens=-1 is no whole number"),
    ({"prototype_similarity": "high"}, "prototype_similarity='high' is no number"),
    ({"gate_mean": 10**400}, "is no number"),
    ({"gate_sum_per_expert": [1.0]}, "is no list of a number for each of its 4 experts"),
    ({"layer_detail": 3}, "layer_detail=3 is no JSON object")]
DETAIL: list[tuple[dict[str, Any], str]] = [
    ({"ep_size": 3}, "layer_detail.ep_size=3 does not divide its 4 experts"),
    ({"ep_size": 0}, "layer_detail.ep_size=0 does not divide"),
    ({"ranks": None}, "layer_detail.ranks=None is no whole number"),
    ({"rank_max_over_mean": "1"}, "layer_detail.rank_max_over_mean='1' is no number"),
    ({"prototype_to_centroid": [0.1]}, "layer_detail.prototype_to_centroid=[0.1] is no list of a number for each"),
    ({"prototype_to_other_centroids": None}, "layer_detail.prototype_to_other_centroids=None"),
    ({"prototype_similarity_matrix": [[1.0]]}, "is no table of 4 by 4 numbers"),
    ({"experts": [0, 0, 7, 1]}, "does not name each of the experts 0 ... 3 once"),
    ({"exchanges": [1]}, "layer_detail.exchanges=[1] is no JSON object"),
    ({"exchanges": {"counts": {"seconds": -1.0}}}, "layer_detail.exchanges.counts.seconds=-1.0 is no time"),
    ({"tokens_per_class": {"counts": [[1, 2]]}}, "has no counts by row for each of its 4 experts"),
    ({"tokens_per_position": {"counts": [[1, 2, 3, 4]] * 6}}, "has 6 patches, which are no square image")]
CASES = [*TOP, *(({"layer_detail": detail(4, **values)}, message) for values, message in DETAIL)]


@pytest.mark.parametrize(("values", "message"), CASES, ids=[message for _, message in CASES])
def test_damaged_line_is_left_out_with_a_reason_by_every_reader(tmp_path: Path, values, message) -> None:
    damaged = {**interval(10, tokens=[1, 1, 1, 1])[0], **values}
    write(tmp_path, [*interval(5), damaged, *interval(10)[1:]])
    view = RunView.open(tmp_path)
    assert view.log.notes[0].startswith("1 line left out (line 5: ") and message in view.log.notes[0]
    assert view.log.tokens_TLE[1].tolist() == [[10, 1, 2, 4], [20, 6, 3, 8]]
    assert html.escape(message) in render([view])  # the page is built, and says so
    with pytest.raises(DataError, match="line 5: "):
        read_routing_log(tmp_path)
    follower = Follower(tmp_path)
    follower.look()
    assert follower.view().log.tokens_TLE.tolist() == view.log.tokens_TLE.tolist()


@pytest.mark.parametrize("record", [
    *interval(5), old(interval(5)[0]), line(5, 1, 0, [0, 0, 0, 0], prototype_similarity=None, gate_mean=None),
    line(5, 1, 0, [1, 2, 3, 4], layer_detail=detail(experts=[1, 0, 3, 2], rank_max_over_mean=None,
                                                    prototype_to_centroid=[None, 0, 1, -0.5]))])
def test_sound_line_is_taken(record) -> None:
    assert problem_of(json.loads(json.dumps(record))) == ""


def test_seconds_and_matrix_that_were_not_logged_are_gaps_and_hidden(tmp_path: Path) -> None:
    """Backends that do not time exchanges write null, and the matrix comes now and then."""
    lines = []
    for step in (5, 10, 15):
        for each in interval(step):
            if each["timestep_bin"] == 0:
                each["layer_detail"]["exchanges"] = {name: {"bytes": 3, "seconds": None} for name in EXCHANGES[1:]}
                if step != 10:
                    del each["layer_detail"]["prototype_similarity_matrix"]
                each["layer_detail"]["experts"] = [0, 1, 2, 3] if step < 15 else [3, 2, 1, 0]
                if step == 10:
                    each["layer_detail"]["prototype_similarity_matrix"][0][1] = 0.25
            lines.append(each)
    view = RunView.open(write(tmp_path, lines))
    assert view.log.matrix_LEE[0, 0, 1] == 0.25  # by the order of its own line, not by the newest
    text = render([view])
    assert "Layer 1: similarity of prototypes" in text and "Waiting for exchanges" not in text
    findings_text(view)
