"""What a report says and shows: numbers by hand, every figure, files, and the page in a real browser."""

from __future__ import annotations

import csv
import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from promoe_ds.analysis.drawing.scene import Line, Rect
from promoe_ds.analysis.expert_load import findings, stats
from promoe_ds.analysis.expert_load.figures import OVERVIEW, layer_figures
from promoe_ds.analysis.expert_load.report import export, layer_rows, render, write_report
from promoe_ds.analysis.expert_load.terminal import findings_text
from promoe_ds.analysis.expert_load.view import RunView, open_views
from promoe_ds.config import count_parameters, load_config, training_flops_per_image
from promoe_ds.errors import DataError

from .routing_logs import detail, interval, line, old, write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr")
#: Tells the frame around: width of page and window; figures shown, of them flat ones; captions without words.
PROBE = """<script>addEventListener("load", () => {
  const shown = [...document.querySelectorAll("svg")].filter(e => e.getClientRects().length)
  const unnamed = [...document.querySelectorAll("figcaption")].filter(e => !e.textContent.trim())
  const flat = shown.filter(e => e.getBoundingClientRect().height < 20)
  parent.postMessage([document.documentElement.scrollWidth, innerWidth, shown.length, flat.length, unnamed.length].join(), "*")
})</script>"""
SURPRISING_NAME = "a<b>&\"c'"


def make_run(folder: Path, *, dies: bool = False) -> Path:
    """Write a run of two layers; in one that dies, an expert of layer 3 gets nothing after step 100, another hardly any."""
    lines = []
    for step in range(5, 205, 5):
        for each in interval(step, tokens=[40, 30, 20, 30]):
            if dies and each["layer"] == 3:
                each["tokens_per_expert"] = [40, 30, 0, 1] if step > 100 else [40, 30, 20, 1]
            if each["timestep_bin"] == 0:
                each["layer_detail"] |= {"tokens_per_class": {"steps": 5, "counts": [[5, 1, 2, 2]] * 10 + [[0] * 4]},
                                         "tokens_per_position": {"steps": 5, "counts": [[p % 4, 1, 1, 1] for p in range(16)]}}
            lines.append(each)
    write(folder, lines)
    config = load_config("digits_promoe", ["model.depth=4"])
    (folder / "config.yaml").write_text(config.model_dump_json())
    (folder / "metrics.jsonl").write_text('{"step": 200, "images_per_second": 800.0}\nbroken')
    return folder


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> list[RunView]:
    folder = tmp_path_factory.mktemp("runs")
    return [RunView.open(make_run(folder / "fed")), RunView.open(make_run(folder / SURPRISING_NAME, dies=True))]


