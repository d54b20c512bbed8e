"""single_node.sh: the deepspeed launcher on this host, and a stop that saves; the scripts are sound
shell.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from promoe_ds.checkpoint.manifest import list_checkpoints, read_manifest

from ..processes import environment, free_port
from .commands import REPOSITORY, TINY, ZERO2

SCRIPTS = sorted((REPOSITORY / "launch_scripts").glob("*.s*"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_sound_shell(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["single_node.sh", "multinode.sh", "slurm.sbatch"])
def test_script_without_arguments_prints_its_usage(name: str) -> None:
    done = subprocess.run(
        ["bash", str(REPOSITORY / "launch_scripts" / name)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "RECIPE DEEPSPEED_CONFIG RUN_DIR" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_single_node_sigterm_saves_and_ends_with_75(tmp_path) -> None:
    """Plain `deepspeed`, asked to stop, leaves its ranks behind."""
    settings = environment(PROMOE_RANKS="2", MASTER_PORT=str(free_port()), VIRTUAL_ENV=sys.prefix)
    endless = ("train.max_steps=100000", "train.checkpoint_every=100000")
    arguments = ("digits_promoe", ZERO2, str(tmp_path / "run"), "--set", *TINY, *endless)
    with (tmp_path / "output").open("w") as output:
        script = subprocess.Popen(
            ["bash", str(REPOSITORY / "launch_scripts/single_node.sh"), *arguments],
            env=settings,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        lines, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 200
        while not (lines.is_file() and lines.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.2)
        script.send_signal(signal.SIGTERM)
        assert script.wait(150) == 75, (tmp_path / "output").read_text()
        saved = read_manifest(list_checkpoints(tmp_path / "run/checkpoints")[0])
        assert saved.step == len(lines.read_text().splitlines())
        assert "stopped: " in (tmp_path / "output").read_text()
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
