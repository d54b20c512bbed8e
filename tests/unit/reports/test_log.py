"""Logs as arrays: sums, branches, damage, old and young versions, moved experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from promoe_ds.errors import DataError
from promoe_ds.moe.collectives import EXCHANGES
from promoe_ds.reports import records
from promoe_ds.reports.log import load_log, read_columns
from promoe_ds.training.metrics import append_lines

from .routing_logs import detail, interval, line, old, write


def test_exchanges_are_those_that_are_timed() -> None:
    assert records.EXCHANGES == EXCHANGES


def test_published_schema_is_that_of_the_reader() -> None:
    assert (
        json.loads((Path(__file__).parents[3] / "docs/reference/routing.schema.json").read_text())
        == records.json_schema()
    )


def test_log_holds_every_count_where_it_belongs(tmp_path) -> None:
    log = load_log(write(tmp_path, interval(5, 10)))
    assert (log.layers, log.steps_T.tolist(), log.covered_T.tolist(), log.bins, log.experts) == (
        [1, 3],
        [5, 10],
        [5, 5],
        2,
        4,
    )
    for t, step in enumerate((5, 10)):
        for row, layer in enumerate((1, 3)):
            for bin_ in (0, 1):
                assert log.tokens_TLQE[t, row, bin_].tolist() == [step, layer, bin_ + 1, 4]
    assert log.gates_TLE[0, 0].tolist() == [0.5 * n for n in (10, 2, 3, 8)]
    assert log.tokens_TLE[1].tolist() == [[20, 2, 3, 8], [20, 6, 3, 8]]
    assert log.null_TL.tolist() == [[6, 6]] * 2
    assert log.bytes_TL.tolist() == [
        [500, 500],
        [1000, 1000],
    ]  # stated on every bin's line, counted once
    assert log.wait_TLX[0, 0].tolist() == [0.25] * 5
    assert (log.ep_size, log.ranks, log.notes) == (2, 2, [])
    np.testing.assert_allclose(log.to_centroid_TLE[0, 0], [0, 0.1, 0.2, 0.3], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"gate_mean": float("inf")}, "JSON is malformed"),
        ({"prototype_similarity": float("nan")}, "JSON is malformed"),
        ({"gate_mean": 10**400}, "$.gate_mean"),
        ({"prototype_similarity": "x"}, "$.prototype_similarity"),
        ({"step": "five"}, "$.step"),
        ({"step": 5.5}, "$.step"),
        ({"step": 0}, "$.step"),
        ({"steps": -1}, "$.steps"),
        ({"schema": "2"}, "$.schema"),
        ({"layer": 2**60}, "$.layer"),
        ({"tokens_per_expert": None}, "$.tokens_per_expert"),
        ({"tokens_per_expert": [True, 1, 1, 1]}, "$.tokens_per_expert[0]"),
        (
            {"tokens_per_expert": [1, 2], "gate_sum_per_expert": None, "layer_detail": None},
            "has 2 experts",
        ),
        ({"timestep_bin": 2}, "timestep_bin=2"),
        ({"timestep_bins": 10**9}, "$.timestep_bins"),
        ({"gate_sum_per_expert": [1.0]}, "gate_sum_per_expert"),
        ({"layer_detail": 3}, "$.layer_detail"),
        ({"layer_detail": {"ep_size": 2}}, "ranks"),
        ({"layer_detail": detail(ep_size=3)}, "layer_detail.ep_size=3"),
        ({"layer_detail": detail(experts=[0, 0, 1, 2])}, "layer_detail.experts"),
        (
            {"layer_detail": detail(prototype_similarity_matrix=[[1.0]])},
            "layer_detail.prototype_similarity_matrix",
        ),
        (
            {"layer_detail": detail(exchanges={"counts": {"seconds": -1.0}})},
            "$.layer_detail.exchanges.counts.seconds",
        ),
        (
            {"layer_detail": detail(tokens_per_class={"counts": [[1, 2]]})},
            "layer_detail.tokens_per_class",
        ),
        (
            {"layer_detail": detail(tokens_per_position={"steps": 5, "counts": [[1] * 4] * 3})},
            "layer_detail.tokens_per_position",
        ),
        (
            {"layer_detail": detail(tokens_per_position={"counts": [[1] * 4] * 4, "columns": 3})},
            "no image of 3 columns",
        ),
    ],
)
def test_log_broken_line_is_named_and_left_out(tmp_path, change, field) -> None:
    lines = interval(5, 10)
    log = load_log(write(tmp_path, [*lines[:4], {**lines[4], **change}, *lines[5:]]))
    assert log.notes[0].startswith("1 line left out (line 5: ") and field in log.notes[0]
    assert log.tokens_TLQE[1, :, 0].tolist() == [[0] * 4, [10, 3, 1, 4]]


def test_log_fields_of_a_later_minor_change_are_ignored_and_old_ones_may_lack(tmp_path) -> None:
    lines = [{**each, "new": [1]} for each in interval(5)]
    for each in lines:
        del each["load_cv"], each["steps"]
    assert load_log(write(tmp_path, lines)).covered_T.tolist() == [0]


_TENS = interval(10, 20, 30, 40, length=10, tokens=[1, 1, 1, 1])


@pytest.mark.parametrize(
    ("lines", "steps", "covered", "second", "note"),
    [
        (
            [*interval(5, 10), json.dumps(interval(15)[0])[:50]],
            [5, 10],
            10,
            [20, 2, 3, 8],
            "the last line is cut off: the run was interrupted, or is writing it now",
        ),
        (
            [*interval(5, 10, 15), *interval(10, tokens=[7] * 4), *interval(20, length=10)],
            [5, 10, 20],
            20,
            [14] * 4,
            "the run went back from step 15 to 5; repeated steps count once",
        ),
        (
            [*interval(5), *interval(10, length=2)],
            [5, 10],
            7,
            [20, 2, 3, 8],
            "3 of 10 steps are not covered",
        ),
        # A resume with a longer train.log_every: its first interval begins before the last ones
        # that the log holds, or within one.
        (
            [*_TENS, *interval(100, length=80)],
            [10, 20, 100],
            100,
            [2] * 4,
            "the run went back from step 40 to 20; repeated steps count once",
        ),
        (
            [*_TENS, *interval(100, length=65)],
            [10, 20, 30, 40, 100],
            105,
            [2] * 4,
            "5 of 100 steps count twice: a resume began within a log interval",
        ),
    ],
)
def test_log_after_an_interruption_counts_each_step_once_as_it_was_done_last(
    tmp_path, lines, steps, covered, second, note
) -> None:
    log = load_log(write(tmp_path, lines, end=""))
    assert (log.steps_T.tolist(), log.covered_T.sum()) == (steps, covered)
    assert log.tokens_TLE[1, 0].tolist() == second
    assert len(log.notes) == 1 and log.notes[0].startswith(note)


def test_columns_have_the_lines_that_count_in_order_and_no_others(tmp_path) -> None:
    """A step repeated by a resume, and another number of noise levels after it."""
    lines = [*interval(5, 10), *interval(10, layers=(3, 1), tokens=[7, 6, 5, 4])]
    lines += [line(15, 3, bin_, [3, 1, 1, 1], bins=3) for bin_ in (0, 2)]
    columns = read_columns(write(tmp_path, lines))
    names = ("step", "layer", "timestep_bin", "timestep_bins")
    places = list(zip(*(columns[name][::4].tolist() for name in names), strict=True))
    both = [(step, layer, bin_, 2) for step in (5, 10) for layer in (1, 3) for bin_ in (0, 1)]
    assert places == [*both, (15, 3, 0, 3), (15, 3, 2, 3)]
    assert columns["expert"].tolist() == [0, 1, 2, 3] * 10
    assert columns["tokens"].reshape(-1, 4)[3:5].tolist() == [[5, 3, 2, 4], [7, 6, 5, 4]]
    assert columns["gate_sum"].tolist() == (columns["tokens"] / 2).tolist()


def test_log_with_other_noise_levels_keeps_all_but_the_figures_by_level(tmp_path) -> None:
    """logging.timestep_bins may change at a resume: only what goes by level begins anew."""
    lines = interval(5, 10)
    lines += [line(15, layer, bin_, [3, 1, 1, 1], bins=3) for layer in (1, 3) for bin_ in (0, 1, 2)]
    log = load_log(write(tmp_path, lines))
    assert (log.steps_T.tolist(), log.covered_T.sum(), log.bins) == ([5, 10, 15], 15, 3)
    assert log.tokens_TLE[:, 0].tolist() == [[10, 2, 3, 8], [20, 2, 3, 8], [9, 3, 3, 3]]
    assert log.tokens_TLQE[:2].sum() == 0 and log.tokens_TLQE[2, 1].tolist() == [[3, 1, 1, 1]] * 3
    assert len(log.notes) == 1 and "into 3 bins from step 15 on" in log.notes[0]


def test_log_of_schema_1_is_read_and_its_gaps_are_said(tmp_path) -> None:
    log = load_log(write(tmp_path, [*map(old, interval(5)), *interval(10)]))
    assert log.tokens_TLQE[:, 0, 0].tolist() == [[5, 1, 1, 4], [10, 1, 1, 4]]
    assert np.isnan(log.gates_TLE[0]).all() and not np.isnan(log.gates_TLE[1]).any()
    assert "4 of 8 lines have schema 1" in log.notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"nonsense\n", "line 1: JSON is malformed"),
        (b"[1, 2]\n", "line 1: Expected `object`"),
        (b'{"step": 3}\n', "line 1: .*`layer`"),
        (b'{"step": 3, "lay', "no complete line"),
        (b"\x00\xff\x80binary", "line 1: JSON"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "line 1: JSON"),
        (
            json.dumps({**line(5, 1, 0, [1, 2]), "schema": 9, "step": "new"}).encode(),
            "line 1: schema 9 is not one of 1, 2",
        ),
    ],
)
def test_log_without_a_record_is_refused_with_a_reason(tmp_path, content, message) -> None:
    (tmp_path / "routing.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_log(tmp_path)


def test_log_of_moved_experts_keeps_their_first_numbers(tmp_path) -> None:
    order, tokens = [2, 0, 3, 1], [20, 0, 30, 10]
    details = {
        "experts": order,
        "tokens_per_class": {"steps": 5, "counts": [tokens]},
        "prototype_similarity_matrix": [[1, 0.7, 0, 0], *[[0] * 4] * 3],
    }
    moved = interval(10, tokens=tokens, details=details)
    log = load_log(write(tmp_path, [*interval(5), *moved]))
    assert log.tokens_TLQE[1, 0, 0].tolist() == [0, 10, 20, 30]
    assert log.order_LE.tolist() == [order, order]
    np.testing.assert_allclose(log.to_centroid_TLE[1, 0], [0.1, 0.3, 0.0, 0.2], rtol=1e-6)
    assert log.matrix_LEE[0][2, 0] == 0.7
    assert log.table("tokens_per_class", 1, log.window()).tolist() == [[0, 10, 20, 30]]


@pytest.mark.parametrize(("asked", "first"), [(None, 185), (7, 195), (1, 200)])
def test_log_window_is_the_last_tenth_or_as_asked(tmp_path, asked, first) -> None:
    log = load_log(write(tmp_path, interval(*range(5, 205, 5))))
    assert log.steps_T[log.window(asked)].tolist() == list(range(first, 205, 5))


def test_log_many_tables_are_thinned_and_lose_no_count(tmp_path) -> None:
    details = {"tokens_per_class": {"steps": 5, "counts": [[1, 2, 3, 4]]}}
    log = load_log(write(tmp_path, interval(*range(5, 1005, 5), layers=(1,), details=details)))
    assert len(log.tables["tokens_per_class"][1]) <= 64
    assert log.table("tokens_per_class", 1, slice(0, None)).tolist() == [[200, 400, 600, 800]]


def test_log_of_values_that_were_not_finite_has_gaps_there(tmp_path) -> None:
    lines = interval(5)
    lines[0]["gate_sum_per_expert"][2] = None
    lines[0]["layer_detail"]["prototype_similarity_matrix"][0][1] = None
    lines[0]["layer_detail"]["prototype_to_centroid"][3] = None
    append_lines(tmp_path / "routing.jsonl", [{**lines[0], "gate_mean": float("nan")}, *lines[1:]])
    log = load_log(tmp_path)
    assert np.isnan(log.gates_TLE[0, 0]).tolist() == [False, False, True, False]
    assert np.isnan(log.matrix_LEE[0, 0, 1]) and np.isnan(log.to_centroid_TLE[0, 0, 3])
    assert log.tokens_TLQE[0, 0, 0].tolist() == [5, 1, 1, 4]


def test_log_written_by_version_0_1_0_is_read() -> None:
    log = load_log(Path(__file__).parent / "files" / "routing_0.1.0.jsonl")
    assert (log.layers, log.steps_T.tolist(), log.bins, log.notes) == ([1], [10, 20], 10, [])
    assert log.tokens_TLE[:, 0].tolist() == [[1697, 2330, 4982, 15], [2089, 2129, 5038, 24]]
    assert log.rank_uneven_TL[:, 0].tolist() == pytest.approx([1.107491, 1.090948], rel=1e-5)
    assert list(log.tables) == ["tokens_per_class", "tokens_per_position"]
