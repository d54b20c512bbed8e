"""What a report shows: every chart, files, and the page in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from promoe_ds.errors import ConfigError
from promoe_ds.reports import page as pages
from promoe_ds.reports.charts import Chart, csv_text, line_chart
from promoe_ds.reports.load.charts import load_over_time, overview_charts, traffic
from promoe_ds.reports.load.layer_charts import layer_charts
from promoe_ds.reports.load.page import build_page, export, write_report
from promoe_ds.reports.load.run import RunView, open_runs
from promoe_ds.reports.maps import heat_chart, map_over_time

from .routing_logs import detail, interval, line, old, write
from .test_expert_load import make_measured_run

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
#: Draws all figures, then sends the frame around: width of page and window; figures drawn, of them
# flat ones.
PROBE = """<script>addEventListener("load", async () => {
  document.querySelectorAll("details").forEach(e => e.open = true)
  await Promise.all([...charts].map(draw))
  const drawn = [...document.querySelectorAll(".chart canvas")]
  const flat = drawn.filter(e => e.getBoundingClientRect().height < 20)
  const width = document.documentElement.scrollWidth
  parent.postMessage([width, innerWidth, drawn.length, flat.length].join(), "*")
})</script>"""


def titles_of(text: str) -> list[str]:
    """Return the titles of a page's drawn figures."""
    return re.findall(r'class="chart" role="img" aria-label="([^"]+)"', text)