def test_stats_by_hand() -> None:
    tokens = np.array([[5, 5, 5, 5], [0, 12, 0, 0], [6, 6, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(stats.max_over_mean(tokens), [1, 4, 2, np.nan])
    np.testing.assert_allclose(stats.variation(tokens), [0, np.sqrt(3), 1, np.nan])
    np.testing.assert_allclose(stats.entropy(tokens), [1, 0, 0.5, np.nan], atol=1e-12)


def test_lacks_are_found_with_the_step_when_they_began(views) -> None:
    assert views[0].lacks == []
    assert [(lack.layer, lack.expert, lack.is_dead, lack.since) for lack in views[1].lacks] == [(3, 2, True, 100), (3, 3, False, 0)]


@pytest.mark.parametrize(("dies_at", "missing", "told"), [
    (960, None, "dead since step 960"),  # within the last tenth, which is what counts as now
    (0, None, "dead from the start"),
    (0, 500, "dead from the start"),  # an interval without tokens says nothing of an expert
    (990, None, None)])  # one interval is no death
def test_dead_expert_is_found_with_the_step_when_it_died(tmp_path, dies_at, missing, told) -> None:
    lines = []
    for step in range(10, 1010, 10):
        tokens = [9, 9, 9, 9 if step <= dies_at else 0] if step != missing else [0, 0, 0, 0]
        lines += interval(step, layers=(1,), tokens=tokens, steps=10)
    view = RunView.open(write(tmp_path, lines))
    text = findings_text(view).plain
    assert (told is None and "dead expert" not in text) or f"layer 1 expert 3 ({told})" in text
    assert layer_rows(view)[1][8] == (told is not None)  # the table says the same


def make_measured_run(folder: Path, tokens: list[int], uneven: float) -> RunView:
    """Write a run whose fullest rank is measured pass by pass."""
    lines = [each for step in range(10, 110, 10) for each in interval(step, tokens=tokens, steps=10)]
    for each in lines:
        if "layer_detail" in each:
            each["layer_detail"]["rank_max_over_mean"] = uneven
    write(folder, lines)
    (folder / "config.yaml").write_text(load_config("digits_promoe", ["model.depth=4"]).model_dump_json())
    return RunView.open(folder)


def test_finding_of_lost_time_promises_what_another_order_changes(tmp_path) -> None:
    """What comes and goes from pass to pass is not credited to the advice."""
    even = make_measured_run(tmp_path / "even", [1000, 1000, 1000, 1000], 1.5)
    found = next(each for each in findings.find(even) if "lost to imbalance" in each.title)
    assert "no other order" in found.text and "--placement" not in found.text
    assert f"{even.time_lost(even.present.uneven_L):.1%} remains" in found.text and even.time_lost(np.ones(2)) == 0
    heavy = make_measured_run(tmp_path / "heavy", [1600, 1400, 400, 600], 1.8)
    found = next(each for each in findings.find(heavy) if "lost to imbalance" in each.title)
    assert heavy.present.uneven_L.tolist() == [1.5, 1.5] and heavy.advised.uneven_L.tolist() == [1.0, 1.0]
    assert heavy.advised_uneven().tolist() == pytest.approx([1.2, 1.2])  # 1.8 as measured, times 1.0 of 1.5
    assert f"bring that to {heavy.time_lost(np.full(2, 1.2)):.1%}" in found.text and "--placement FILE" in found.text


def test_time_lost_by_hand(views) -> None:
    view, config = views[0], load_config("digits_promoe", ["model.depth=4"])
    # Each layer: 240 rows in 5 steps, the fullest rank 1.2 times the mean; 64 images a step.
    extra = 2 * (240 / 5) * 0.2 * 6 * count_parameters(config).routed_per_expert
    x = extra / (64 * training_flops_per_image(config))
    assert view.time_lost(view.present_uneven()) == pytest.approx(x / (1 + x))
    assert view.time_lost(np.ones(2)) == 0
    assert view.facts.images_per_second == 800.0


def test_findings_name_the_pathology_its_place_and_a_remedy(views) -> None:
    assert [each.level for each in findings.find(views[0])] == ["good"] or "Prototypes" in findings.find(views[0])[0].title
    found = {each.title: each for each in findings.find(views[1])}
    assert "layer 3 expert 2 (dead since step 100)" in found["1 dead expert"].text
    assert "routing.rcl_weight" in found["1 dead expert"].text
    assert "layer 3 expert 3 (starving from the start)" in found["1 starving expert"].text
    assert "Layer 3 is uneven: 2.25 times the mean" in found


def test_layer_rows_add_up_the_window(views) -> None:
    head, first, second = layer_rows(views[0])
    row = dict(zip(head, first, strict=True))
    assert (row["layer"], row["max/mean"], row["dead"], row["conditional tokens"]) == (1, 1.333, 0, 4 * 240)
    assert row["fullest rank / mean"] == 1.2
    assert dict(zip(head, second, strict=True))["layer"] == 3


class _Page(HTMLParser):
    """Collects captions and the labels of figures, and whatever would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.labels: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag, attributes) -> None:
        values = dict(attributes)
        self.scripts += tag == "script"
        if tag == "svg":
            self.labels.append(values["aria-label"])
        self.fetched += [value for name, value in attributes if name in ("src", "href") and value
                         and not value.startswith(("data:", "#"))]


@pytest.mark.parametrize("count", [1, 2])
def test_page_has_every_figure_with_its_name_and_fetches_nothing(views, count) -> None:
    page = _Page(text := render(views[:count]))
    for view in views[:count]:
        wanted = [scene.title for _, draws in OVERVIEW for draw in draws if (scene := draw(view)) is not None]
        assert len(wanted) == 14
        wanted += [scene.title for layer in view.log.layers for scene in layer_figures(view, layer)]
        for title in wanted:
            assert page.labels.count(title) == count
            assert f"{html.escape(title)}<small>" in text
    assert page.fetched == [] and page.scripts == 0
    assert "<b>&" not in text.replace("<b>&amp;", "")  # a run's name is no markup


def test_page_of_a_run_without_its_other_files_says_what_is_left_out(tmp_path) -> None:
    folder = write(tmp_path / "bare", [*interval(5), *interval(10, tokens=[0, 0, 0, 0])])
    text = render([RunView.open(folder, last_steps=5)])
    assert "config.yaml is missing" in text
    assert "none in the window" in text and "No token was routed" in text


def test_page_of_an_old_log_shows_what_was_logged_then(tmp_path) -> None:
    view = RunView.open(write(tmp_path / "old", [old(each) for step in (5, 10) for each in interval(step)]))
    labels = _Page(text := render([view])).labels
    assert "8 of 8 lines have schema 1" in text
    assert "Load over training" in labels and "Layer 3: load by noise level" in labels
    assert not any("mean gate" in label or "Prototype to its own" in label or "Waiting" in label for label in labels)
    findings_text(view)


def test_page_of_two_runs_puts_every_figure_under_its_own_name(tmp_path) -> None:
    """What one run has and the other has not is told where it would stand, in the overview and layer by layer."""
    lines = [each for step in (5, 10) for each in interval(step)]
    for each in lines:
        if "layer_detail" in each:
            each["layer_detail"] |= {"ep_size": 1, "rank_max_over_mean": None}
    first, second = write(tmp_path / "one" / "run", lines), write(tmp_path / "old" / "run", [old(each) for each in lines])
    third = write(tmp_path / "two", [each for step in (5, 10) for each in interval(step)])
    text = render(open_views([first, third]))
    assert re.findall(r"<i>(\w+)</i>Load of each rank<small>(\w+)", text) == [("run", "Not"), ("two", "Rows")]
    views = open_views([second, first])
    assert [view.name for view in views] == ["old/run", "one/run"]
    told = re.findall(r"<i>([\w/]+)</i>Layer 3: mean gate<small>(\w+)", render(views))
    assert told == [("old/run", "Not"), ("one/run", "The")]
    assert export(tmp_path / "out", views) == len(list((tmp_path / "out").glob("*_run/*.png")))


def test_page_says_which_tables_were_not_logged_and_how_to_get_them(views, tmp_path) -> None:
    folder = write(tmp_path, [*interval(5), *interval(10)])
    (folder / "config.yaml").write_text(load_config("digits_promoe", ["model.depth=4"]).model_dump_json())
    text = render([RunView.open(folder)])
    assert "load by class (logging.class_counts=true, about 0.2 kB a layer and table)" in text
    assert "Not logged" not in render(views[:1])


def test_page_of_many_layers_and_experts_stays_readable(tmp_path) -> None:
    """24 layers of 64 experts: low maps, lines that can be told apart, one colour each."""
    layers = tuple(range(1, 48, 2))
    lines = [line(step, layer, 0, list(range(64)), bins=1, layer_detail=detail(64, ep_size=8))
             for step in (5, 10) for layer in layers for step in (step,)]
    view = RunView.open(write(tmp_path, lines))
    scenes = [scene for _, draws in OVERVIEW for draw in draws if (scene := draw(view)) is not None]
    scenes += layer_figures(view, 1)
    assert max(scene.height for scene in scenes) < 1100
    uneven = next(scene for scene in scenes if scene.title == "Largest over mean load")
    styles = {(shape.color, shape.dash) for shape in uneven.shapes if isinstance(shape, Line) and shape.tip}
    assert len(styles) == 24


def test_page_that_cannot_be_written_says_so(views, tmp_path) -> None:
    with pytest.raises(DataError, match="name another place with --out"):
        write_report(tmp_path / "nowhere" / "x.html", views)


def test_export_writes_every_figure_as_png_and_csv(views, tmp_path) -> None:
    count = export(tmp_path / "out", views[:1])
    images = sorted((tmp_path / "out").glob("*.png"))
    assert count == len(images) == 14 + 2 * 7
    for path in images:
        assert Image.open(path).convert("L").getextrema() != (255, 255)
        rows = list(csv.reader(path.with_suffix(".csv").open()))
        assert len(rows) > 1 and len({len(row) for row in rows}) == 1, path
    loads = list(csv.reader((tmp_path / "out" / "load_of_each_expert.csv").open()))
    assert loads[0] == ["layer", "e0", "e1", "e2", "e3"]
    assert [float(x) for x in loads[1]] == pytest.approx([1, 4 / 3, 1, 2 / 3, 1], rel=1e-5)


def test_export_holds_the_values_themselves_not_how_they_are_drawn(tmp_path) -> None:
    """Loads beyond the full colour, gates and cosines below 0."""
    lines = []
    for each in interval(5, layers=(1,), tokens=[90, 9, 1, 0], steps=5):
        each["gate_sum_per_expert"] = [9.0, -4.5, 0.0, 0.0]
        if "layer_detail" in each:
            each["layer_detail"] |= {"prototype_to_centroid": [0.5, -0.75, 0.0, None],
                                     "prototype_to_other_centroids": [0.25, -0.5, 0.125, None]}
        lines.append(each)
    view = RunView.open(write(tmp_path, lines))
    export(tmp_path / "out", [view])

    def _numbers(name: str) -> list[list[str]]:
        return list(csv.reader((tmp_path / "out" / f"{name}.csv").open()))

    assert _numbers("load_over_training")[1:] == [[f"layer 1 e{e}", x] for e, x in enumerate(("3.6", "0.36", "0.04", "0.0"))]
    assert _numbers("layer_1_mean_gate")[1:] == [["e0", "0.1"], ["e1", "-0.5"], ["e2", "0.0"], ["e3", ""]]
    assert _numbers("layer_1_prototypes_and_tokens") == [["expert", "own tokens", "others' tokens"], ["e0", "0.5", "0.25"],
                                                         ["e1", "-0.75", "-0.5"], ["e2", "0.0", "0.125"], ["e3", "", ""]]
    bars = {shape.tip[:2]: shape.box for scene in layer_figures(view, 1) if scene.title.endswith("mean gate")
            for shape in scene.shapes if isinstance(shape, Rect)}
    zero = bars["e0"][0]
    assert bars["e1"][0] + bars["e1"][2] == pytest.approx(zero)  # to the left of zero
    assert bars["e1"][2] == pytest.approx(5 * bars["e0"][2])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (400, "dark"), (1600, "light"), (1600, "dark")])
def test_page_in_a_browser_is_whole_without_errors(views, tmp_path, width, scheme) -> None:
    """The page is laid out by Chromium: no message of its console, nothing wider than the window, the theme's colours."""
    page, frame, shot = tmp_path / "page.html", tmp_path / "frame.html", tmp_path / "shot.png"
    page.write_text(render(views).replace("</body>", PROBE + "</body>"))
    # A window is 500 wide at least: the page lies in a frame as wide as the screen that is meant.
    frame.write_text(f"<body style=margin:0><iframe src=page.html style='border:0' width={width} height=2400></iframe>"
                     "<script>onmessage=e=>document.body.dataset.probe=e.data</script>")
    flags = [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1600,2400", "--virtual-time-budget=2000",
             f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"]
    dom = subprocess.run([CHROMIUM, *flags, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in dom.stderr
    wide, window, figures, flat, unnamed = map(int, re.search(r'data-probe="([\d,]+)"', dom.stdout)[1].split(","))
    assert (window, figures, flat, unnamed) == (width, 2 * (14 + 2 * 7), 0, 0)
    assert wide <= width
    subprocess.run([CHROMIUM, *flags, f"--screenshot={shot}", frame.as_uri()], capture_output=True, timeout=120, check=True)
    image = Image.open(shot).convert("RGB").crop((0, 0, width, 2400))
    assert image.getpixel((2, 2)) == {"light": (245, 245, 242), "dark": (18, 20, 23)}[scheme]
    assert len(image.getcolors(1 << 24)) > 100  # it is drawn, not blank
