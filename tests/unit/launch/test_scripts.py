"""The launching scripts with stand-ins for deepspeed and Slurm: signals, exit codes, which job goes
back into the queue.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.processes import REPOSITORY, wait_until

#: A step whose ranks write the statuses `RANK:CODE` and ends with a code. One rank on each of two
# nodes.
_SRUN = """#!/bin/bash
for status in $STATUSES; do
    rank="${status%:*}" code="${status#*:}"
    printf '{"rank": %s, "host": "h", "pid": 1, "code": %s, "message": "said %s", "time": %s}' \\
        "$rank" "$code" "$code" "$rank" \\
        > "$PROMOE_STATUS_DIR/rank_0000$rank.json"
done
exit "$CODE"
"""
_SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'host1\\nhost2\\n'; else echo "$@" > requeued; fi
"""


def _command(folder: Path, name: str, text: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(text)
    (folder / "bin" / name).chmod(0o755)


def _environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **more}


@pytest.mark.parametrize(
    ("code", "statuses", "restarts", "ends", "requeued"),
    [
        (0, "0:0 1:0", 3, 0, False),
        (75, "0:75 1:75", 0, 75, True),
        (247, "0:7 1:null", 3, 7, True),
        (250, "0:null 1:null", 3, 7, True),
        (1, "0:1 1:7", 3, 1, True),
        (7, "", 3, 7, True),
        (7, "0:7 1:3", 3, 3, False),
        (2, "0:2 1:null", 3, 2, False),
        (247, "0:7 1:null", 1, 7, False),
    ],
    ids=[
        "end",
        "stopped",
        "killed",
        "aborted",
        "defect",
        "never started",
        "data before lost peers",
        "setting",
        "limit",
    ],
)
def test_slurm_script_requeues_what_another_start_may_fix(
    tmp_path, code, statuses, restarts, ends, requeued
) -> None:
    _command(tmp_path, "srun", _SRUN)
    _command(tmp_path, "scontrol", _SCONTROL)
    (tmp_path / "launch_scripts").symlink_to(REPOSITORY / "launch_scripts")
    environment = _environment(
        tmp_path,
        SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="host[1-2]",
        SLURM_RESTART_COUNT="1",
        PROMOE_RANKS="1",
        PROMOE_MAX_RESTARTS=str(restarts),
        CODE=str(code),
        STATUSES=statuses,
    )
    done = subprocess.run(
        ["bash", "launch_scripts/slurm.sbatch", "r", "c", "run"],
        cwd=tmp_path,
        env=environment,
        timeout=30,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, (tmp_path / "requeued").exists()) == (ends, requeued), (
        done.stdout + done.stderr
    )
    assert done.stderr == ""


def _run_ranks(folder: Path, rank: str) -> subprocess.Popen:
    """Start run_ranks with a stand-in for DeepSpeed's levels: runner, launcher, a rank that runs
    `rank`. A signal's end is -15.
    """
    (folder / "rank").write_text(rank)
    (folder / "launcher").write_text(
        f"touch {folder}/launched; sleep 0.5; bash {folder}/rank promoe_ds.cli.train"
        " --local_rank=0\ncode=$?; exit $((code == 143 ? 241 : code))\n"
    )
    _command(folder, "deepspeed", f"#!/bin/bash\nbash {folder}/launcher; exit $?\n")
    script = "set -euo pipefail; . launch_scripts/ranks.sh; run_ranks"
    return subprocess.Popen(["bash", "-c", script], cwd=REPOSITORY, env=_environment(folder))


def test_run_ranks_stop_reaches_ranks_that_were_not_there_yet(tmp_path) -> None:
    runner = _run_ranks(
        tmp_path, f"trap 'kill $!; touch {tmp_path}/saved; exit 75' TERM; sleep 90 & wait"
    )
    wait_until((tmp_path / "launched").exists, 100, "launched")
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(100) == 75
    assert (tmp_path / "saved").exists()


def test_run_ranks_killed_by_a_request_before_it_could_take_it_counts_as_stopped(tmp_path) -> None:
    requested = _run_ranks(tmp_path, f"touch {tmp_path}/started; sleep 0.3; exit 241")
    wait_until((tmp_path / "started").exists, 100, "started")
    requested.send_signal(signal.SIGUSR1)
    assert requested.wait(100) == 75
    (tmp_path / "unrequested").mkdir()
    assert _run_ranks(tmp_path / "unrequested", "exit 241").wait(100) == 241


def test_run_ranks_end_while_a_signal_is_handled_keeps_its_code(tmp_path) -> None:
    script = (
        '. launch_scripts/ranks.sh; bash -c \'while [ ! -e "$trapped" ]; do sleep 0.05; done; exit'
        ' 75\' & trap \'touch "$trapped"; sleep 0.8\' TERM; touch "$ready"; wait_for $!'
    )
    environment = _environment(
        tmp_path, trapped=str(tmp_path / "trapped"), ready=str(tmp_path / "ready")
    )
    waiting = subprocess.Popen(["bash", "-c", script], cwd=REPOSITORY, env=environment)
    wait_until((tmp_path / "ready").exists, 100, "ready")
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(100) == 75
    assert (tmp_path / "trapped").exists()
