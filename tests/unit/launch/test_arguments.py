"""What the launcher refuses before it asks any host: one message, no traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from promoe_ds.cli import launch, preflight
from promoe_ds.errors import ConfigError, LaunchError, PromoeError
from promoe_ds.launch import environment
from promoe_ds.launch.environment import require_launchable

REPOSITORY = Path(__file__).parents[3]
CONFIG = REPOSITORY / "ds_configs/zero2_fp32.json"


def _arguments(
    folder: Path, *options: str, config: Path = CONFIG, run_dir: str = "run"
) -> list[str]:
    (folder / "hosts").write_text("host1 slots=1\n")
    return [
        "--hostfile",
        str(folder / "hosts"),
        *options,
        "--",
        "--recipe",
        "digits_promoe",
        "--deepspeed_config",
        str(config),
        "--run-dir",
        str(folder / run_dir),
        "--set",
        "parallel.ep_size=1",
    ]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--master-port", "65536"), ("--master-port", "0"), ("--max-restarts", "-1")],
)
def test_number_out_of_range_is_refused(tmp_path, option, value, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        launch.parse_arguments(_arguments(tmp_path, option, value))
    assert f"{option}: {value}" in capsys.readouterr().err


def test_deepspeed_json_that_ranks_would_refuse_is_refused_before_the_launch(tmp_path) -> None:
    values = json.loads(CONFIG.read_text())
    values["zero_optimization"]["stage"] = 3
    (tmp_path / "z3.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"z3\.json.*stage"):
        launch.parse_arguments(_arguments(tmp_path, config=tmp_path / "z3.json"))
    job, check_only = launch.parse_arguments(_arguments(tmp_path))
    assert (job.run_dir, job.config.parallel.ep_size, check_only) == (tmp_path / "run", 1, False)


def test_ep_size_that_does_not_divide_the_ranks_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"parallel.ep_size=4"):
        launch.parse_arguments([*_arguments(tmp_path), "parallel.ep_size=4"])


def test_import_goes_to_the_agents_and_to_the_ranks(tmp_path) -> None:
    job, _ = launch.parse_arguments([*_arguments(tmp_path), "--import", "json"])
    assert job.imports == ("json",) and job.arguments[-2:] == ("--import", "json")


def test_hostfile_mistake_is_one_line_and_runs_nothing(tmp_path) -> None:
    arguments = _arguments(tmp_path)
    (tmp_path / "hosts").write_text("host1 slots=1\nhost2;touch${IFS}oops slots=1\n")
    with pytest.raises(LaunchError, match=f"{tmp_path}/hosts") as caught:
        preflight.main(arguments)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("oops*"))


def test_run_directory_that_is_a_file_is_one_message(tmp_path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(LaunchError, match=r"--run-dir .*/run .*File exists"):
        launch.main(_arguments(tmp_path))


def test_error_of_a_job_is_the_last_line_of_its_log(tmp_path, monkeypatch) -> None:
    def run_job(job: object) -> None:
        raise LaunchError("no legal layout")

    monkeypatch.setattr(launch, "run_job", run_job)
    with pytest.raises(PromoeError):
        launch.main(_arguments(tmp_path))
    assert (tmp_path / "run/launch/launch.log").read_text().splitlines()[
        -1
    ] == "ended with code 10: no legal layout"


def test_interpreter_that_a_shell_would_split_or_without_deepspeed_is_refused(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    require_launchable(tmp_path)
    with pytest.raises(LaunchError, match=r"--run-dir '.*/a b'"):
        require_launchable(tmp_path / "a b")
    monkeypatch.setattr(environment.sys, "executable", "/opt/my env/bin/python")
    with pytest.raises(LaunchError, match="/opt/my env/bin/python"):
        require_launchable(tmp_path)
    monkeypatch.setattr(environment.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(LaunchError, match=f"{tmp_path}/deepspeed"):
        require_launchable(tmp_path)
    assert sys.executable == str(tmp_path / "python"), "the module's own name for it"
