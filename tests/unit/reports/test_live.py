"""The view that follows a run: whole in a small terminal, whatever the size of the model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console, Group

from promoe_ds.errors import DataError
from promoe_ds.reports.expert_load import terminal
from promoe_ds.reports.expert_load.terminal import Follower, draw

from .routing_logs import detail, interval, line, write


def make_run(folder: Path, layers: int, experts: int) -> Follower:
    """Write a run of which the last layer's second expert is dead and the first layer is the least
    even.
    """
    lines, shared = [], detail(experts, prototype_similarity_matrix=None)
    for step in range(5, 135, 5):
        for layer in range(layers):
            tokens = [100 + layer] * experts
            tokens[0] = 1000 if layer == 0 else tokens[0]
            tokens[1] = 0 if layer == layers - 1 else tokens[1]
            lines.append(line(step, layer, 0, tokens, bins=1, layer_detail=shared))
    follower = Follower(write(folder, lines))
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
    rows = shown(make_run(tmp_path, layers, experts), width, height)
    assert len(rows) <= height and max(map(len, rows)) <= width
    assert rows[0].startswith("step 130: load of each expert")
    head = rows[1].split()
    assert head[:4] == ["layer", "experts", "max/mean", "dead"] and head[-2:] == ["so", "far"]
    layer_rows = [row for row in rows if row.strip()[:1].isdigit()]
    numbers = [int(row.split()[0]) for row in layer_rows]
    assert numbers == sorted(numbers) and 0 in numbers  # the least even layer is never cut
    if layers + 6 <= height:
        assert numbers == list(range(layers))
    else:
        assert f"and {layers - len(numbers)} layers that are more even" in rows
    # Blocks: one an expert where they fit, else the same number of experts in each.
    blocks = layer_rows[0].split()[1]
    assert len(blocks) == experts or f"(a block is {-(-experts // len(blocks))} experts" in rows[0]
    assert blocks[0] == "█" and "…" not in "".join(layer_rows)
    assert layer_rows[0].split()[2] == f"{1000 * experts / (1000 + 100 * (experts - 1)):.2f}"
    if layers - 1 in numbers:
        assert "×" in layer_rows[-1] and layer_rows[-1].split()[3] == "1"
    assert any("1 dead expert" in row for row in rows)


def test_view_of_experts_that_died_before_it_began_says_no_more_than_it_knows(tmp_path) -> None:
    text = "\n".join(shown(make_run(tmp_path, 3, 4), 200, 40))
    assert (
        "layer 2 expert 1 (dead since step 10 or before)" in text
    )  # 24 log steps of five are kept


def test_view_of_values_that_were_not_finite_has_gaps(tmp_path) -> None:
    follower = Follower(
        write(
            tmp_path,
            [each for step in (10, 20) for each in interval(step, prototype_similarity=None)],
        )
    )
    follower.look()
    assert any(
        row.split()[0] == "1" and "–" in row for row in shown(follower, 160, 24) if row.strip()
    )


def test_view_of_a_long_log_begins_near_its_end(tmp_path, monkeypatch) -> None:
    folder = write(tmp_path, [each for step in range(5, 505, 5) for each in interval(step)])
    monkeypatch.setattr(terminal, "_TAIL", 30_000)
    follower = Follower(folder)
    follower.look()
    log = follower.view.log
    assert 3 < len(log.steps_T) < 24 and log.steps_T[-1] == 500
    assert log.tokens_TLE[0].tolist() == [
        [2 * log.steps_T[0], 2, 3, 8],
        [2 * log.steps_T[0], 6, 3, 8],
    ]  # whole
    with (folder / "routing.jsonl").open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in interval(505))
    follower.look()
    assert follower.view.log.steps_T.tolist() == [*log.steps_T.tolist(), 505]


def test_view_goes_on_with_what_is_written_and_starts_anew_after_a_resume(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(terminal, "_KEPT", 2)
    follower = Follower(write(tmp_path, [*interval(5), "{broken"]))
    follower.look()
    first = follower.view
    assert first is follower.view  # nothing new: nothing is computed again
    with (tmp_path / "routing.jsonl").open("a") as file:
        file.write(
            (write(tmp_path / "more", interval(10, tokens=[1, 2])) / "routing.jsonl").read_text()[
                :-30
            ]
        )
    follower.look()
    assert follower.view.log.experts == 2  # of the newest line
    write(tmp_path, interval(5))
    follower.look()
    assert follower.view.log.steps_T.tolist() == [5]
    write(tmp_path, [{**each, "schema": 9} for step in (5, 10) for each in interval(step)])
    with pytest.raises(DataError, match="schema 9 is not one of 1, 2"):
        follower.look()
