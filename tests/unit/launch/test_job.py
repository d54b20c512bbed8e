"""What a restart is told: to go on with the run's own checkpoints if it has any, else what the user said."""

from __future__ import annotations

from pathlib import Path

import pytest

from promoe_ds.config import load_config
from promoe_ds.launch.hostfile import Host
from promoe_ds.launch.job import Job, _prepare
from promoe_ds.launch.layout import Layout


@pytest.mark.parametrize(("folder", "expected"), [
    ("step_0000004", ("--resume", "starts/promoe", "--resume", "auto")), ("step_0000004.tmp", ("--resume", "starts/promoe")),
    ("step_0000004.abandoned", ("--resume", "starts/promoe")), (None, ("--resume", "starts/promoe")),
])
def test_restart_leaves_the_named_start_for_finished_checkpoints_only(tmp_path: Path, folder: str | None, expected: tuple) -> None:
    (tmp_path / "checkpoints" / (folder or "")).mkdir(parents=True)
    config, host = load_config("digits_promoe"), Host(name="localhost", slots=1)
    job = Job(hosts=(host,), arguments=("--resume", "starts/promoe"), recipe="digits_promoe", overrides=(), run_dir=tmp_path,
              interface="lo")
    layout = Layout(config=config, hosts=(host,), ep_size=config.parallel.ep_size)
    facts = {"localhost": {"interfaces": {"lo": "127.0.0.1"}}}
    assert _prepare(job, layout, facts, {}, tmp_path / "launch", again=True).arguments == expected
