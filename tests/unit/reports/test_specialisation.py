"""Measures of specialisation against values known by hand and against chance; the page of a small
model.
"""

from __future__ import annotations

import json
import sys
import weakref

import numpy as np
import pytest
import torch

from promoe_ds.data import build_dataset
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.files import json_text
from promoe_ds.reports.page import render, write_charts
from promoe_ds.reports.specialisation import analysis as analysis_module
from promoe_ds.reports.specialisation.analysis import (
    Analysis,
    Settings,
    analyse,
    best_expert,
    draw_images,
    observe,
)
from promoe_ds.reports.specialisation.measures import (
    inter_intra_ratio,
    mutual_information,
    specialisation,
    subspace_similarity,
)
from promoe_ds.reports.specialisation.page import (
    build_page,
    check_place,
    layer_charts,
    overview_charts,
    token_maps,
    write_report,
)
from promoe_ds.routing import Assignment

from ..builders import METHODS, TEXT, of_method, random_network, small_config


def _analysis(images: int, sigmas: tuple[float, ...], **sections) -> Analysis:
    network = random_network(**sections).eval()
    batch = draw_images(build_dataset(network.config), images, seed=0)
    settings = Settings(sigmas=sigmas, tokens=40, singular_vectors=2, rounds=2)
    return analyse(network, batch, settings, name="small")


def test_subspaces_equal_apart_and_by_chance() -> None:
    plane, other = torch.zeros(2, 6, 4)
    plane[:2, :2] = other[2:4, :2] = torch.eye(2)
    found = subspace_similarity(torch.stack([plane, plane, other]), 2)
    np.testing.assert_allclose(found, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-12)
    weights = torch.randn(12, 200, 40, generator=torch.Generator().manual_seed(0))
    random = subspace_similarity(weights, 10)
    assert random[~np.eye(12, dtype=bool)].mean() == pytest.approx(10 / 200, rel=0.15)


@pytest.mark.parametrize("shape", [(3, 20, 12), (3, 12, 20), (3, 9, 9)])
def test_subspaces_are_those_of_the_singular_vectors(shape: tuple[int, int, int]) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for k in (1, 4, min(shape[1:])):
        left = torch.linalg.svd(weights.double(), full_matrices=False).U[:, :, :k]
        expected = [[(a.T @ b).square().sum().item() / k for b in left] for a in left]
        np.testing.assert_allclose(subspace_similarity(weights, k), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([3, 3, 7, 7], 10.0),
        ([3, 3, -1, 7], 1.5 * 101**0.5),  # who has no expert is in no group
        ([0, 0, 0, 0], np.nan),
        ([0, 1, 2, 3], np.nan),  # a group each: nothing is away from its centroid
    ],
)
def test_inter_intra_ratio_by_hand(groups, expected) -> None:
    tokens = np.array([[0.0, 1], [0, -1], [10, 1], [10, -1]])
    assert inter_intra_ratio(tokens, np.array(groups)) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("experts", "values", "expected"),
    [
        ([0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 2, 3, 3], 1.0),
        ([0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 1, 1, 1, 1], 0.5),
        ([0, 0, 1, 1, 2, 2, 3, 3], [0, 1] * 4, 0.0),
        ([0] * 8, [0, 0, 1, 1, 2, 2, 3, 3], 0.0),
    ],
)
def test_mutual_information_by_hand(experts, values, expected) -> None:
    found = mutual_information(np.array(experts), np.array(values))
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("cause", ["class", "noise level", "position", "nothing"])
def test_specialisation_finds_the_cause_and_nothing_else(cause: str) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 40)
    experts = random.integers(0, 4, (4, 40, 16))
    follows = {
        "class": np.broadcast_to(labels[None, :, None], experts.shape),
        "noise level": np.broadcast_to(np.arange(4)[:, None, None], experts.shape),
        "position": np.broadcast_to(np.arange(16) % 4, experts.shape),
        "nothing": experts,
    }[cause]
    experts = np.where(random.random(experts.shape) < 0.5, follows, experts)
    found = specialisation(experts, labels, rounds=40, seed=1)
    for kind, each in found.items():
        if kind == cause:
            assert each.score > 0.1 and each.p_value == pytest.approx(1 / 41)
        else:
            assert abs(each.score) < 0.02 and each.share < 0.05


def test_best_expert_is_the_one_of_the_largest_gate() -> None:
    assignment = Assignment(
        token_ids_N=torch.tensor([0, 2, 0, 2, 3]),
        gates_N=torch.tensor([0.2, 0.9, 0.5, 0.1, -0.3]),
        tokens_per_expert_E=torch.tensor([2, 0, 2, 1]),
    )
    assert best_expert(assignment, 5).tolist() == [2, -1, 0, 3, -1]
    nothing = Assignment(
        torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(4, dtype=torch.int64)
    )
    assert best_expert(nothing, 2).tolist() == [-1, -1]


@pytest.mark.parametrize("method", METHODS)
def test_observe_sees_every_token_of_every_method(method: str) -> None:
    network = random_network(model={"depth": 4}, **of_method(method)).eval()
    batch = draw_images(build_dataset(network.config), 20, seed=0)
    seen = observe(network, batch, [0.2, 0.8], kept=11, seed=0)
    assert sorted(seen) == [1, 3]
    for each in seen.values():
        assert each.experts_MBS.shape == (2, 20, 4)
        assert each.tokens_MnD.shape == (2, 11, 16)
        assert each.experts_MBS.max() < 4 and (each.experts_MBS >= 0).any()
    if method == "token_choice":  # the nearest prototype, computed anew
        router, each = network.moe_layers()[1].router, seen[1]
        cosines = (
            torch.nn.functional.normalize(torch.from_numpy(each.tokens_MnD[1]), dim=-1)
            @ torch.nn.functional.normalize(router.prototypes, dim=-1).T
        )
        assert (
            each.experts_MBS[1].ravel()[each.places_n].tolist() == cosines.argmax(dim=-1).tolist()
        )


