"""Experts that move to other ranks at a resume: everything follows them, and nothing else
changes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from promoe_ds.checkpoint.manifest import list_checkpoints, read_manifest
from promoe_ds.reports.log import load_log

from .jobs import Job, assert_same_steps, routing, run_jobs, state, without_key_bias

RECIPES = ("digits_promoe", "digits_kmeans", "digits_classification", "digits_diffmoe")
ORDERS = {"1": [2, 0, 3, 1], "3": [1, 3, 0, 2]}
#: Another one: put over ORDERS, it is what the file says that counts, not the file over what was.
SECOND = {"1": [3, 2, 1, 0], "3": [1, 3, 0, 2]}
KINDS = ("weights", "ema", "exp_avg", "exp_avg_sq")
STEPS = 6


def _placement(folder: Path, name: str, layers: dict[str, list[int]]) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"format": 1, "ep_size": 2, "layers": layers}))
    return f"parallel.expert_placement={path}"


def _job(
    folder: Path, recipe: str, *more: str, stop: int | None = None, zero_stage: int = 2, **options
) -> Job:
    limits = () if stop is None else (f"train.stop_after_steps={stop}",)
    return Job(
        run_dir=folder,
        recipe=recipe,
        zero_stage=zero_stage,
        **options,
        overrides=("parallel.ep_size=2", f"train.max_steps={STEPS}", *limits, *more),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every recipe whole; in pieces with two placements; and save a moved checkpoint at
    once.
    """
    folder = tmp_path_factory.mktemp("placement")
    first, second = _placement(folder, "first", ORDERS), _placement(folder, "second", SECOND)
    jobs = []
    for recipe in RECIPES:
        moved = folder / f"{recipe}_moved"
        jobs += [
            _job(folder / recipe, recipe),
            _job(moved, recipe, stop=2),
            _job(moved, recipe, first, stop=1),
            _job(moved, recipe, stop=1),
            _job(moved, recipe, first, second, zero_stage=1),
        ]
    start = folder / "digits_promoe_moved" / "checkpoints" / "step_0000002"
    jobs += [
        _job(
            folder / f"resaved_{stage}",
            "digits_promoe",
            first,
            zero_stage=stage,
            resume=str(start),
            resave_to=str(folder / f"resaved_{stage}" / "checkpoints"),
        )
        for stage in (0, 2)
    ]
    # Four checkpoints stay: the second step's among them.
    jobs = [
        Job(**{**job.__dict__, "overrides": (*job.overrides, "train.keep_last=9")}) for job in jobs
    ]
    assert run_jobs(2, jobs, folder) == [""] * len(jobs)
    return folder


def _by_first_number(name: str, value: torch.Tensor, orders: dict[str, list[int]]) -> torch.Tensor:
    """Put a tensor of experts back into the order of the run's start."""
    parts = name.split(".")
    of_experts = ".moe.routed." in name or name.endswith(
        (
            ".router.prototypes",
            ".router.gate_weight",
            ".router.thresholds",
            ".router.centroids",
            ".classifier.weight",
            ".classifier.bias",
            ".predictor.down.weight",
            ".predictor.down.bias",
        )
    )
    if not of_experts:
        return value
    result = torch.empty_like(value)
    result[torch.tensor(orders[parts[1]])] = value
    return result


@pytest.mark.parametrize("stage", [0, 2])
def test_placement_moves_every_value_of_every_kind_bit_for_bit(folder, stage) -> None:
    before = folder / f"before_{stage}" / "checkpoints"
    before.mkdir(parents=True)
    (before / "step_0000002").symlink_to(
        folder / "digits_promoe_moved" / "checkpoints" / "step_0000002"
    )
    moved = set()
    for kind in KINDS:
        expected, found = state(before.parent, kind), state(folder / f"resaved_{stage}", kind)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(_by_first_number(name, found[name], ORDERS), value), (kind, name)
            moved |= {(kind, name)} if not torch.equal(found[name], value) else set()
    assert {
        (kind, f"blocks.{block}.moe.{name}")
        for kind in ("weights", "ema")
        for block in (1, 3)
        for name in ("routed.up_weight", "routed.down_weight", "router.prototypes")
    } <= moved


@pytest.mark.parametrize("recipe", RECIPES)
def test_placement_leaves_losses_and_weights_as_they_would_be(folder, recipe) -> None:
    whole, moved = folder / recipe, folder / f"{recipe}_moved"
    assert_same_steps(whole, moved)
    for kind in ("weights", "ema"):
        expected, found = without_key_bias(state(whole, kind)), without_key_bias(state(moved, kind))
        for name, value in expected.items():
            torch.testing.assert_close(
                _by_first_number(name, found[name], SECOND), value, rtol=1e-3, atol=2e-5, msg=name
            )


@pytest.mark.parametrize("recipe", RECIPES)
def test_placement_statistics_stay_with_the_experts(folder, recipe) -> None:
    whole, moved = load_log(folder / recipe), load_log(folder / f"{recipe}_moved")
    assert moved.order_LE.tolist() == [SECOND["1"], SECOND["3"]]
    assert [
        line["layer_detail"].get("experts") for line in routing(folder / f"{recipe}_moved")[::10]
    ] == [
        None,
        None,
        None,
        None,
        ORDERS["1"],
        ORDERS["3"],
        ORDERS["1"],
        ORDERS["3"],
        *[SECOND["1"], SECOND["3"]] * 2,
    ]
    # A token at the border of two experts may change sides with the last bit.
    assert np.abs(whole.tokens_TLQE - moved.tokens_TLQE).sum() <= 0.01 * whole.tokens_TLQE.sum()
    np.testing.assert_allclose(moved.to_centroid_TLE, whole.to_centroid_TLE, atol=0.02)
    np.testing.assert_allclose(moved.matrix_LEE, whole.matrix_LEE, atol=0.02)


def test_exchanges_are_timed_and_their_bytes_add_up(folder) -> None:
    for line in routing(folder / "digits_promoe")[::10]:
        detail = line["layer_detail"]
        seconds = {name: each["seconds"] for name, each in detail["exchanges"].items()}
        assert all(0 < each < 60 for each in seconds.values()), seconds
        assert (
            sum(each["bytes"] for name, each in detail["exchanges"].items() if name != "counts")
            == line["layer_bytes_exchanged"]
        )
        assert detail["rank_max_over_mean"] >= 1


def test_placement_is_kept_with_the_checkpoints(folder) -> None:
    checkpoints = list_checkpoints(folder / "digits_promoe_moved" / "checkpoints")
    kept = {
        path.name: read_manifest(path).config["parallel"]["expert_order"] for path in checkpoints
    }
    first, second = ([orders["1"], orders["3"]] for orders in (ORDERS, SECOND))
    assert kept == {
        "step_0000006": second,
        "step_0000004": first,
        "step_0000003": first,
        "step_0000002": None,
    }
    log = (folder / "digits_promoe_moved" / "train.log").read_text()
    assert log.count("experts move to the places of") == 2  # not again where the file was left out


def test_placement_without_a_checkpoint_is_refused(folder, tmp_path) -> None:
    job = _job(tmp_path / "fresh", "digits_promoe", _placement(tmp_path, "first", ORDERS))
    assert (
        "this run starts at step 0: leave it out, or --resume from a checkpoint"
        in run_jobs(2, [job], tmp_path)[0]
    )
