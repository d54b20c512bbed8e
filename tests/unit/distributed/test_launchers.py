"""What each launcher sets is understood; what is half set, no number or contradictory is
refused.
"""

from __future__ import annotations

import os
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promoe_ds.distributed.launchers import _MPI, read_place
from promoe_ds.errors import ConfigError
from promoe_ds.logs import _RANKS, rank_from_environment

TORCH = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
AGENT = {**TORCH, "GROUP_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[07-08]-ib",
}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
HOSTED = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def mpirun(
    rank: int, size: int, local: int | None = None, local_size: int | None = None, kind: int = 0
) -> dict[str, str]:
    return {
        name: str(value)
        for name, value in zip(_MPI[kind], (rank, size, local, local_size), strict=True)
        if value is not None
    }


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, (0, 1, 0, "127.0.0.1", 0, False)),
        (TORCH, (3, 8, 1, "node0", 29500, True)),
        (
            AGENT | SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            (3, 8, 1, "node0", 29500, True),
        ),
        (SRUN, (9, 16, 1, "gpu07-ib", 23456, True)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": ""}, (9, 16, 1, "gpu07-ib", 23456, True)),
        (SRUN | {"WORLD_SIZE": "16"} | HOSTED, (9, 16, 1, "node0", 29500, True)),
        (SRUN | {"PMIX_RANK": "9"}, (9, 16, 1, "gpu07-ib", 23456, True)),
        (SRUN | {"PMI_RANK": "9", "PMI_SIZE": "16"}, (9, 16, 1, "gpu07-ib", 23456, True)),
        (BATCH, (0, 1, 0, "127.0.0.1", 0, False)),
        (
            BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_STEP_NUM_TASKS": "1"},
            (0, 1, 0, "127.0.0.1", 0, True),
        ),
        *[
            (mpirun(1, 2, 1, 2, kind), (1, 2, 1, "127.0.0.1", 29500, True))
            for kind in range(len(_MPI))
        ],
        (mpirun(1, 2, 0, 1) | HOSTED, (1, 2, 0, "node0", 29500, True)),
        (
            mpirun(1, 2, 1, 2) | {"PMI_RANK": "0", "PMI_SIZE": "1"},
            (1, 2, 1, "127.0.0.1", 29500, True),
        ),
        (
            mpirun(1, 4, 1, 4) | SRUN | {"SLURM_STEP_NUM_TASKS": "2"},
            (1, 4, 1, "127.0.0.1", 23456, True),
        ),
        (mpirun(0, 1), (0, 1, 0, "127.0.0.1", 0, True)),
    ],
)
def test_launcher_is_understood(env: dict[str, str], place: tuple) -> None:
    assert astuple(read_place(env)) == place


@pytest.mark.parametrize(
    ("env", "named"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            ["WORLD_SIZE=2", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"],
        ),
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE"]),
        ({"LOCAL_RANK": "0"}, ["LOCAL_RANK=0", "WORLD_SIZE"]),
        (TORCH | {"RANK": "8"}, ["RANK=8", "WORLD_SIZE=8"]),
        (TORCH | {"RANK": "-1"}, ["RANK='-1'"]),
        (TORCH | {"RANK": "two"}, ["RANK='two'"]),
        (TORCH | {"RANK": "9" * 5000}, ["RANK="]),
        (TORCH | {"RANK": "²"}, ["RANK='²'"]),
        (TORCH | {"WORLD_SIZE": "0"}, ["WORLD_SIZE='0'"]),
        (TORCH | {"LOCAL_RANK": "8"}, ["LOCAL_RANK=8"]),
        (TORCH | {"MASTER_PORT": "http"}, ["MASTER_PORT='http'"]),
        (TORCH | {"MASTER_PORT": "65536"}, ["MASTER_PORT='65536'"]),
        (mpirun(1, 2, 0), ["OMPI_COMM_WORLD_SIZE=2", "MASTER_ADDR"]),
        (mpirun(1, 2, 0, 1), ["MASTER_ADDR"]),
        (
            mpirun(1, 2, 0, 1) | {"RANK": "0", "WORLD_SIZE": "1"},
            ["WORLD_SIZE=1", "OMPI_COMM_WORLD_SIZE=2"],
        ),
        (mpirun(1, 8) | TORCH, ["RANK=3", "OMPI_COMM_WORLD_SIZE=8 with rank 1"]),
        (mpirun(1, 2) | TORCH, ["WORLD_SIZE=8", "OMPI_COMM_WORLD_SIZE=2"]),
        (
            mpirun(1, 2) | AGENT | {"GROUP_WORLD_SIZE": "1"},
            ["GROUP_WORLD_SIZE=1", "OMPI_COMM_WORLD_SIZE=2"],
        ),
        (mpirun(1, 2) | mpirun(0, 2, kind=3), ["PMI_SIZE=2", "OMPI_COMM_WORLD_SIZE=2"]),
        ({"OMPI_COMM_WORLD_RANK": "1"}, ["OMPI_COMM_WORLD_SIZE"]),
        ({"PMIX_RANK": "1"}, ["PMIX_RANK=1"]),
        (BATCH | {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "PMIX_RANK": "1"}, ["PMIX_RANK=1"]),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu[a-b]"}, ["SLURM_STEP_NODELIST", "gpu[a-b]"]),
        (SRUN | {"SLURM_PROCID": ""}, ["SLURM_PROCID"]),
        (SRUN | {"SLURM_PROCID": "16"}, ["RANK=16"]),
    ],
)
def test_launcher_that_cannot_be_is_refused(env: dict[str, str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        read_place(env)
    assert [part for part in named if part not in str(refusal.value)] == []


def test_every_rank_variable_is_known_to_the_log(monkeypatch) -> None:
    assert {names[0] for names in _MPI} <= set(_RANKS)
    for text, rank in (("7", 7), ("x", 0), ("-1", 0), ("9" * 5000, 0)):
        monkeypatch.setattr(os, "environ", {"PMI_RANK": text})
        assert rank_from_environment() == rank


NAMES = sorted(
    {
        *TORCH,
        *SRUN,
        *_RANKS,
        "GROUP_WORLD_SIZE",
        "CROSS_SIZE",
        "SLURM_STEP_NUM_NODES",
        *(name for row in _MPI for name in row),
    }
)
VALUES = st.sampled_from(["", "0", "1", "2", "3", "-1", "x", "1.0", "4294967290", "host[1-2]"])


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=12),
    st.sampled_from(
        [{}, TORCH, AGENT, SRUN, BATCH, mpirun(1, 2, 1, 2), mpirun(0, 2, 0, 1, 3) | HOSTED]
    ),
)
def test_any_environment_is_consistent_or_refused(
    changes: dict[str, str], launcher: dict[str, str]
) -> None:
    env = launcher | changes
    try:
        place = read_place(env)
    except ConfigError:
        return
    assert 0 <= place.rank < place.world_size and 0 <= place.local_rank < place.world_size
    assert place.address and (place.port or place.world_size == 1)
    if place.world_size == 1:
        sizes = ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", *(row[1] for row in _MPI)]
        assert all(env.get(name, "") in ("", "1") for name in sizes), (
            "alone, though a launcher says more"
        )
        assert all(env.get(name, "") in ("", "0") for name in _RANKS), (
            "alone, though a launcher numbers it"
        )
