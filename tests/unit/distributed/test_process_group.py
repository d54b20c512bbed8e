"""A process among its job's: the environment of DeepSpeed and torch, the device."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from promoe_ds.distributed.context import join_processes
from promoe_ds.distributed.process_group import (
    _device_index,
    complete_environment,
    local_device,
)
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


def test_port_that_is_taken_is_named_by_whatever_command_joins(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        values = ("0", "2", "0", "127.0.0.1", port)
        monkeypatch.setattr(os, "environ", dict(zip(VARIABLES, values, strict=True)))
        with pytest.raises(ConfigError, match=f"cannot listen on .*MASTER_PORT={port}"):
            join_processes("cpu", timeout_seconds=5)


def test_device_index_one_visible_device_a_task_is_device_zero(monkeypatch) -> None:
    assert _device_index(3, 8) == 3
    with pytest.raises(ConfigError, match="local rank 1 has no device: 1 visible"):
        _device_index(1, 1)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert _device_index(1, 1) == 0


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 3)])
def test_local_rank_is_the_index_of_the_device_that_was_taken(monkeypatch, visible, index) -> None:
    """DeepSpeed sets the device LOCAL_RANK again; under Slurm each task may see one GPU alone."""
    taken = []
    environment = {"LOCAL_RANK": "3", "SLURM_LOCALID": "3"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert local_device() == torch.device("cuda", index)
    assert (taken, environment["LOCAL_RANK"]) == ([index], str(index))
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
