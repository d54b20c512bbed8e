"""The same losses, norms and weights whatever the ranks, the expert parallelism and the ZeRO
stage.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .jobs import (
    CONDITIONS,
    Job,
    assert_near_state,
    assert_same_steps,
    metrics,
    routing,
    run_jobs,
    tokens_by_condition,
)

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]
STAGES = (0, 1, 2)
#: Every layout under ZeRO 2, and every stage where experts are spread over all ranks and over some.
COVERING = [
    (layout, stage)
    for layout in LAYOUTS
    for stage in STAGES
    if stage == 2 or layout in ((2, 2), (4, 2))
]
#: Under text, each number of ranks and of experts' ranks, and each stage, once.
TEXT_CASES = [((1, 1), 2), ((2, 1), 1), ((2, 2), 0), ((4, 2), 1), ((4, 4), 2)]
#: With another block, most ranks once.
MODERN_CASES = [((1, 1), 2), ((4, 2), 1)]
CHOSEN = {"class": COVERING, "text": TEXT_CASES, "modern": MODERN_CASES}
CASES = pytest.mark.parametrize(
    ("condition", "layout", "stage"),
    [
        pytest.param(
            condition,
            layout,
            stage,
            marks=() if (layout, stage) in covering else pytest.mark.combinations,
        )
        for condition, covering in CHOSEN.items()
        for layout in LAYOUTS
        for stage in STAGES
    ],
)
STEPS = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, asked) -> dict[tuple[str, int, int, int], Path]:
    """Train some clipped steps on every layout and stage that is asked for."""
    folder = tmp_path_factory.mktemp("layouts")
    found = {}
    chosen = {(condition, *case) for condition, cases in CHOSEN.items() for case in cases}
    for world_size in (1, 2, 4):
        jobs = []
        for condition, (ranks, ep_size), stage in sorted(
            chosen | asked("condition", "layout", "stage")
        ):
            if ranks == world_size:
                key = condition, ranks, ep_size, stage
                found[key] = folder / f"{condition}_w{ranks}_ep{ep_size}_z{stage}"
                overrides = f"parallel.ep_size={ep_size}", f"train.max_steps={STEPS}"
                jobs.append(
                    Job(
                        run_dir=found[key],
                        zero_stage=stage,
                        overrides=(*CONDITIONS[condition], *overrides),
                    )
                )
        assert run_jobs(world_size, jobs, folder) == [""] * len(jobs)
    return found


@CASES
def test_layout_any_ranks_and_stage_equals_one_rank(runs, condition, layout, stage) -> None:
    reference, other = runs[condition, 1, 1, 2], runs[(condition, *layout, stage)]
    assert_same_steps(reference, other)
    expected, found = metrics(reference), metrics(other)
    assert len(expected) == STEPS
    for name in ("loss_diffusion", "loss_rcl"):
        terms = [line[name] for line in expected]
        assert [line[name] for line in found] == pytest.approx(terms, rel=1e-5)
    assert any(line["grad_norm"] > 0.5 for line in expected), "clipping was never active"


@pytest.mark.parametrize("kind", ["weights", "ema"])
@CASES
def test_layout_any_ranks_and_stage_ends_with_same_state(
    runs, condition, layout, stage, kind
) -> None:
    reference, other = runs[condition, 1, 1, 2], runs[(condition, *layout, stage)]
    assert_near_state(reference, other, kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_routing_counts_any_layout_add_up_exactly(runs, layout) -> None:
    reference, lines = routing(runs["class", 1, 1, 2]), routing(runs[("class", *layout, 2)])
    bins, layers = 10, 2
    assert len(lines) == STEPS * bins * layers
    for line in lines:
        assert sum(line["tokens_per_expert"]) == line["conditional_tokens"]
    assert tokens_by_condition(lines) == tokens_by_condition(reference)


def test_exchange_bytes_two_ranks_counts_rows_that_left(runs) -> None:
    assert all(line["layer_bytes_exchanged"] == 0 for line in routing(runs["class", 2, 1, 2]))
    lines = [line for line in routing(runs["class", 2, 2, 2]) if line["timestep_bin"] == 0]
    row_bytes = 4 * 32 * 4  # four crossings of 32 fp32 numbers
    assert all(line["layer_bytes_exchanged"] % row_bytes == 0 for line in lines)
    assert (
        0 < sum(line["layer_bytes_exchanged"] for line in lines) < len(lines) * 16 * 16 * row_bytes
    )
