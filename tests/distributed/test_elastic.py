"""A run goes on, on other ranks, expert parallelism, ZeRO stage or precision, as if nothing had
changed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from promoe_ds.checkpoint.conversion import Request, convert
from promoe_ds.checkpoint.engine import load_trusted
from promoe_ds.checkpoint.manifest import list_checkpoints, read_manifest
from promoe_ds.errors import CheckpointError

from .jobs import (
    Job,
    assert_same_state,
    assert_same_steps,
    metrics,
    routing,
    run_jobs,
    state,
    tokens_by_condition,
)

AVERAGES = ("optimizer.ema_decays=[0.9,0.5]", "optimizer.ema_sigma_rels=[0.1]")
KINDS = ("weights", "ema", "ema_0.5", "ema_power_0.1", "exp_avg", "exp_avg_sq")
#: Name -> recipe and the pieces of a run: ranks, ep_size, ZeRO stage, steps (None: to the end).
CHAINS = {
    "fewer_and_more": (
        "digits_promoe",
        [(4, 4, 2, 3), (2, 2, 2, 4), (4, 2, 2, 3), (4, 4, 2, None)],
    ),
    "experts_gathered_and_spread": (
        "digits_promoe",
        [(4, 1, 2, 3), (4, 2, 1, 3), (4, 4, 0, 3), (2, 1, 2, None)],
    ),
    "thresholds": ("digits_diffmoe", [(2, 2, 2, 4), (2, 1, 0, 3), (2, 2, 1, None)]),
    "centroids": ("digits_kmeans", [(2, 1, 0, 4), (2, 2, 2, None)]),
}
STEPS = 12


def _job(folder: Path, recipe: str, ep_size: int, stage: int, steps: int | None, **options) -> Job:
    stop = () if steps is None else (f"train.stop_after_steps={steps}",)
    return Job(
        run_dir=folder,
        recipe=recipe,
        zero_stage=stage,
        **options,
        overrides=(f"parallel.ep_size={ep_size}", f"train.max_steps={STEPS}", *AVERAGES, *stop),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run every chain piece by piece, and once whole on its first layout."""
    folder = tmp_path_factory.mktemp("elastic")
    for turn in range(4):
        for ranks in (2, 4):
            jobs = [
                _job(folder / name, recipe, *pieces[turn][1:])
                for name, (recipe, pieces) in CHAINS.items()
                if turn < len(pieces) and pieces[turn][0] == ranks
            ]
            if turn == 0:
                jobs += [
                    _job(folder / f"{name}_whole", recipe, *pieces[0][1:3], None)
                    for name, (recipe, pieces) in CHAINS.items()
                    if pieces[0][0] == ranks
                ]
            assert not jobs or run_jobs(ranks, jobs, folder) == [""] * len(jobs)
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


@pytest.mark.parametrize("name", CHAINS)
def test_elastic_losses_equal_a_run_that_never_changed(runs, name) -> None:
    assert [line["step"] for line in metrics(runs[name])] == list(range(1, STEPS + 1))
    # DiffMoE and k-means see a pass of one rank at a time: their choices, and so their losses,
    # depend on the ranks' number, which their chains keep.
    assert_same_steps(runs[f"{name}_whole"], runs[name])
    for run in (name, f"{name}_whole"):
        newest = list_checkpoints(runs[run] / "checkpoints")[0]
        assert read_manifest(newest).samples_seen == STEPS * 16
    assert "resharding, from" in (runs[name] / "train.log").read_text()


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("kind", ["weights", *(kind for kind in KINDS if kind.startswith("ema"))])
def test_elastic_averages_equal_those_of_a_run_that_never_changed(runs, name, kind) -> None:
    # Other layouts add gradients in another order, and where one is nearly zero Adam makes a tenth
    # of a step (1e-3) of it. An average that lost its past would be off by several steps.
    assert_same_state(runs[f"{name}_whole"], runs[name], kind, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CHAINS)
def test_elastic_tokens_are_counted_as_ever(runs, name) -> None:
    expected, found = routing(runs[f"{name}_whole"]), routing(runs[name])
    assert tokens_by_condition(found) == tokens_by_condition(expected)


def _root(folder: Path, name: str) -> Path:
    return folder / name / "checkpoints"


def test_elastic_state_is_exact_on_every_layout(runs, tmp_path) -> None:
    """Load on another layout and save at once: every value is the same, bit for bit, whatever lies
    between.
    """
    source = list_checkpoints(runs["fewer_and_more"] / "checkpoints")[0]
    layouts = [
        (2, 1, 2, False),
        (2, 2, 0, False),
        (2, 2, 1, True),
        (4, 2, 2, False),
        (4, 4, 1, False),
    ]
    for ranks in (2, 4):
        jobs = [
            _job(
                tmp_path / f"{ranks}_{ep}_{stage}",
                "digits_promoe",
                ep,
                stage,
                None,
                bf16=bf16,
                resume=str(source),
                resave_to=str(_root(tmp_path, f"{ranks}_{ep}_{stage}")),
            )
            for world, ep, stage, bf16 in layouts
            if world == ranks
        ]
        assert run_jobs(ranks, jobs, tmp_path) == [""] * len(jobs)
    for ranks, ep, stage, _ in layouts:
        resaved = tmp_path / f"{ranks}_{ep}_{stage}"
        assert_same_state(runs["fewer_and_more"], resaved, *KINDS)


