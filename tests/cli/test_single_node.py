"""single_node.sh: the deepspeed launcher on this host, and a stop that saves; the scripts are sound
shell.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def _training(folder: Path, *command: str) -> Iterator[subprocess.Popen]:
    """Run an endless training in a session of its own; give its process after its first line."""
    settings = environment(PROMOE_RANKS="2", MASTER_PORT=str(free_port()), VIRTUAL_ENV=sys.prefix)
    endless = ("--set", *TINY, "train.max_steps=100000", "train.checkpoint_every=100000")
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, *endless],
            env=settings,
            cwd=REPOSITORY,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        lines, deadline = folder / "run/metrics.jsonl", time.monotonic() + 200
        while not (lines.is_file() and lines.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.2)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _steps_of(folder: Path) -> tuple[int, int]:
    """Return the step of the only checkpoint, and the lines that were logged."""
    (checkpoint,) = list_checkpoints(folder / "run/checkpoints")
    return read_manifest(checkpoint).step, len(
        (folder / "run/metrics.jsonl").read_text().splitlines()
    )


def test_single_node_sigterm_saves_and_ends_with_75(tmp_path) -> None:
    """Plain `deepspeed`, asked to stop, leaves its ranks behind."""
    script = ("bash", str(REPOSITORY / "launch_scripts/single_node.sh"))
    with _training(tmp_path, *script, "digits_promoe", ZERO2, str(tmp_path / "run")) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(150) == 75, (tmp_path / "output").read_text()
        saved, logged = _steps_of(tmp_path)
        assert saved == logged
        assert "stopped: " in (tmp_path / "output").read_text()


def test_ctrl_c_of_deepspeed_saves_without_a_traceback_of_a_rank(tmp_path) -> None:
    """`deepspeed` itself ends at once, with a traceback of its own; its ranks save meanwhile."""
    launcher = ("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()))
    arguments = ("--recipe", "digits_promoe", "--deepspeed_config", ZERO2)
    with _training(
        tmp_path,
        *launcher,
        *("--module", "promoe_ds.cli.train", *arguments, "--run-dir", str(tmp_path / "run")),
    ) as process:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(150)
        deadline = time.monotonic() + 150
        while "stopped: " not in (tmp_path / "output").read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        saved, logged = _steps_of(tmp_path)
        assert saved == logged
        output = (tmp_path / "output").read_text()
        assert output.count("Traceback") <= 1, output
