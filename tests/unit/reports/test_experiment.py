"""One folder, one experiment: resumption, refusals, failures, with the training replaced by made-up
results.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from promoe_ds.errors import ConfigError, TrainingError
from promoe_ds.reports.comparison import page, runner
from promoe_ds.reports.comparison.candidates import ComparisonRequest, load_candidates
from promoe_ds.reports.comparison.experiment import compare
from promoe_ds.reports.comparison.runner import (
    PARTS,
    PlannedRun,
    do_run,
    judge_command,
    newest_line,
    train_command,
)
from promoe_ds.reports.page import Page

from .synthetic import synthetic_result

ZERO2 = Path(__file__).parents[3] / "ds_configs" / "zero2_fp32.json"


@pytest.fixture
def request_(tmp_path: Path) -> ComparisonRequest:
    return ComparisonRequest(
        recipes=("digits_promoe",),
        variants=("no_rcl=digits_promoe,routing.rcl_weight=0",),
        steps=20,
        seeds=(0, 1),
        out=tmp_path / "out",
        deepspeed_config=ZERO2,
    )


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace training, judging and drawing the page; return the runs that were done. Runs called
    `bad` fail.
    """
    runs: list[str] = []

    def _train(run: PlannedRun, request: ComparisonRequest) -> list[str]:
        runs.append(run.run_dir.name)
        run.run_dir.mkdir(parents=True, exist_ok=True)
        return ["sh", "-c", f"exit {5 if run.candidate.name == 'bad' else 0}"]

    monkeypatch.setitem(PARTS, "training", _train)
    monkeypatch.setitem(PARTS, "judging", lambda run, request: ["true"])
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(
        runner,
        "collect_result",
        lambda run_dir, config: {
            name: value
            for name, value in synthetic_result(config.train.seed).items()
            if name not in ("seed", "samples", "sample_seed", "environment")
        },
    )
    monkeypatch.setattr(
        page,
        "build_page",
        lambda comparison, folder: Page("Comparison", f"{len(comparison['missing'])} missing"),
    )
    return runs


def _read(request: ComparisonRequest) -> dict:
    return json.loads((request.out / "comparison.json").read_text())


def test_compare_writes_both_files_and_does_a_seed_of_all_before_the_next(request_, done) -> None:
    out = request_.out
    assert compare(replace(request_, jobs=1)) == [out / "comparison.json", out / "comparison.html"]
    assert done == ["digits_promoe-seed0", "no_rcl-seed0", "digits_promoe-seed1", "no_rcl-seed1"]
    first, second = _read(request_)["contenders"]
    assert (first["difference_to_first"], list(second["seeds"])) == (None, ["0", "1"])
    assert second["difference_to_first"]["final_loss"]["n"] == 2
    assert first["parameters"]["activated"] == second["parameters"]["activated"]
    assert {"processor", "cores"} <= first["seeds"]["0"]["environment"]["machine"].keys()
    assert "<h1>0 missing</h1>" in (out / "comparison.html").read_text()


def test_compare_again_repeats_nothing_and_takes_more_seeds_and_candidates(request_, done) -> None:
    compare(request_)
    done.clear()
    compare(replace(request_, jobs=1, tolerance=0.5))
    assert done == []
    compare(
        replace(
            request_,
            seeds=(0, 1, 5),
            jobs=1,
            variants=(*request_.variants, "dense=digits_promoe,routing.method=dense"),
        )
    )
    assert done == [
        "dense-seed0",
        "dense-seed1",
        "digits_promoe-seed5",
        "no_rcl-seed5",
        "dense-seed5",
    ]
    compare(replace(request_, variants=()))
    assert [entry["name"] for entry in _read(request_)["contenders"]] == ["digits_promoe"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 30}, "steps is 20 there and 30 here"),
        ({"samples": 10}, "samples is 500 there and 10 here"),
        ({"sample_seed": 3}, "sample_seed is 0 there and 3 here"),
        ({"ranks": 2}, "ranks is 1 there and 2 here"),
        ({"overrides": ("model.depth=2",)}, "digits_promoe: model.depth is 6 there and 2 here"),
        (
            {"variants": ("no_rcl=digits_promoe,routing.rcl_weight=0.5",)},
            "no_rcl: routing.rcl_weight is 0.0 there and 0.5 here",
        ),
    ],
)
def test_compare_other_settings_in_the_same_folder_are_refused(
    request_, done, change, message
) -> None:
    compare(request_)
    done.clear()
    with pytest.raises(ConfigError, match="has another experiment") as caught:
        compare(replace(request_, **change))
    assert message in str(caught.value)
    assert done == []


@pytest.mark.parametrize(("name", "value"), [("reduce_bucket_size", 1000), ("stage", 1)])
def test_compare_takes_buckets_of_another_size_and_no_other_stage(
    request_, done, tmp_path, name, value
) -> None:
    compare(request_)
    done.clear()
    values = json.loads(request_.deepspeed_config.read_text())
    values["zero_optimization"][name] = value
    other = tmp_path / "other.json"
    other.write_text(json.dumps(values))
    with nullcontext() if name != "stage" else pytest.raises(ConfigError, match="deepspeed is "):
        compare(replace(request_, deepspeed_config=other))
    assert done == []


