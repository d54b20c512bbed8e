"""The page and its charts, from synthetic results: what is there, what is missing, nothing
unescaped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from promoe_ds.config import load_config
from promoe_ds.evaluation.judges.table import figures_of
from promoe_ds.reports.comparison import charts
from promoe_ds.reports.comparison.page import build_page, show
from promoe_ds.reports.comparison.results import read_json
from promoe_ds.reports.page import Page, render, write_charts

from .synthetic import ENVIRONMENT, synthetic_comparison, synthetic_result

EVIL = "a<script>alert(1)</script>&b"


def _comparison(**options) -> dict:
    return synthetic_comparison(
        {
            "promoe": {seed: synthetic_result(seed, 2.0) for seed in (0, 1, 2)},
            "dense": {seed: synthetic_result(seed, 1.0, experts=False) for seed in (0, 2)},
            "diverged": {},
        },
        **options,
    )


def _parts(page: Page, kind: str) -> list[dict]:
    return [part for part in page.parts if part["kind"] == kind]


def _titles(page: Page) -> list[str]:
    return [group[0]["title"] for part in _parts(page, "figures") for group in part["items"]]


def test_page_has_tables_all_charts_and_every_missing_run(tmp_path) -> None:
    page = build_page(_comparison(), tmp_path)
    results, differences = (part["rows"] for part in _parts(page, "table"))
    # Accuracies 0.97, 0.968, 0.966: mean 96.8, deviation 0.2; the dense one has no experts, the
    # diverged one nothing.
    column = results[0].index("accuracy, %")
    assert [row[column] for row in results[1:]] == ["96.8 ± 0.2", "95.8 ± 0.3", "–"]
    assert results[2][results[0].index("load entropy")] == "–" and [
        row[-1] for row in results[1:]
    ] == [3, 2, 0]
    assert [(row[0], row[-1]) for row in differences[1:]] == [("dense", 2), ("diverged", 0)]
    assert len(_titles(page)) == 7
    (warning,) = _parts(page, "warning")
    assert warning["title"].startswith("4 of 9 runs") and [
        each.partition(":")[0] for each in warning["items"]
    ] == ["dense, seed 1", "diverged, seed 0, 1, 2"]
    terms = dict(item for part in _parts(page, "terms") for item in part["items"])
    assert "dense" in terms["load"] and "2 cores of a processor" in terms["ms a step"]
    assert write_charts(tmp_path, [chart for chart in charts.charts(_comparison()) if chart]) == 7


def test_page_of_mixed_conditions_warns(tmp_path) -> None:
    comparison = _comparison()
    comparison["contenders"][0]["seeds"]["0"]["environment"] = {**ENVIRONMENT, "jobs": 1}
    assert len(_parts(build_page(comparison, tmp_path), "warning")) == 2


def test_page_escapes_names_everywhere(tmp_path) -> None:
    results = {
        EVIL: {0: synthetic_result(0)},
        f"{EVIL}_2": {0: synthetic_result(0)},
        f"{EVIL}_3": {},
    }
    text = render(build_page(synthetic_comparison(results), tmp_path))
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text


@pytest.mark.parametrize(
    ("results", "options", "tables", "figures"),
    [
        ({"alone": {0: {}}}, {"seeds": (0,)}, 1, 6),
        ({"a": {}, "b": {}}, {}, 2, 0),
        (
            {
                name: {seed: {"experts": False, "images": False} for seed in (0, 1)}
                for name in ("a", "b")
            },
            {"dataset": "synthetic"},
            2,
            3,
        ),
    ],
)
def test_page_without_others_results_or_images_leaves_out_their_charts(
    tmp_path, results, options, tables, figures
) -> None:
    made = {
        name: {seed: synthetic_result(seed, **each) for seed, each in of_seeds.items()}
        for name, of_seeds in results.items()
    }
    page = build_page(synthetic_comparison(made, **options), tmp_path)
    assert (len(_parts(page, "table")), len(_titles(page))) == (tables, figures)
    assert render(page).count('class="chart"') == figures


def test_page_shows_samples_of_the_first_seed(tmp_path) -> None:
    folder = tmp_path / "runs" / "promoe-seed0" / "samples"
    folder.mkdir(parents=True)
    np.savez(
        folder / "samples.npz",
        arr_0=np.zeros((20, 8, 8, 1), dtype=np.uint8),
        labels=np.arange(20) % 10,
    )
    page = build_page(_comparison(), tmp_path)
    assert [item[0] for part in _parts(page, "pictures") for item in part["items"]] == [
        "promoe, seed 0"
    ]
    assert len(re.findall(r'<img [^>]*src="data:image/png;base64,', render(page))) == 1


def test_page_of_emoji_has_its_judges_figures_and_shows_prompts(tmp_path) -> None:
    figures = {figure.name: 0.25 for figure in figures_of("emoji")}
    landmarks = {figure.landmark[1]: 0.5 for figure in figures_of("emoji") if figure.landmark}
    result = synthetic_result(0) | {**figures, "images": {**figures, **landmarks}}
    comparison = synthetic_comparison({"promoe": {0: result}}, seeds=(0,), dataset="emoji")
    comparison["contenders"][0]["config"] = load_config("emoji_promoe").model_dump(mode="json")
    folder = tmp_path / "runs" / "promoe-seed0" / "samples"
    folder.mkdir(parents=True)
    images = np.zeros((50, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "samples.npz", arr_0=images, labels=np.arange(50))
    prompts = {f"img{index:06d}.png": f"caption {index}" for index in range(50)}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    page = build_page(comparison, tmp_path)
    (table,) = (part["rows"] for part in _parts(page, "table"))
    assert table[1][table[0].index("recall@10, held-out, %")] == "25.0"
    assert sum("Recall@10" in title for title in _titles(page)) == 3
    terms = dict(item for part in _parts(page, "terms") for item in part["items"])
    assert "real pictures" in terms["recall@10, known, %"]
    (pictures,) = (part["items"] for part in _parts(page, "pictures"))
    assert pictures[0][0] == "promoe, seed 0" and pictures[0][2] > 3 * pictures[0][3] / 2
    assert "CC BY-SA 4.0" in render(page)


def test_curves_by_hand() -> None:
    assert charts.running_mean([[1, 2.0], [2, 4.0], [3, 9.0]], 2) == [(2, 3.0), (3, 6.5)]
    assert charts.difference([[1, 5.0], [2, 7.0], [3, 1.0]], [[1, 2.0], [2, 3.0]]) == [
        (1, 3.0),
        (2, 4.0),
    ]
    comparison = synthetic_comparison(
        {
            "a": {
                0: synthetic_result(0) | {"loss_curve": [[1, 3.0], [2, 4.0]]},
                1: synthetic_result(1) | {"loss_curve": [[2, 6.0]]},
            }
        }
    )
    # Step 2 is in both: 4 and 6, mean 5, deviation sqrt 2.
    assert charts.charts(comparison)[0].rows[1:] == [
        [2, "a", 5.0, pytest.approx(5 - 2**0.5), pytest.approx(5 + 2**0.5)]
    ]


def test_load_per_block_by_hand() -> None:
    runs = {
        seed: synthetic_result(seed)
        | {"layers": [{"layer": 1, "max_over_mean": x}, {"layer": 3, "max_over_mean": None}]}
        for seed, x in enumerate((1.0, 3.0))
    }
    assert charts.load_per_block(synthetic_comparison({"a": runs})).rows[1:] == [
        [1, "a", 2.0, pytest.approx(2 - 2**0.5), pytest.approx(2 + 2**0.5)]
    ]


@pytest.mark.parametrize(
    ("landmark", "near"), [(1.0, True), (-2.0, True), (-2.1, False), (5.0, True), (5.1, False)]
)
def test_landmark_is_drawn_only_near_the_points(landmark, near) -> None:
    entries = [
        {"summary": {"frechet": {"min": 1.0, "max": 1.5}}},
        {"summary": {"frechet": {"min": 1.7, "max": 2.0}}},
        {"summary": {"frechet": None}},
    ]
    assert charts.is_near(landmark, entries, "frechet") is near


@pytest.mark.parametrize(
    ("summary", "signed", "text"),
    [
        (None, False, "–"),
        ({"mean": 0.25, "sd": None}, False, "25.0"),
        ({"mean": 0.25, "sd": 0.01}, False, "25.0 ± 1.0"),
        ({"mean": -0.25, "sd": 0.01}, True, "−25.0 ± 1.0"),
        ({"mean": 0.25, "sd": 0.0}, True, "+25.0 ± 0.0"),
    ],
)
def test_show(summary, signed, text) -> None:
    assert show(summary, 1, 100.0, signed=signed) == text


def test_comparison_written_by_version_0_1_0_is_read(tmp_path) -> None:
    comparison = read_json(Path(__file__).parent / "files" / "comparison_0.1.0.json")
    page = build_page(comparison, tmp_path)
    results = _parts(page, "table")[0]["rows"]
    assert [row[0] for row in results] == ["candidate", "digits_promoe", "digits_ditmoe"]
    assert results[1][1] == "0.3959 ± 0.0051" and len(_titles(page)) == 7
