"""The view that follows a run: whole in a small terminal, whatever the size of the model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console, Group

from promoe_ds.errors import DataError
from promoe_ds.reports.load import terminal
from promoe_ds.reports.load.terminal import Follower, draw

from .routing_logs import detail, interval, line, write


def make_run(folder: Path, layers: int, experts: int) -> Follower:
    """Write a run of which the last layer's second expert is dead and the first layer is the least
    even.
    """
    tokens_LE = [[100 + layer] * experts for layer in range(layers)]
    tokens_LE[0][0], tokens_LE[-1][1] = 1000, 0
    shared = detail(experts, prototype_similarity_matrix=None)
    lines = [
        line(step, layer, 0, tokens, bins=1, layer_detail=shared)
        for step in range(5, 135, 5)
        for layer, tokens in enumerate(tokens_LE)
    ]
    return looked(write(folder, lines))


def looked(folder: Path) -> Follower:
    follower = Follower(folder)
    follower.look()
    return follower


def shown(follower: Follower, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
    console.print(Group(*draw(follower.view, width, height)))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (160, 50), (60, 12)])
@pytest.mark.parametrize(("layers", "experts"), [(14, 12), (24, 64), (3, 4), (24, 128)])
def test_view_fits_into_the_terminal_and_keeps_what_matters(
    tmp_path, width, height, layers, experts
) -> None:
    title, head, *rows = shown(make_run(tmp_path, layers, experts), width, height)
    assert 2 + len(rows) <= height and max(map(len, [title, head, *rows])) <= width
    assert title.startswith("step 130: load of each expert")
    assert head.split()[:4] == ["layer", "experts", "max/mean", "dead"]
    assert head.rstrip().endswith("so far")
    cells = [row.split() for row in rows if row.strip()[:1].isdigit()]
    numbers = [int(row[0]) for row in cells]
    assert numbers == sorted(numbers) and 0 in numbers  # the least even layer is never cut
    left_out = layers - len(numbers)
    assert (left_out == 0) == (layers + 6 <= height)
    assert not left_out or f"and {left_out} layers that are more even" in rows
    # Blocks: one an expert where they fit, else the same number of experts in each.
    blocks, uneven = cells[0][1:3]
    assert len(blocks) == experts or f"(a block is {-(-experts // len(blocks))} experts" in title
    assert blocks[0] == "█" and uneven == f"{1000 * experts / (1000 + 100 * (experts - 1)):.2f}"
    assert layers - 1 not in numbers or ("×" in cells[-1][1] and cells[-1][3] == "1")
    assert any("1 dead expert" in row for row in rows)


def test_view_of_experts_that_died_before_it_began_says_no_more_than_it_knows(tmp_path) -> None:
    text = "\n".join(shown(make_run(tmp_path, 3, 4), 200, 40))
    assert (
        "layer 2 expert 1 (dead since step 10 or before)" in text
    )  # 24 log steps of five are kept


def test_view_of_values_that_were_not_finite_has_gaps(tmp_path) -> None:
    lines = interval(10, 20, prototype_similarity=None)
    rows = shown(looked(write(tmp_path, lines)), 160, 24)
    assert any(row.split()[0] == "1" and "–" in row for row in rows if row.strip())


def test_view_of_a_long_log_begins_near_its_end(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(terminal, "_TAIL", 30_000)
    follower = looked(write(tmp_path, interval(*range(5, 505, 5))))
    steps, tokens_LE = follower.view.log.steps_T.tolist(), follower.view.log.tokens_TLE[0]
    assert 3 < len(steps) < 24 and steps[-1] == 500
    assert tokens_LE.tolist() == [[2 * steps[0], 2, 3, 8], [2 * steps[0], 6, 3, 8]]  # whole
    with (tmp_path / "routing.jsonl").open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in interval(505))
    follower.look()
    assert follower.view.log.steps_T.tolist() == [*steps, 505]


def test_view_follows_what_is_written_and_starts_anew_after_a_resume(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(terminal, "_KEPT", 2)
    follower = looked(write(tmp_path, [*interval(5), "{broken"]))
    first = follower.view
    follower.look()
    assert first is follower.view  # nothing new: nothing is computed again
    more = write(tmp_path / "more", interval(10, tokens=[1, 2])) / "routing.jsonl"
    with (tmp_path / "routing.jsonl").open("a") as file:
        file.write(more.read_text()[:-30])
    follower.look()
    assert follower.view.log.experts == 2  # of the newest line
    write(tmp_path, interval(5))
    follower.look()
    assert follower.view.log.steps_T.tolist() == [5]
    write(tmp_path, [{**each, "schema": 9} for each in interval(5, 10)])
    with pytest.raises(DataError, match="schema 9 is not one of 1, 2"):
        follower.look()