def test_compare_candidate_left_out_and_changed_is_refused_by_its_result(request_, done) -> None:
    compare(request_)
    compare(replace(request_, variants=()))
    with pytest.raises(
        ConfigError, match=r"no_rcl, seed 0: routing\.rcl_weight is 0\.0 there and 0\.5 here"
    ):
        compare(replace(request_, variants=("no_rcl=digits_promoe,routing.rcl_weight=0.5",)))


def test_compare_failed_run_is_reported_the_others_continue_and_it_is_tried_again(
    request_, done
) -> None:
    bad = replace(request_, variants=("bad=digits_promoe,routing.rcl_weight=0",))
    for _ in range(2):
        with pytest.raises(TrainingError, match="2 of 4 runs have no result") as caught:
            compare(bad)
        assert "bad, seed 0: training ended with exit code 5; log: " in str(caught.value)
    assert sorted(done) == [
        *["bad-seed0"] * 2,
        *["bad-seed1"] * 2,
        "digits_promoe-seed0",
        "digits_promoe-seed1",
    ]
    comparison = _read(bad)
    assert [(run["contender"], run["seed"]) for run in comparison["missing"]] == [
        ("bad", 0),
        ("bad", 1),
    ]
    assert list(comparison["contenders"][0]["seeds"]) == ["0", "1"]
    assert "<h1>2 missing</h1>" in (bad.out / "comparison.html").read_text()


def test_compare_foreign_folder_is_left_alone(request_, done) -> None:
    request_.out.mkdir()
    (request_.out / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty and has no comparison"):
        compare(request_)
    assert [path.name for path in request_.out.iterdir()] == ["thesis.txt"]


def test_compare_folder_in_use_is_refused(request_, done, monkeypatch) -> None:
    def _collect(run_dir, config) -> dict:
        compare(request_)
        pytest.fail("two comparisons in one folder")

    monkeypatch.setattr(runner, "collect_result", _collect)
    with pytest.raises(TrainingError, match="another comparison"):
        compare(replace(request_, variants=(), seeds=(0,)))


@pytest.mark.parametrize("library", ["vl_convert", "sklearn"])
def test_compare_missing_library_is_reported_before_training(
    request_, done, monkeypatch, library
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ConfigError, match=rf"{library} is not installed.*pip install 'promoe_ds\[report\]'"
    ):
        compare(request_)
    assert (done, request_.out.exists()) == ([], False)


def test_compare_full_disk_is_one_message(request_, done, monkeypatch) -> None:
    def _fail(comparison, folder) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "build_page", _fail)
    with pytest.raises(
        TrainingError, match=r"the report could not be written: .*No space left on device"
    ):
        compare(request_)


def _planned(request: ComparisonRequest) -> PlannedRun:
    return PlannedRun(candidate=load_candidates(request)[1], seed=4, root=request.out)


def test_commands_are_the_real_entry_with_everything_that_is_equal(request_) -> None:
    run = _planned(request_)
    words = " ".join(train_command(run, replace(request_, ranks=2)))
    for part in (
        "-m torch.distributed.run --standalone --nproc_per_node 2 -m promoe_ds.cli.train",
        f"--run-dir {request_.out}/runs/no_rcl-seed4 --resume auto",
        "parallel.ep_size=1",
        "routing.rcl_weight=0 train.max_steps=20 train.seed=4",
    ):
        assert part in words
    assert train_command(run, request_)[1:3] == ["-m", "promoe_ds.cli.train"]
    assert judge_command(run, request_)[-2:] == ["500", "0"]


def test_do_run_failed_child_names_deed_code_reason_and_log(request_, monkeypatch) -> None:
    run = _planned(request_)
    script = "import sys; sys.stderr.write('error: the disk is full\\n'); sys.exit(4)"
    monkeypatch.setitem(PARTS, "training", lambda run, request: [sys.executable, "-c", script])
    run.log_file.parent.mkdir(parents=True)
    run.log_file.write_text("error: of an earlier attempt\n")
    with pytest.raises(TrainingError) as caught:
        for process in do_run(run, request_, {}, ()):
            process.wait()
    assert (
        str(caught.value)
        == f"training ended with exit code 4 (the disk is full); log: {run.log_file}"
    )


def test_compare_interrupted_ends_those_under_way(request_, done, monkeypatch) -> None:
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setitem(PARTS, "training", lambda run, request: ["sleep", "60"])
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda *given, **more: started.append(popen(*given, **more)) or started[-1],
    )

    def _interrupt(*given) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Progress, "add", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare(request_)
    assert [process.returncode for process in started] == [-15, -15]


def test_children_know_nothing_of_a_launcher_around_them(request_, monkeypatch) -> None:
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "PMIX_RANK")
    names += ("PMI_SIZE", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_SIZE")
    for name in names:
        monkeypatch.setenv(name, "2")
    script = f'test -z "${"$".join(names)}" && test $OMP_NUM_THREADS = 1'
    monkeypatch.setitem(PARTS, "training", lambda run, request: ["sh", "-c", script])
    assert next(do_run(_planned(request_), request_, {}, ())).wait() == 0


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("", None),
        ('{"step": 1', None),
        ('{"step": 1}\n' * 1000 + '{"step": 2}\n{"step": 3, "lo', 2),
    ],
)
def test_newest_line_of_a_growing_file_is_the_last_whole_one(tmp_path, text, step) -> None:
    assert newest_line(tmp_path / "metrics.jsonl") is None
    (tmp_path / "metrics.jsonl").write_text(text)
    line = newest_line(tmp_path / "metrics.jsonl")
    assert (line and line.step) == step