def test_elastic_changed_micro_batch_is_told(runs) -> None:
    log = (runs["fewer_and_more"] / "train.log").read_text()
    assert (
        "the micro-batch was 4 and is 8: losses and choices taken over a pass change with it" in log
    )
    assert "the micro-batch was 8 and is 4" in log
    assert "the micro-batch was" not in (runs["fewer_and_more_whole"] / "train.log").read_text()


def test_elastic_other_global_batch_is_refused(runs, tmp_path) -> None:
    job = Job(
        run_dir=runs["centroids"],
        recipe="digits_kmeans",
        overrides=(
            "parallel.ep_size=1",
            f"train.max_steps={STEPS}",
            *AVERAGES,
            "train.global_batch_size=32",
        ),
    )
    assert "train.global_batch_size is 16 there and 32 here" in run_jobs(2, [job], tmp_path)[0]


@pytest.fixture(scope="module")
def branches(runs, tmp_path_factory) -> Path:
    """Begin two branches on the layout of their source: one trains with other averages, one only
    loads, and saves at once.
    """
    folder, source = (
        tmp_path_factory.mktemp("branches"),
        list_checkpoints(runs["centroids"] / "checkpoints")[0],
    )
    job = Job(
        run_dir=folder / "trained",
        recipe="digits_kmeans",
        resume=str(source),
        overrides=(
            "parallel.ep_size=2",
            f"train.max_steps={STEPS + 4}",
            "train.checkpoint_every=2",
            "optimizer.ema_decays=[0.9]",
            "optimizer.ema_sigma_rels=[0.05,0.1]",
        ),
    )
    loaded = Job(
        run_dir=folder / "loaded",
        recipe="digits_kmeans",
        resume=str(source),
        resave_to=str(_root(folder, "loaded")),
        overrides=(
            "parallel.ep_size=2",
            "optimizer.ema_decays=[0.5,0.7,0.9]",
            "optimizer.betas=[0.5,0.6]",
            "optimizer.eps=1e-3",
            "optimizer.weight_decay=0.01",
            "optimizer.max_grad_norm=0.25",
        ),
    )
    assert run_jobs(2, [job, loaded], folder) == ["", ""]
    return folder


def test_branch_takes_new_settings_of_the_optimizer_on_the_same_layout(branches) -> None:
    """DeepSpeed puts back what was saved of them, and refuses where weight decay makes other
    groups.
    """
    shard = load_trusted(
        list_checkpoints(_root(branches, "loaded"))[0] / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    )
    groups = shard["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
    assert {(tuple(group["betas"]), group["eps"]) for group in groups} == {((0.5, 0.6), 1e-3)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}
    assert shard["optimizer_state_dict"]["clip_grad"] == 0.25


def test_branch_finds_its_averages_by_what_they_are(runs, branches) -> None:
    """Named in another order, each goes on with its own past; one that was not kept starts at the
    weights.
    """
    sources = {
        "ema": "ema_0.5",
        "ema_0.9": "ema",
        "ema_0.7": "weights",
        "exp_avg": "exp_avg",
        "weights": "weights",
    }
    for kind, source in sources.items():
        found, expected = state(branches / "loaded", kind), state(runs["centroids"], source)
        assert all(
            torch.equal(found[name], value) for name, value in expected.items() if name in found
        ), kind
    assert read_manifest(list_checkpoints(_root(branches, "loaded"))[0]).averages_since == {
        "ema_0.7": STEPS
    }


def test_branch_keeps_the_averages_that_it_names_and_no_others(branches, tmp_path) -> None:
    """On the same layout as well: an average that is no longer kept does not linger, a new power
    average knows its beginning.
    """
    manifest = read_manifest(list_checkpoints(_root(branches, "trained"))[0])
    assert manifest.averages_since == {"ema_power_0.05": STEPS}
    log = (branches / "trained" / "train.log").read_text()
    assert "the averages ema_0.5 (decay 0.5) are given up" in log
    assert "holds no ema_power_0.05" in log
    with pytest.raises(CheckpointError, match=r"holds no ema_0\.5"):
        state(branches / "trained", "ema_0.5")
    request = Request(destination=tmp_path / "mixed", to="single", ema_sigma_rel=0.07)
    with pytest.raises(CheckpointError, match=r"averages that began at different steps \(0, 12\)"):
        convert(branches / "trained", request)
