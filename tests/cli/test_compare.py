"""The comparison as a user runs it: two candidates and two seeds, resumed, enlarged, with a run
that fails.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from .commands import ZERO2, check_refused, succeed, tool

TINY = (
    "model.hidden_size=32",
    "model.depth=2",
    "model.num_heads=2",
    "train.global_batch_size=8",
    "sampling.steps=2",
)
CANDIDATES = ("digits_promoe", "dense")


def _compare(folder: Path, seeds: str, *options: str) -> subprocess.CompletedProcess[str]:
    candidates = (
        "--recipes",
        "digits_promoe",
        "--variant",
        "dense=digits_promoe,routing.method=dense",
    )
    sizes = ("--steps", "24", "--samples", "20", "--deepspeed-config", ZERO2, "--set", *TINY)
    where = ("--seeds", seeds, "--out", "out")
    return tool("compare", *candidates, *where, *sizes, *options, cwd=folder, timeout=500)


def _read(folder: Path) -> dict:
    return json.loads((folder / "out" / "comparison.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compare two candidates with two seeds."""
    folder = tmp_path_factory.mktemp("compare")
    done = _compare(folder, "0,1")
    assert done.returncode == 0, done.stderr + "".join(
        log.read_text() for log in folder.glob("out/logs/*")
    )
    assert done.stdout.splitlines() == ["wrote out/comparison.json", "wrote out/comparison.html"]
    return folder


def _times(folder: Path) -> dict[Path, int]:
    kinds = (".json", ".jsonl", ".yaml")
    files = [path for path in folder.glob("out/runs/*/*") if path.suffix in kinds]
    return {path: path.stat().st_mtime_ns for path in files}


def test_compare_json_has_every_figure_of_every_run(folder) -> None:
    comparison = _read(folder)
    promoe, dense = comparison["contenders"]
    assert (promoe["name"], dense["name"], comparison["missing"]) == (*CANDIDATES, [])
    for entry in (promoe, dense):
        assert list(entry["seeds"]) == ["0", "1"]
        for result in entry["seeds"].values():
            assert (result["checkpoint_step"], result["images"]["samples"]) == (24, 20)
            assert [step for step, _ in result["loss_curve"]] == list(range(1, 25))
            assert result["step_ms"] > 0 and 0 <= result["accuracy"] <= 1
        assert entry["summary"]["final_loss"]["n"] == entry["summary"]["frechet"]["n"] == 2
    assert (len(promoe["seeds"]["0"]["layers"]), dense["seeds"]["0"]["layers"]) == (1, None)
    assert dense["difference_to_first"]["accuracy"]["n"] == 2
    page = (folder / "out" / "comparison.html").read_text()
    assert (page.count('class="chart" role='), page.count('src="data:image/png')) == (7, 2)


def test_compare_runs_of_a_seed_share_data_and_noise_not_those_of_two(folder) -> None:
    """At step 1 all models put out zeros (adaLN-Zero): equal batches and noise have equal
    losses.
    """
    first = {
        (entry["name"], seed): result["loss_curve"][0][1]
        for entry in _read(folder)["contenders"]
        for seed, result in entry["seeds"].items()
    }
    for seed in "01":
        assert first["digits_promoe", seed] == pytest.approx(first["dense", seed], rel=1e-6)
    assert first["dense", "0"] != pytest.approx(first["dense", "1"], rel=1e-3)


def test_compare_again_recomputes_nothing_then_other_settings_are_refused(folder) -> None:
    before = _times(folder)
    assert "runs: 4, of which 0 to do" in succeed(_compare(folder, "0,1"))
    assert _times(folder) == before
    done = _compare(folder, "0,1", "optimizer.lr=0.5")
    check_refused(done, "digits_promoe: optimizer.lr is 0.001 there and 0.5 here", 2)


def test_compare_added_seed_with_a_failing_run_keeps_the_rest(folder) -> None:
    blocker = folder / "out" / "runs" / "dense-seed2" / "thesis.txt"
    blocker.parent.mkdir()
    blocker.write_text("precious")
    before = _times(folder)
    done = _compare(folder, "0,1,2")
    check_refused(done, "is not empty and holds no run of this package", 5)
    failure = "dense, seed 2: training ended with exit code 4"
    assert done.stderr.count(failure) == 2  # when it happened, and at the end
    assert "log: out/logs/dense-seed2.log" in done.stderr
    comparison = _read(folder)
    assert [len(entry["seeds"]) for entry in comparison["contenders"]] == [3, 2]
    assert [(run["contender"], run["seed"]) for run in comparison["missing"]] == [("dense", 2)]
    assert "1 of 6 runs" in (folder / "out" / "comparison.html").read_text()
    assert blocker.read_text() == "precious" and before.items() <= _times(folder).items()
