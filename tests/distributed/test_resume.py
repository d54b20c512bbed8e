"""Interrupted and resumed twice equals uninterrupted, bit for bit; what cannot be resumed says
why.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from promoe_ds.checkpoint.manifest import MANIFEST

from .jobs import (
    CONDITIONS,
    Job,
    assert_same_state,
    assert_same_steps,
    losses,
    metrics,
    routing,
    run_jobs,
    state,
    without_times,
)

#: Two ranks share the experts; accumulation and activation checkpointing are on, as they may be in
# earnest.
TWO_RANKS = (
    "parallel.ep_size=2",
    "train.micro_batch_size=4",
    "parallel.activation_checkpointing=full",
    "train.max_steps=12",
)
KINDS = ("weights", "ema", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train 12 steps at once, and in pieces of 3, 5 and the rest; in fp32 under ZeRO 0 and 2, and
    in bf16.
    """
    folder = tmp_path_factory.mktemp("resume")
    jobs, found = [], {}
    for name, stage, bf16, condition in (
        ("zero2", 2, False, "class"),
        ("zero0", 0, False, "class"),
        ("bf16", 1, True, "class"),
        ("text", 2, False, "text"),
        ("buckets", 2, False, "buckets"),
        ("modern", 2, True, "modern"),
    ):
        for kind, pieces in (("whole", (None,)), ("pieces", (3, 5, None))):
            found[f"{name}_{kind}"] = run_dir = folder / f"{name}_{kind}"
            for steps in pieces:
                stop = () if steps is None else (f"train.stop_after_steps={steps}",)
                # The decay of a warm-up depends on the number of the update.
                stop += ("optimizer.ema_warmup=true",) * bf16
                jobs.append(
                    Job(
                        run_dir=run_dir,
                        zero_stage=stage,
                        bf16=bf16,
                        overrides=(*CONDITIONS[condition], *TWO_RANKS, *stop),
                    )
                )
    assert run_jobs(2, jobs, folder) == [""] * len(jobs)
    return found


@pytest.mark.parametrize("name", ["zero2", "zero0", "bf16", "text", "buckets", "modern"])
def test_resume_twice_equals_uninterrupted_bit_for_bit(runs, name) -> None:
    whole, pieces = runs[f"{name}_whole"], runs[f"{name}_pieces"]
    assert_same_state(whole, pieces, *KINDS)
    timing = {"images_per_second", "tflops", "mfu", "memory_gb"}
    for before, after in zip(metrics(whole), metrics(pieces), strict=True):
        assert {k: v for k, v in before.items() if k not in timing} == {
            k: v for k, v in after.items() if k not in timing
        }
    assert without_times(routing(whole)) == without_times(routing(pieces))


def test_resume_of_buckets_on_one_process_equals_uninterrupted_and_two_ranks(
    runs, tmp_path
) -> None:
    jobs = [
        Job(
            run_dir=tmp_path / name,
            overrides=(
                *CONDITIONS["buckets"],
                "parallel.ep_size=1",
                "train.micro_batch_size=8",
                "parallel.activation_checkpointing=full",
                "train.max_steps=12",
                *stop,
            ),
        )
        for name, stop in (
            ("whole", ()),
            ("pieces", ("train.stop_after_steps=5",)),
            ("pieces", ()),
        )
    ]
    assert run_jobs(1, jobs, tmp_path) == [""] * 3
    assert_same_state(tmp_path / "whole", tmp_path / "pieces", *KINDS)
    assert losses(tmp_path / "whole") == losses(tmp_path / "pieces")
    assert_same_steps(runs["buckets_whole"], tmp_path / "whole")


def test_state_bf16_masters_and_average_stay_fp32(runs) -> None:
    for kind in ("weights", "ema"):
        values = state(runs["bf16_whole"], kind)["blocks.1.moe.routed.up_weight"]
        assert values.dtype == torch.float32
        assert not torch.equal(values, values.bfloat16().float()), (
            "fp32 masters cannot all be bf16 numbers after training"
        )


@pytest.fixture
def resumable(runs, tmp_path) -> Path:
    """Return a copy of the run in pieces: checkpoints of the steps 3, 8 and 12."""
    return Path(shutil.copytree(runs["zero2_pieces"], tmp_path / "run"))


def _resume(
    run_dir: Path,
    tmp_path: Path,
    *,
    world_size: int = 2,
    resume: str = "auto",
    overrides: tuple[str, ...] = (),
    into: Path | None = None,
    zero_stage: int = 2,
) -> str:
    job = Job(
        run_dir=into or run_dir,
        resume=resume,
        zero_stage=zero_stage,
        overrides=(*TWO_RANKS, *overrides),
    )
    return run_jobs(world_size, [job], tmp_path)[0]


def _damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()


def test_resume_auto_takes_the_newest_sound_checkpoint(resumable, tmp_path) -> None:
    checkpoints = resumable / "checkpoints"
    _damage(checkpoints / "step_0000012" / "mp_rank_00_model_states.pt", "flipped")
    (checkpoints / "step_0000008" / MANIFEST).unlink()
    (checkpoints / "step_0000099.tmp").mkdir()
    (checkpoints / "latest").write_text("step_0000777")
    assert _resume(resumable, tmp_path) == ""
    log = (resumable / "train.log").read_text()
    assert "mp_rank_00_model_states.pt does not match its checksum" in log
    assert "step_0000099.tmp (the save never ended)" in log
    assert f"resume: skipped {checkpoints / 'step_0000008'}: no {MANIFEST}" in log
    assert f"resume: taking {checkpoints / 'step_0000003'}" in log
    assert (checkpoints / "latest").read_text() == "step_0000012"
    assert [line["step"] for line in metrics(resumable)] == list(range(1, 13))


