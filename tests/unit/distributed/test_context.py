"""What each launcher sets is understood; what only half of one sets is refused."""

from __future__ import annotations

import os

import pytest

from promoe_ds.distributed.context import _device_index, _first_host, complete_environment
from promoe_ds.errors import ConfigError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*VARIABLES, *(key for key in os.environ if key.startswith("SLURM_"))]:
        # Set first, so that what the code under test sets is undone as well.
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


def test_environment_no_launcher_is_one_process() -> None:
    assert complete_environment() == 1
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["MASTER_ADDR"]) == ("0", "0", "127.0.0.1")
    assert int(os.environ["MASTER_PORT"]) > 0


def test_environment_of_torchrun_is_left_alone(monkeypatch) -> None:
    values = dict(zip(VARIABLES, ("3", "8", "1", "node0", "29500"), strict=True))
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert complete_environment() == 8
    assert {name: os.environ[name] for name in VARIABLES} == values


def test_environment_of_srun_is_translated(monkeypatch) -> None:
    for name, value in {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456",
                        "SLURM_STEP_NODELIST": "gpu[07-08]"}.items():
        monkeypatch.setenv(name, value)
    assert complete_environment() == 16
    assert [os.environ[name] for name in VARIABLES] == ["9", "16", "1", "gpu07", "23456"]


def test_environment_inside_a_batch_script_is_one_process(monkeypatch) -> None:
    """sbatch sets SLURM_PROCID and SLURM_NTASKS for its script too, but that is no step of many tasks."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "16")
    assert complete_environment() == 1


def test_environment_half_set_names_what_is_missing(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        complete_environment()


@pytest.mark.parametrize(("nodes", "host"), [("gpu01", "gpu01"), ("gpu[03-05,9],login1", "gpu03"), ("a-1,b-2", "a-1"),
                                             ("node-[12,14]", "node-12")])
def test_first_host_of_a_slurm_list(nodes: str, host: str) -> None:
    assert _first_host(nodes) == host


def test_device_index_one_visible_device_a_task_is_device_zero(monkeypatch) -> None:
    assert _device_index(3, 8) == 3
    with pytest.raises(ConfigError, match="local rank 1 has no device: 1 visible"):
        _device_index(1, 1)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert _device_index(1, 1) == 0