def test_patches_of_an_image_that_is_not_square_are_in_their_places(tmp_path) -> None:
    counts = [[patch, 1, 1, 1] for patch in range(8)]
    table = {"steps": 5, "counts": counts, "columns": 4}
    lines = interval(5, details={"tokens_per_position": table})
    view = RunView.open(write(tmp_path, lines))
    (chart,) = (each for each in layer_charts(view, 1) if "patch" in each.title)
    first = {(row, column): share for name, row, column, share, *_ in chart.rows[1:9]}
    assert first == {(p // 4, p % 4): pytest.approx(p / (p + 3)) for p in range(8)}


@pytest.mark.parametrize("count", [1, 2])
def test_page_has_every_chart_and_fetches_nothing(views, count) -> None:
    text = pages.render(build_page(views[:count]))
    for view in views[:count]:
        overview = [
            chart for section in overview_charts(view, views[:count]).values() for chart in section
        ]
        assert len(overview) == 14 and None not in overview
        for chart in [
            *overview,
            *(chart for layer in view.log.layers for chart in layer_charts(view, layer)),
        ]:
            assert titles_of(text).count(chart.title) == count
    body = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert not re.search(r"(src|href)=\"(?!#|data:)", body) and "default-src 'none'" in body
    assert "<b>&" not in body  # a run's name is no markup
    specs = [
        json.loads(spec)
        for spec in re.findall(r'<script type="application/json">(.*?)</script>', text)
    ]
    assert len(specs) == count * (14 + 2 * 7) and all(
        spec["data"]["format"]["type"] == "csv" for spec in specs
    )
    assert len(text) < 1.2e6 * count


def test_page_of_a_run_without_its_other_files_says_what_is_left_out(tmp_path) -> None:
    page = build_page(
        [
            RunView.open(
                write(tmp_path / "bare", [*interval(5), *interval(10, tokens=[0, 0, 0, 0])]),
                last_steps=5,
            )
        ]
    )
    assert "config.yaml is missing" in page.notes[0]
    shown = {part["kind"]: part for part in page.parts}
    assert shown["cards"]["items"] == [("Tokens routed", "0", "none in the window", "bad")]
    assert [level for level, *_ in shown["findings"]["items"]] == ["bad"]
    assert pages.render(page)


def test_page_of_an_old_log_shows_what_was_logged_then(tmp_path) -> None:
    view = RunView.open(write(tmp_path / "old", [old(each) for each in interval(5, 10)]))
    titles = titles_of(pages.render(build_page([view])))
    assert "Load over training" in titles and "Layer 3: load by noise level" in titles
    assert not any(
        "mean gate" in title or "Prototype to its own" in title or "Waiting" in title
        for title in titles
    )


def test_page_of_two_runs_puts_every_chart_under_its_own_name(tmp_path, monkeypatch) -> None:
    """What one run has and the other has not is named in its place, in the overview and layer by
    layer.
    """
    lines = interval(5, 10, details={"ep_size": 1, "rank_max_over_mean": None})
    first, second = (
        write(tmp_path / "one_run", lines),
        write(tmp_path / "one" / "run", [old(each) for each in lines]),
    )
    third = write(tmp_path / "two", interval(*range(5, 205, 5)))
    text = pages.render(build_page(open_runs([first, third])))
    windows = re.findall(r"Load of each expert<small>[\w ]+, last (\d+) steps", text)
    assert windows == ["5", "20"]
    assert re.findall(r"<i>([\w/]+)</i>Load of each rank<small>(\w+)", text) == [
        ("one_run", "Not"),
        ("two", "Rows"),
    ]
    views = open_runs([second, first])
    assert [view.name for view in views] == ["one/run", "one_run"]
    found = re.findall(
        r"<i>([\w/]+)</i>Layer 3: mean gate<small>(\w+)", pages.render(build_page(views))
    )
    assert found == [("one/run", "Not"), ("one_run", "The")]
    # Neither overwrites the other's files.
    monkeypatch.setattr(Chart, "png", lambda chart: b"")
    assert export(tmp_path / "out", views) == len(list((tmp_path / "out").rglob("*.png")))
    assert [view.name for view in open_runs([first, first])] == ["one_run (1)", "one_run (2)"]


def test_page_says_which_tables_were_not_logged(views, tmp_path) -> None:
    view = make_measured_run(tmp_path, [1, 2, 3, 4], 1.5)
    words = [part["text"] for part in build_page([view]).parts if part["kind"] == "text"]
    assert any("logging.class_counts=true, about 0.2 kB" in each for each in words)
    assert not any(
        "logging.class_counts" in part.get("text", "") for part in build_page(views[:1]).parts
    )


def test_page_of_many_layers_and_experts_stays_readable(tmp_path) -> None:
    """24 layers of 64 experts: low maps, and one colour for each line."""
    layers, shared = range(1, 48, 2), detail(64, ep_size=8)
    lines = [
        line(step, layer, 0, list(range(64)), bins=1, layer_detail=shared)
        for step in (5, 10)
        for layer in layers
    ]
    view = RunView.open(write(tmp_path, lines))
    charts = [
        *(
            chart
            for section in overview_charts(view, [view]).values()
            for chart in section
            if chart
        ),
        *layer_charts(view, 1),
    ]
    assert max(chart.spec["height"] for chart in charts) <= 800
    uneven = next(chart for chart in charts if chart.title == "Largest over mean load")
    color = uneven.spec["layer"][1]["encoding"]["color"]["scale"]
    assert color["domain"] == [f"layer {layer}" for layer in layers]
    assert len(set(color["range"])) == 24


def test_page_without_its_library_says_so(views, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ConfigError, match=r"promoe_ds\[report\]"):
        write_report(tmp_path / "x.html", views)


def test_export_writes_every_chart_as_png_and_csv(views, tmp_path) -> None:
    count = export(tmp_path / "out", views[:1])
    images = sorted((tmp_path / "out").glob("*.png"))
    assert count == len(images) == 14 + 2 * 7
    for path in images:
        assert Image.open(path).convert("L").getextrema() != (255, 255)
        rows = list(csv.reader(path.with_suffix(".csv").open()))
        assert len(rows) > 1 and len({len(row) for row in rows}) == 1, path
    loads = list(csv.reader((tmp_path / "out" / "load_of_each_expert.csv").open()))
    assert loads[0] == ["layer", "expert", "value"]
    assert [(*row[:2], float(row[2])) for row in loads[1:4]] == [
        ("1", "e0", 1.33333),
        ("1", "e1", 1.0),
        ("1", "e2", 0.666667),
    ]


def test_export_has_the_values_themselves_not_how_they_are_drawn(tmp_path) -> None:
    """Loads beyond the full colour, gates and cosines below 0."""
    more = {
        "prototype_to_centroid": [0.5, -0.75, 0.0, None],
        "prototype_to_other_centroids": [0.25, -0.5, 0.125, None],
    }
    tokens, gates = [90, 9, 1, 0], [9.0, -4.5, 0.0, 0.0]
    lines = [
        line(5, 1, 0, tokens, gate_sum_per_expert=gates, layer_detail=detail(**more)),
        line(5, 1, 1, tokens, gate_sum_per_expert=gates),
    ]
    view = RunView.open(write(tmp_path, lines))
    charts = {
        chart.title: [row[:3] for row in csv.reader(csv_text(chart.rows).splitlines())]
        for chart in [load_over_time(view), *layer_charts(view, 1)]
    }
    assert csv_text(load_over_time(view).rows).splitlines() == [
        "from,step,layer 1 e0,layer 1 e1,layer 1 e2,layer 1 e3",
        "0,5,3.6,0.36,0.04,0.0",
    ]
    gates_found = [row[1] for row in charts["Layer 1: mean gate"]]
    assert gates_found == ["value", "0.1", "-0.5", "0.0", ""]
    assert charts["Layer 1: prototypes and tokens"][1:] == [
        ["e0", "0.5", "0.25"],
        ["e1", "-0.75", "-0.5"],
        ["e2", "0.0", "0.125"],
        ["e3", "", ""],
    ]


def test_chart_gives_numbers_as_numbers_and_gaps_as_gaps() -> None:
    chart = line_chart(
        "Title", ("step", [5, 10]), {"a": np.array([1.0, np.nan]), "b": np.array([np.nan, np.nan])}
    )
    data = chart.vega_lite()["data"]
    assert data["values"] == "step,a,b\n5,1.0,\n10,,\n"
    assert data["format"] == {"type": "csv", "parse": dict.fromkeys(("step", "a", "b"), "number")}
    assert Chart(title="x", rows=[["name"], ["1"]], spec={}).vega_lite()["data"]["format"][
        "parse"
    ] == {"name": "string"}


def test_chart_of_bytes_never_counts_a_thousand_of_a_unit(tmp_path) -> None:
    lines = interval(5, layers=(1,), layer_bytes_exchanged=5 * 999_700_000)
    (head, row) = traffic(RunView.open(write(tmp_path, lines))).rows
    assert dict(zip(head, row, strict=True)) == {
        "name": "layer 1",
        "value": 999_700_000,
        "words": "999.7 MB",
    }


def test_chart_of_many_rows_shows_the_one_of_a_few_that_is_farthest_from_even() -> None:
    values, names = np.ones((1200, 2)), [f"layer {row // 600} e{row % 600}" for row in range(1200)]
    values[4], values[1199, 1] = [0.5, 3.0], 0.0
    head, *rows = map_over_time("Map", values, names, [1, 2]).rows
    assert len(head) == 2 + 400 and [row[head.index("layer 0 e3…")] for row in rows] == [0.5, 3.0]
    assert rows[1][-1] == 0.0
    wide = heat_chart("Heat", np.ones((2, 20)), "ab", names[:20], names=("row", "column"))
    assert len(wide.spec["layer"]) == 1  # no room for numbers


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize(
    ("width", "scheme"), [(400, "light"), (400, "dark"), (1600, "light"), (1600, "dark")]
)
def test_page_in_a_browser_is_whole_without_errors(views, tmp_path, width, scheme) -> None:
    """The page is laid out by Chromium: no message of its console, nothing wider than the window,
    the theme's colours.
    """
    page, frame, shot = tmp_path / "page.html", tmp_path / "frame.html", tmp_path / "shot.png"
    page.write_text(pages.render(build_page(views)) + PROBE)
    # A window is 500 wide at least: the page is in a frame as wide as the screen that is meant.
    frame.write_text(
        f"<body style=margin:0><iframe src=page.html style='border:0' width={width}"
        " height=2400></iframe><script>onmessage=e=>document.body.dataset.probe=e.data</script>"
    )
    flags = [
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1600,2400",
        "--virtual-time-budget=60000",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
    ]
    dom = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in dom.stderr, dom.stderr
    wide, window, figures, flat = map(
        int, re.search(r'data-probe="([\d,]+)"', dom.stdout)[1].split(",")
    )
    assert (window, figures, flat) == (width, 2 * (14 + 2 * 7), 0)
    assert wide <= width
    subprocess.run(
        [CHROMIUM, *flags, f"--screenshot={shot}", frame.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    image = Image.open(shot).convert("RGB").crop((0, 0, width, 2400))
    assert image.getpixel((2, 2)) == {"light": (245, 245, 242), "dark": (18, 20, 23)}[scheme]
    assert len(image.getcolors(1 << 24)) > 100  # it is drawn, not blank