def test_resume_refusals_name_the_cause(resumable, tmp_path) -> None:
    """Explicit paths that are missing or broken, foreign runs and architectures: never a fresh
    start.
    """
    checkpoints = resumable / "checkpoints"
    sound, broken, bare = (
        checkpoints / "step_0000003",
        checkpoints / "step_0000008",
        checkpoints / "step_0000012",
    )
    _damage(broken / "zero_pp_rank_1_mp_rank_00_optim_states.pt", "truncated")
    (bare / MANIFEST).unlink()
    fresh = tmp_path / "fresh"

    def job(name: str, resume: str, *overrides: str, run_dir: Path | None = None) -> Job:
        return Job(
            run_dir=run_dir or fresh / name, resume=resume, overrides=(*TWO_RANKS, *overrides)
        )

    cases = {
        "zero_pp_rank_1_mp_rank_00_optim_states.pt has": job("a", str(broken)),
        "neither a complete checkpoint": job("b", str(bare)),
        "nowhere: there is no such": job("c", "nowhere"),
        "another architecture or objective: model.hidden_size is 32 there and 48 here": job(
            "d", str(sound), "model.hidden_size=48"
        ),
        "already holds another run: optimizer.lr is 0.001 there and 0.002 here": job(
            "f", "auto", "optimizer.lr=0.002", run_dir=resumable
        ),
        "--resume none would overwrite it": job("g", "none", run_dir=resumable),
    }
    errors = run_jobs(2, list(cases.values()), tmp_path)
    for expected, error in zip(cases, errors, strict=True):
        assert expected in error


def test_resume_auto_no_sound_checkpoint_is_an_error(resumable, tmp_path) -> None:
    for folder in (resumable / "checkpoints").glob("step_*"):
        _damage(folder / "mp_rank_00_model_states.pt", "missing")
    error = _resume(resumable, tmp_path)
    assert "none of the checkpoints" in error
    assert "mp_rank_00_model_states.pt is missing" in error


def test_resume_explicit_foreign_run_starts_a_fork(resumable, tmp_path) -> None:
    fork = tmp_path / "fork"
    source = resumable / "checkpoints" / "step_0000008"
    assert (
        _resume(
            resumable, tmp_path, resume=str(source), into=fork, overrides=("optimizer.lr=0.0005",)
        )
        == ""
    )
    assert [line["step"] for line in metrics(fork)] == [9, 10, 11, 12]


def test_resume_with_other_classes_starts_a_run_at_the_weights(resumable, tmp_path) -> None:
    """The same command continues it; every weight but the label rows is the source's."""
    source, branch = resumable / "checkpoints" / "step_0000012", tmp_path / "branch"
    overrides = ("model.num_classes=12", "optimizer.warmup_steps=0", "optimizer.lr=1e-8")
    for steps in (1, 2):
        stop = f"train.stop_after_steps={steps}"
        assert (
            _resume(
                resumable, tmp_path, resume=str(source), into=branch, overrides=(*overrides, stop)
            )
            == ""
        )
    assert [line["step"] for line in metrics(branch)] == [1, 2, 3]
    assert "label_embedding.table.weight" in (branch / "train.log").read_text()
    weights, average = (state(resumable, kind) for kind in ("weights", "ema"))
    moved = {name: value.lerp(weights[name], 1 - 0.995**3) for name, value in average.items()}
    labels = "label_embedding.table.weight"
    for before, kind in ((weights, "weights"), (moved, "ema")):
        after = state(branch, kind)
        assert len(after[labels]) == 13
        for values in (before, after):
            values[labels] = values[labels][-1]
        torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


def test_resume_from_an_older_checkpoint_sets_the_later_ones_aside(resumable, tmp_path) -> None:
    """The run goes on from step 3; what was reached before from there is another branch and does
    not come back.
    """
    older = resumable / "checkpoints" / "step_0000003"
    assert (
        _resume(resumable, tmp_path, resume=str(older), overrides=("train.stop_after_steps=2",))
        == ""
    )
    names = sorted(path.name for path in (resumable / "checkpoints").iterdir() if path.is_dir())
    assert names == [
        "step_0000003",
        "step_0000005",
        "step_0000008.abandoned",
        "step_0000012.abandoned",
    ]
    assert [line["step"] for line in metrics(resumable)] == [1, 2, 3, 4, 5]
    assert _resume(resumable, tmp_path, overrides=("train.stop_after_steps=1",)) == ""
    assert [line["step"] for line in metrics(resumable)] == [1, 2, 3, 4, 5, 6]


def test_retention_keeps_last_complete_ones(runs) -> None:
    names = sorted(
        path.name for path in (runs["zero2_pieces"] / "checkpoints").iterdir() if path.is_dir()
    )
    assert names == ["step_0000003", "step_0000008", "step_0000012"]
    manifest = json.loads((runs["zero2_pieces"] / "checkpoints" / names[0] / MANIFEST).read_text())
    assert manifest["step"] == 3
    assert manifest["samples_seen"] == 3 * 16
