"""The page, from made-up results: what is there, what is missing, nothing from outside, nothing unescaped."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from promoe_ds.analysis.comparison import figures
from promoe_ds.analysis.comparison.report import render_report, show
from promoe_ds.errors import ConfigError

from .made_up import ENVIRONMENT, made_up_comparison, made_up_result

EVIL = "a<script>alert(1)</script>&b"


class _Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def _comparison(**options) -> dict:
    return made_up_comparison({
        "promoe": {seed: made_up_result(seed, 2.0) for seed in (0, 1, 2)},
        "dense": {seed: made_up_result(seed, 1.0, experts=False) for seed in (0, 2)},
        "diverged": {}}, **options)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> _Page:
    return _Page(render_report(_comparison(), tmp_path_factory.mktemp("empty")))


def test_report_has_tables_and_all_figures(page) -> None:
    assert page.tags.count("table") == 2
    assert page.tags.count("svg") == 7
    for title in ("Diffusion loss", "minus that of promoe", "on held-out digits", "Fréchet distance of pixels",
                  "recognised as their label", "Expert load by block", "Time of a training step"):
        assert title in page.text


def test_report_names_every_missing_run_and_why(page) -> None:
    assert "4 of 9 runs are missing" in page.text
    assert "dense, seed 1: training ended with exit code 5" in page.text
    assert page.text.count("diverged, seed") == 3


def test_report_shows_means_deviations_and_dashes(page) -> None:
    # Accuracies 0.97, 0.968, 0.966: mean 96.8, deviation 0.2; the dense one has no experts, the diverged one nothing.
    assert "96.8 ± 0.2" in page.text
    assert "No experts: dense" in page.text
    assert page.text.count("–") >= 7


def test_report_says_what_times_were_measured_with(page) -> None:
    assert "2 runs at a time of 1 rank with one thread each, on 2 cores of a processor" in page.text
    assert "same conditions" not in page.text


def test_report_of_mixed_conditions_warns(tmp_path) -> None:
    comparison = _comparison()
    comparison["contenders"][0]["seeds"]["0"]["environment"] = {**ENVIRONMENT, "jobs": 1}
    assert "Not all runs were made under the same conditions" in _Page(render_report(comparison, tmp_path)).text


def test_report_loads_nothing_from_outside(page) -> None:
    assert not {"script", "link", "iframe"} & set(page.tags)
    for name, value in page.attributes:
        assert name not in ("src", "href", "xlink:href") or value.startswith(("data:", "#")), (name, value)
    assert ("default-src 'none'; style-src 'unsafe-inline'; img-src data:") in [value for _, value in page.attributes]


def test_report_escapes_names_everywhere(tmp_path) -> None:
    results = {EVIL: {0: made_up_result(0)}, f"{EVIL}_2": {0: made_up_result(0)}, f"{EVIL}_3": {}}
    html = render_report(made_up_comparison(results), tmp_path)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert f"minus that of {EVIL}" in _Page(html).text


def test_report_of_one_contender_has_no_differences(tmp_path) -> None:
    page = _Page(render_report(made_up_comparison({"alone": {0: made_up_result(0)}}, seeds=(0,)), tmp_path))
    assert (page.tags.count("table"), page.tags.count("svg")) == (1, 6)
    assert "±" not in "".join(page.words).split("Mean ± standard deviation over seeds.")[1].split("Figures")[0]


def test_report_before_the_first_result_says_so(tmp_path) -> None:
    page = _Page(render_report(made_up_comparison({"a": {}, "b": {}}), tmp_path))
    assert "No run has a result yet" in page.text
    assert "svg" not in page.tags


def test_report_without_experts_or_images_says_why_figures_are_missing(tmp_path) -> None:
    results = {name: {seed: made_up_result(seed, experts=False, images=False) for seed in (0, 1)} for name in ("a", "b")}
    page = _Page(render_report(made_up_comparison(results, seeds=(0, 1), dataset="synthetic"), tmp_path))
    assert "only models of the digits data set can be judged, and this is synthetic" in page.text
    assert page.tags.count("svg") == 3
    assert "entropy" not in page.text


def test_report_shows_samples_of_the_first_seed(tmp_path) -> None:
    folder = tmp_path / "runs" / "promoe-seed0" / "samples"
    folder.mkdir(parents=True)
    np.savez(folder / "samples.npz", arr_0=np.zeros((20, 8, 8, 1), dtype=np.uint8), labels=np.arange(20) % 10)
    page = _Page(render_report(_comparison(), tmp_path))
    assert page.tags.count("img") == 1
    assert "promoe, seed 0" in page.text


def test_report_without_jinja2_is_one_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"pip install 'promoe_ds\[report\]'"):
        render_report(_comparison(), Path("nowhere"))


def test_figures_take_the_page_s_colours_and_are_repeatable() -> None:
    svg = figures.draw_loss_curves(_comparison())
    assert "currentColor" in svg
    assert "var(--line)" in svg
    assert svg == figures.draw_loss_curves(_comparison())


def test_figures_without_results_are_left_out() -> None:
    comparison = made_up_comparison({"a": {}, "b": {}})
    assert figures.draw_loss_curves(comparison) is figures.draw_loss_differences(comparison) is None
    assert figures.draw_points(comparison, "frechet", unit="") is figures.draw_load_per_layer(comparison) is None


def test_running_mean_by_hand() -> None:
    assert figures.running_mean([[1, 2.0], [2, 4.0], [3, 9.0]], 2) == [(2, 3.0), (3, 6.5)]
    assert figures.running_mean([[1, 2.0]], 1) == [(1, 2.0)]


def test_difference_and_spread_by_hand() -> None:
    assert figures.difference([[1, 5.0], [2, 7.0], [3, 1.0]], [[1, 2.0], [2, 3.0]]) == [(1, 3.0), (2, 4.0)]
    # Step 2 stands in both: 4 and 6, mean 5, deviation sqrt 2.
    assert figures.mean_and_spread([[(1, 3.0), (2, 4.0)], [(2, 6.0)]]) == [(2, 5.0, pytest.approx(2**0.5))]
    assert figures.mean_and_spread([]) == []


def test_load_by_layer_by_hand() -> None:
    entry = {"seeds": {str(seed): {"layers": [{"layer": 1, "max_over_mean": value}, {"layer": 3, "max_over_mean": None}]}
                       for seed, value in enumerate((1.0, 3.0))}}
    assert figures.load_by_layer(entry) == {1: (2.0, pytest.approx(2**0.5))}
    assert figures.load_by_layer({"seeds": {"0": {"layers": None}}}) == {}


@pytest.mark.parametrize(("landmark", "near"), [(1.0, True), (-2.0, True), (-2.1, False), (5.0, True), (5.1, False)])
def test_landmark_is_drawn_only_near_the_points(landmark, near) -> None:
    entries = [{"summary": {"frechet": {"min": 1.0, "max": 1.5}}}, {"summary": {"frechet": {"min": 1.7, "max": 2.0}}},
               {"summary": {"frechet": None}}]
    assert figures.is_near(landmark, entries, "frechet") is near


@pytest.mark.parametrize(("summary", "signed", "text"), [
    (None, False, "–"), ({"mean": 0.25, "sd": None}, False, "25.0"), ({"mean": 0.25, "sd": 0.01}, False, "25.0 ± 1.0"),
    ({"mean": -0.25, "sd": 0.01}, True, "−25.0 ± 1.0"), ({"mean": 0.25, "sd": 0.0}, True, "+25.0 ± 0.0")])
def test_show(summary, signed, text) -> None:
    assert show(summary, 1, 100.0, signed=signed) == text
