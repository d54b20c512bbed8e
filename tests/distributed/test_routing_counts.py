"""Tokens are counted once: whatever the expert parallelism, accumulation and recomputation."""

from __future__ import annotations

from pathlib import Path

import pytest

from .jobs import Job, routing, run_jobs

#: Name -> what differs; each four ranks, three steps of 16 images of 16 tokens.
RUNS = {
    "ep_1": ("parallel.ep_size=1",),
    "ep_2": ("parallel.ep_size=2",),
    "ep_4": ("parallel.ep_size=4",),
    "accumulated": ("parallel.ep_size=2", "train.micro_batch_size=1"),
    "recomputed": ("parallel.ep_size=2", "parallel.activation_checkpointing=full"),
    "two_choices": (
        "parallel.ep_size=4",
        "routing.top_k=2",
        "train.micro_batch_size=2",
        "parallel.activation_checkpointing=full",
    ),
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    folder: Path = tmp_path_factory.mktemp("counts")
    jobs = [
        Job(run_dir=folder / name, overrides=("train.max_steps=3", *overrides))
        for name, overrides in RUNS.items()
    ]
    assert run_jobs(4, jobs, folder) == [""] * len(jobs)
    return {name: routing(folder / name) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_counts_add_up_to_the_tokens_of_every_step_and_layer(lines, name) -> None:
    choices = 2 if name == "two_choices" else 1
    for step in (1, 2, 3):
        for layer in (1, 3):
            here = [line for line in lines[name] if (line["step"], line["layer"]) == (step, layer)]
            conditional = sum(line["conditional_tokens"] for line in here)
            assert conditional + sum(line["unconditional_tokens"] for line in here) == 16 * 16
            assert sum(sum(line["tokens_per_expert"]) for line in here) == choices * conditional
            detail = here[0]["layer_detail"]
            by_expert = [
                sum(column)
                for column in zip(*(line["tokens_per_expert"] for line in here), strict=True)
            ]
            for table in ("tokens_per_class", "tokens_per_position"):
                assert [
                    sum(column) for column in zip(*detail[table]["counts"], strict=True)
                ] == by_expert
            assert sum(detail["tokens_per_ep_rank"]) == choices * conditional


@pytest.mark.parametrize("name", ["ep_2", "ep_4", "accumulated", "recomputed"])
def test_counts_of_the_first_step_are_equal_expert_by_expert(lines, name) -> None:
    # Later steps follow weights that differ in their last bits, which may move a token at a border.
    first = {
        run: [
            (line["tokens_per_expert"], line["conditional_tokens"], line["unconditional_tokens"])
            for line in lines[run]
            if line["step"] == 1
        ]
        for run in (name, "ep_1")
    }
    assert first[name] == first["ep_1"]
    details = [
        [
            line["layer_detail"]
            for line in lines[run]
            if line["step"] == 1 and "layer_detail" in line
        ]
        for run in (name, "ep_1")
    ]
    for here, there in zip(*details, strict=True):
        assert here["tokens_per_class"] == there["tokens_per_class"]
        assert here["tokens_per_position"] == there["tokens_per_position"]
        if (
            name != "accumulated"
            # the contrastive loss is one pass's: cut another way, it moves the prototypes another
            # way
        ):
            assert here["prototype_to_centroid"] == pytest.approx(
                there["prototype_to_centroid"], abs=1e-3
            )


def test_bytes_do_not_count_recomputation(lines) -> None:
    pairs = [
        [line["layer_bytes_exchanged"] for line in lines[name] if line["step"] == 1]
        for name in ("ep_2", "recomputed")
    ]
    assert pairs[0] == pairs[1] and all(pairs[0])
