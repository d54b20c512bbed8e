"""A process among its job's: the environment of DeepSpeed and torch, the device."""

from __future__ import annotations

import os

import pytest

from promoe_ds.distributed.process_group import _device_index, complete_environment
from promoe_ds.errors import ConfigError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ({}, ("0", "1", "0", "127.0.0.1")),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            ("1", "2", "1", "127.0.0.1"),
        ),
    ],
)
def test_environment_is_completed(monkeypatch, launcher, expected) -> None:
    monkeypatch.setattr(os, "environ", dict(launcher))
    assert complete_environment() == int(expected[1])
    assert (
        tuple(os.environ[name] for name in VARIABLES[:4]) == expected
        and int(os.environ["MASTER_PORT"]) > 0
    )


def test_device_index_one_visible_device_a_task_is_device_zero(monkeypatch) -> None:
    assert _device_index(3, 8) == 3
    with pytest.raises(ConfigError, match="local rank 1 has no device: 1 visible"):
        _device_index(1, 1)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert _device_index(1, 1) == 0
