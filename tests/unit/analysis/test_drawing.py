"""Figures as they are drawn: axes, styles that can be told apart, maps of many rows."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from promoe_ds.analysis.drawing.charts import Axes, Cells, Rows, bar_chart, cell_chart, line_chart, map_over_time, tick_words
from promoe_ds.analysis.drawing.png import write_png
from promoe_ds.analysis.drawing.scene import Line, Pixels, Rect, Scene, Text, palette, ramp


def lines_of(scene: Scene) -> list[Line]:
    return [shape for shape in scene.shapes if isinstance(shape, Line) and shape.tip]


def words_of(scene: Scene) -> list[str]:
    return [shape.words for shape in scene.shapes if isinstance(shape, Text)]


@pytest.mark.parametrize(("values", "percent", "words"), [
    ([0, 0.025, 0.05, 0.075], False, ["0.000", "0.025", "0.050", "0.075"]),
    ([0, 0.1, 0.2], False, ["0.0", "0.1", "0.2"]),
    ([0, 2500], False, ["0", "2500"]),
    ([0, 0.025, 0.05], True, ["0.0%", "2.5%", "5.0%"]),
    ([0, 0.05, 0.1], True, ["0%", "5%", "10%"]),
    ([1.0], False, ["1"])])
def test_tick_words_tell_neighbours_apart_exactly(values, percent, words) -> None:
    assert tick_words(values, percent=percent) == words


def test_line_chart_of_a_short_range_fills_its_width() -> None:
    """Noise levels from 0.1 to 0.9 are as wide as a million steps."""
    scene = line_chart("x", [("a", [0.1, 0.5, 0.9], [1.0, 2.0, 3.0])], Axes(x_name="sigma"))
    (line,) = lines_of(scene)
    assert line.points[-1][0] - line.points[0][0] > 0.8 * scene.width


@pytest.mark.parametrize(("count", "is_ordered"), [(13, False), (24, False), (48, False), (24, True), (40, True)])
def test_line_chart_of_many_lines_gives_each_a_look_of_its_own_and_names_it(count, is_ordered) -> None:
    names = [f"layer {place}" for place in range(count)]
    scene = line_chart("x", [(name, [0, 1], [0.0, 1.0]) for name in names], Axes(is_ordered=is_ordered))
    looks = {(line.color, line.dash) for line in lines_of(scene)}
    assert len(looks) == count
    if is_ordered:  # a ramp between the first and the last
        assert words_of(scene)[-2:] == [names[0], names[-1]]
        return
    # The legend shows lines as they are drawn, dashes and all.
    legend = {(shape.color, shape.dash) for shape in scene.shapes if isinstance(shape, Line) and shape.width == 2.0}
    assert legend == looks and set(names) <= set(words_of(scene))


@pytest.mark.parametrize("colors", [palette, ramp])
@pytest.mark.parametrize("count", [1, 12, 13, 64])
def test_colors_are_all_different(colors, count) -> None:
    assert len(set(colors(count))) == count


def test_bar_chart_draws_negative_values_to_the_left_of_zero() -> None:
    scene = bar_chart("x", [("a", 2.0, "2", 0), ("b", -1.0, "-1", 1), ("c", float("nan"), "none", 2)], mark=1.0, mark_name="one")
    up, down = (shape.box for shape in scene.shapes if isinstance(shape, Rect))
    assert down[0] + down[2] == pytest.approx(up[0]) and up[2] == pytest.approx(2 * down[2])
    assert scene.numbers == [["", "value"], ["a", 2.0], ["b", -1.0], ["c", ""]]


def test_map_of_many_rows_stays_low_and_shows_the_row_farthest_from_even() -> None:
    values = np.zeros((1000, 3))
    values[501, 1] = -1.0
    rows = Rows(names=[str(row) for row in range(1000)], shade=lambda x: x, ends=("less", "more"))
    scene = map_over_time("x", values, rows, [1, 2, 3])
    (picture, _) = (shape for shape in scene.shapes if isinstance(shape, Pixels))
    assert scene.height < 1000 and picture.rgba.shape[0] <= 400
    assert (picture.rgba[..., 3] > 0).sum() == 1
    assert scene.numbers[502] == ["501", 0.0, -1.0, 0.0] and len(scene.numbers) == 1001
    assert "Each line is 3 rows" in scene.note and {"less", "more"} <= set(words_of(scene))


def test_cells_without_room_for_numbers_tell_them_under_the_pointer() -> None:
    values = np.arange(4096.0).reshape(64, 64)
    cells = Cells(rows=[f"r{e}" for e in range(64)], columns=[f"c{e}" for e in range(64)], show="{:g}".format,
                  shade=lambda x: x / 4096, row_name="row")
    tips = [shape.tip for shape in cell_chart("x", values, cells).shapes if isinstance(shape, Rect) and shape.tip]
    assert tips[1] == "row r1: from c0 64 to c63 127" and len(tips) == 64


def test_png_draws_the_dashes_of_a_line_of_many_points(tmp_path) -> None:
    """Dashes go on from one segment to the next, however short these are."""
    for dash in (0, 1):
        scene = Scene(100, 40, "")
        scene.line([(x / 10, 20.0) for x in range(1000)], "#000000", width=2.0, dash=dash)
        write_png(scene, tmp_path / f"{dash}.png")
    dark = [(np.asarray(Image.open(tmp_path / f"{dash}.png").convert("L")) < 128).sum() for dash in (0, 1)]
    assert 0.4 < dark[1] / dark[0] < 0.65
