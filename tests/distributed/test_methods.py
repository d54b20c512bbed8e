"""Every routing method trains under expert parallelism as without it, keeps its running state and
resumes exactly.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .jobs import Job, assert_same_state, losses, metrics, routing, run_jobs, state

RECIPES = (
    "digits_dit",
    "digits_ditmoe",
    "digits_ecdit",
    "digits_diffmoe",
    "digits_expertrace",
    "digits_promoe",
    "digits_promoe_ec",
    "digits_classification",
    "digits_kmeans",
    "digits_hash",
    "digits_promoe_ddpm",
)
MIXTURES = tuple(name for name in RECIPES if name != "digits_dit")
SHORT = ("train.max_steps=8",)
#: Methods whose routers keep something beside parameters.
STATES = {
    "digits_diffmoe": "thresholds",
    "digits_expertrace": "threshold",
    "digits_kmeans": "centroids",
}


#: One of each kind on four ranks as well: tokens choose, experts choose in an image, in a batch, a
# state that runs on.
ON_FOUR = ("digits_promoe", "digits_promoe_ec", "digits_expertrace", "digits_kmeans")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, asked) -> dict[tuple[str, int, int], Path]:
    """Train on 2 and 4 ranks, experts on every rank and spread over all."""
    folder = tmp_path_factory.mktemp("methods")
    found: dict[tuple[str, int, int], Path] = {}
    on_four = [
        recipe for recipe, world_size in sorted(asked("recipe", "world_size")) if world_size == 4
    ]
    for world_size, recipes in ((2, RECIPES), (4, on_four)):
        jobs = []
        for recipe in recipes:
            for ep_size in (1, world_size) if recipe in MIXTURES else (1,):
                found[recipe, world_size, ep_size] = folder / f"{recipe}_w{world_size}_ep{ep_size}"
                jobs.append(
                    Job(
                        run_dir=found[recipe, world_size, ep_size],
                        recipe=recipe,
                        overrides=(*SHORT, f"parallel.ep_size={ep_size}"),
                    )
                )
        assert run_jobs(world_size, jobs, folder) == [""] * len(jobs)
    return found


@pytest.mark.parametrize(
    ("recipe", "world_size"),
    [
        *((recipe, 2) for recipe in MIXTURES),
        *(
            pytest.param(recipe, 4, marks=() if recipe in ON_FOUR else pytest.mark.combinations)
            for recipe in MIXTURES
        ),
    ],
)
def test_method_expert_parallel_equals_local(runs, recipe, world_size) -> None:
    local, spread = runs[recipe, world_size, 1], runs[recipe, world_size, world_size]
    for before, after in zip(metrics(local), metrics(spread), strict=True):
        terms = [name for name in before if name.startswith("loss")]
        assert {name: after[name] for name in terms} == pytest.approx(
            {name: before[name] for name in terms}, rel=1e-4, abs=1e-7
        )
    assert_same_state(local, spread, "weights", "ema", rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["digits_ecdit", "digits_promoe_ec", "digits_diffmoe"])
def test_method_experts_choose_load_is_even(runs, recipe) -> None:
    lines = routing(runs[recipe, 2, 2])
    for step in range(1, 9):
        here = [
            line["tokens_per_expert"]
            for line in lines
            if (line["step"], line["layer"]) == (step, 1)
        ]
        totals = torch.tensor(here).sum(dim=0)
        assert (totals == totals[0]).all()


@pytest.mark.parametrize(("recipe", "name"), STATES.items())
def test_running_state_moves_and_is_the_same_for_raw_and_averaged_weights(
    runs, recipe, name
) -> None:
    weights, ema = (state(runs[recipe, 2, 2], kind) for kind in ("weights", "ema"))
    found = [key for key in weights if key.endswith(f"router.{name}")]
    assert len(found) == 2  # the two MoE layers
    for key in found:
        assert weights[key].dtype == torch.float32
        assert weights[key].abs().sum() > 0
        assert torch.equal(weights[key], ema[key])
        assert key not in state(runs[recipe, 2, 2], "exp_avg")


@pytest.mark.parametrize("bf16", [False, True])
def test_running_state_interrupted_run_repeats_uninterrupted_one(tmp_path, bf16) -> None:
    """Bit for bit, thresholds and centroids included, also where weights are bf16 and capacity goes
    by a schedule.
    """
    jobs, pairs = [], {}
    for recipe in STATES:
        whole, parts = tmp_path / f"{recipe}_whole", tmp_path / f"{recipe}_parts"
        pairs[recipe] = whole, parts
        common = {"recipe": recipe, "bf16": bf16}
        steps: tuple[str, ...] = ("train.max_steps=6",)
        if recipe == "digits_diffmoe":
            steps += ("routing.capacity_schedule=[1, 5]",)
        jobs.append(Job(run_dir=whole, overrides=steps, **common))
        jobs += [Job(run_dir=parts, overrides=(*steps, "train.stop_after_steps=3"), **common)] * 2
    assert run_jobs(2, jobs, tmp_path) == [""] * len(jobs)
    for recipe, (whole, parts) in pairs.items():
        assert losses(parts) == losses(whole), recipe
        assert_same_state(whole, parts, "weights")
        kept = [v.dtype for name, v in state(parts).items() if name.endswith(STATES[recipe])]
        assert kept == [torch.float32] * 2