def test_observe_keeps_no_more_tokens_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network().eval()
    batch, entered = draw_images(build_dataset(network.config), 40, seed=0), []
    network.moe_layers()[1].router.register_forward_pre_hook(
        lambda _, given: entered.append(weakref.ref(given[0]))
    )
    most = []
    monkeypatch.setattr(
        analysis_module,
        "best_expert",
        lambda *given, real=best_expert: (
            most.append(sum(tokens() is not None for tokens in entered)) or real(*given)
        ),
    )
    seen = observe(network, batch, [0.2, 0.8], kept=11, seed=0)
    assert len(entered) == 6 and max(most) <= 1  # passes of 16 images; those before are gone
    assert seen[1].tokens_MnD.shape == (2, 11, 16)


@pytest.mark.parametrize(
    ("sections", "group", "groups"),
    [({"model": {}}, "class", "classes"), (TEXT, "caption group", "caption groups")],
)
def test_analysis_of_a_small_model_writes_a_page_and_its_numbers(
    tmp_path, sections: dict, group: str, groups: str
) -> None:
    sections = {**sections, "model": {**sections["model"], "depth": 4}}
    analysis = _analysis(12, (0.2, 0.8), routing={"num_experts": 4}, **sections)
    write_report(analysis, tmp_path / "page.html")
    values = json.loads((tmp_path / "page.json").read_text(), parse_constant=pytest.fail)
    assert values == json.loads(json_text(analysis.numbers()))
    assert [layer["layer"] for layer in values["layers"]] == [1, 3]
    for layer in values["layers"]:
        assert set(layer["information"]) == {group, "noise level", "position"}
        assert groups in layer["inter_intra_ratio"]
    charts = [
        *overview_charts(analysis),
        *(chart for layer in analysis.layers for chart in layer_charts(analysis, layer)),
    ]
    text = render(build_page(analysis))
    assert all(f'aria-label="{chart.title}"'.replace("'", "&#39;") in text for chart in charts)
    assert (
        write_charts(tmp_path / "out", charts)
        == len(list((tmp_path / "out").glob("*.png")))
        == 5 + 2 * 4
    )
    with pytest.raises(DataError, match=r"page\.html cannot be written: .*: name another place"):
        write_report(analysis, tmp_path / "nowhere" / "page.html")


def test_analysis_of_few_tokens_leaves_gaps() -> None:
    ratios = _analysis(2, (0.2, 0.8)).layers[0].ratios
    assert np.isnan(ratios["k-means clusters"]).all()  # as many clusters as tokens


def test_token_maps_of_many_experts_show_each_patch_s_own() -> None:
    analysis = _analysis(12, (0.5,), routing={"num_experts": 40})
    chart = token_maps(analysis, analysis.layers[0], [f"e{expert}" for expert in range(40)])
    color = chart.spec["layer"][1]["encoding"]["color"]["scale"]
    assert len(set(color["range"])) == 40 and color["domain"] == [
        f"e{expert}" for expert in range(40)
    ]
    experts = analysis.layers[0].seen.experts_MBS[0, :4]
    assert [row[4] for row in chart.rows[1:]] == [f"e{expert}" for expert in experts.ravel()]
    x, y = (np.array([row[place] for row in chart.rows[1:5]]) for place in (5, 6))
    assert (x - x[0]).tolist() == [0, 1, 0, 1] and (y - y[0]).tolist() == [
        0,
        0,
        1,
        1,
    ]  # row by row, downwards


def test_token_maps_of_wide_images_are_as_wide() -> None:
    model = {"input_size": [4, 6], "patch_size": 1}
    analysis = _analysis(4, (0.5,), model=model)
    chart = token_maps(analysis, analysis.layers[0], ["e0", "e1", "e2", "e3"])
    x, y = (np.array([row[place] for row in chart.rows[1:25]]) for place in (5, 6))
    assert (x - x[0]).tolist() == [*range(6)] * 4
    assert (y - y[0]).tolist() == [row for row in range(4) for _ in range(6)]
    picture = chart.spec["layer"][0]["data"]["values"][0]
    assert (picture["x2"] - picture["x"], picture["y2"] - picture["y"]) == (6, 4)


def test_place_of_the_page_stays_as_it_was(tmp_path, monkeypatch) -> None:
    (tmp_path / "page.html").write_text("before")
    check_place(tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "before"
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match="sklearn is not installed"):
        check_place(tmp_path / "page.html")


def test_images_of_several_sizes_are_drawn_from_the_largest() -> None:
    config = small_config(model={"input_size": [4, 6], "buckets": [4, [4, 6]]})
    assert draw_images(build_dataset(config), 5, seed=0).clean_BZHW.shape == (5, 1, 4, 6)


def test_analysis_of_a_dense_model_or_too_few_images_is_refused() -> None:
    network = random_network(routing={"method": "dense"})
    batch = draw_images(build_dataset(network.config), 2, seed=0)
    with pytest.raises(ConfigError, match="small is dense: it has no experts"):
        analyse(network, batch, Settings(), name="small")
    with pytest.raises(DataError, match="--images 99999: the data set has 4096"):
        draw_images(build_dataset(network.config), 99999, seed=0)
    without = small_config(model=TEXT["model"])
    with pytest.raises(DataError, match=r"data\.caption_groups=0"):
        draw_images(build_dataset(without), 2, seed=0)
