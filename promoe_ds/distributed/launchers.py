"""What launchers put into a process's environment: its rank, the number of ranks, rank 0's address.

An inner launcher counts (torchrun started once a node by srun); two that contradict each other are
an error, because each process would otherwise train alone (docs/reference/inputs.md).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from promoe_ds.errors import ConfigError
from promoe_ds.launch.hostfile import expand_hosts

#: Rank, number of ranks, local rank, local number of ranks; MPICH's are Intel MPI's and Cray's too.
_MPI = (
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    tuple(f"MVP_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
)
#: Launchers that may show each of their processes one device only.
LOCAL_RANKS = ("SLURM_LOCALID", *(names[2] for names in _MPI))
#: The number of torchrun's agents, of DeepSpeed's launchers: one a node.
_AGENTS = ("GROUP_WORLD_SIZE", "CROSS_SIZE")
#: Names of a job that all its ranks know.
_JOBS = ("SLURM_JOB_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PALS_APID")
_PORT_BASE, _PORTS, _DEFAULT_PORT = 20000, 10000, 29500
#: Slurm's numbers of steps that are no user's: batch script, salloc's shell, and the like.
_SPECIAL_STEPS = 0xFFFFFFF0
_MOST = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process among its job's; `port` 0: any free one, `launched`: whether a launcher said so."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    launched: bool = True


@dataclass(frozen=True)
class _Outer:
    """What MPI or Slurm says, `name` being the variable with the number of ranks."""

    name: str
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None


def read_place(env: Mapping[str, str]) -> Place:
    """Return what the launchers' variables say of this process; one process where there are none.

    Raises: ConfigError naming variable and value: no number, out of range, missing, contradictory.
    """
    rank, size, local, pmix = (
        read_number(env, name, least=int(name == "WORLD_SIZE"))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMIX_RANK")
    )
    outer = _outer_launcher(env)
    launched = outer is not None or {rank, size, local} != {None}
    if pmix is not None and not launched:
        raise ConfigError(
            f"PMIX_RANK={pmix} says that a launcher started this process, but not how many there "
            f"are: {_remedy()}"
        )
    if not launched:
        return Place(
            rank=0, world_size=1, local_rank=0, address="127.0.0.1", port=0, launched=False
        )
    if outer is not None:
        _require_agreement(env, rank, size, outer)
        rank, size = outer.rank if rank is None else rank, outer.size if size is None else size
        if local is None and (rank, size) == (outer.rank, outer.size):
            local = outer.local_rank
    if local is None and size == 1:
        local = 0
    address, port = _address(env, rank, size, outer)
    found = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    if missing := [name for name, value in found.items() if value in (None, "")]:
        raise ConfigError(
            f"the launcher set {_stated(env, outer)} but not {', '.join(missing)}: "
            f"{_remedy(*missing)}"
        )
    for name, value in (
        ("RANK", rank),
        ("LOCAL_RANK", local),
        ("PMIX_RANK", pmix if size == 1 else None),
    ):
        if value is not None and value >= size:
            raise ConfigError(
                f"{name}={value} is not below WORLD_SIZE={size}: ranks are numbered from 0"
            )
    return Place(rank=rank, world_size=size, local_rank=local, address=address, port=port)


def read_number(
    env: Mapping[str, str], name: str, *, least: int = 0, most: int = _MOST
) -> int | None:
    """Return a variable's number, None where it is unset or empty.

    Raises: ConfigError if it is no whole number from `least` to `most`.
    """
    text = env.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):
        upper = f" to {most}" if most != _MOST else ""
        raise ConfigError(
            f"{name}={env[name]!r} is not a whole number from {least}{upper}: "
            "variable of the launcher"
        )
    return int(text)


def _require_agreement(
    env: Mapping[str, str], rank: int | None, size: int | None, outer: _Outer
) -> None:
    """Compare RANK and WORLD_SIZE with MPI's or Slurm's: torchrun may run inside them."""
    if outer.size == 1:
        return
    agents = next(
        (name for name in _AGENTS if env.get(name) and rank is not None and size is not None), None
    )
    name, value, wanted = "WORLD_SIZE", size, outer.size
    if agents is not None and size >= outer.size:
        name, value = agents, read_number(env, agents)
    elif size in (None, outer.size):
        name, value, wanted = "RANK", rank, outer.rank
    if value not in (None, wanted):
        outside = f"{outer.name}={outer.size}" + (
            f" with rank {outer.rank}" if name == "RANK" else ""
        )
        raise ConfigError(
            f"{name}={value} contradicts {outside}: two launchers started this process. Start "
            f"through one of them, or unset the variables of the other (env -u {name} ...)"
        )


def _outer_launcher(env: Mapping[str, str]) -> _Outer | None:
    """Return what MPI, else Slurm says; MPI in a Slurm step counts unless it has one process."""
    mpi = []
    for rank, size, local_rank, local_size in _MPI:
        values = [read_number(env, rank), read_number(env, size, least=1)]
        if values == [None, None]:
            continue
        if None in values:
            raise ConfigError(
                f"{rank if values[1] is None else size} is set but not "
                f"{size if values[1] is None else rank}: {_remedy()}"
            )
        mpi.append(
            _Outer(
                size,
                values[0],
                values[1],
                read_number(env, local_rank),
                read_number(env, local_size, least=1),
            )
        )
    # Those of one process may be left from a shell that srun or mpirun started.
    many = [one for one in mpi if one.size > 1]
    for one in many[1:]:
        if (one.rank, one.size) != (many[0].rank, many[0].size):
            raise ConfigError(
                f"{one.name}={one.size} (rank {one.rank}) contradicts {many[0].name}="
                f"{many[0].size} (rank {many[0].rank}): unset the variables of one"
            )
    slurm = _slurm_step(env)
    if many:
        launch = (many[0].rank, many[0].size)
        # Slurm may know the local rank where MPI names none, if it is the same launch.
        same = [one for one in [*many, slurm] if one and (one.rank, one.size) == launch]
        return next((one for one in same if one.local_rank is not None), many[0])
    return slurm if slurm is not None and slurm.size > 1 else [*mpi, slurm][0]


def _slurm_step(env: Mapping[str, str]) -> _Outer | None:
    """Return what srun says; the shells of sbatch and salloc are no tasks of the job."""
    name, step, rank = (
        "SLURM_STEP_NUM_TASKS",
        read_number(env, "SLURM_STEP_ID"),
        read_number(env, "SLURM_PROCID"),
    )
    if not env.get(name) and (rank or (step is not None and step < _SPECIAL_STEPS)):
        name = "SLURM_NTASKS"
    size = read_number(env, name, least=1)
    if size is None:
        return None
    if rank is None:
        if size == 1:
            return None
        raise ConfigError(f"{name}={size} is set but not SLURM_PROCID: {_remedy()}")
    nodes = read_number(env, "SLURM_STEP_NUM_NODES")
    return _Outer(name, rank, size, read_number(env, "SLURM_LOCALID"), size if nodes == 1 else None)


def _address(
    env: Mapping[str, str], rank: int | None, size: int | None, outer: _Outer | None
) -> tuple[str, int | None]:
    """Return rank 0's address: as set, else this host if all ranks are on it, or srun's first node.

    "" or None where it is not known; port 0 for one process: any that is free.
    """
    address, port = env.get("MASTER_ADDR", ""), read_number(env, "MASTER_PORT", least=1, most=65535)
    if size == 1:
        return address or "127.0.0.1", port or 0
    if outer is not None and (outer.rank, outer.size) == (rank, size):
        slurm = _slurm_step(env)
        if not address and slurm is not None and (slurm.rank, slurm.size) == (rank, size):
            address = _first_node(env)
        if not address and outer.local_size == size:
            address = "127.0.0.1"
        port = port or _port_of_job(env)
    return address, port


def _first_node(env: Mapping[str, str]) -> str:
    name = next(
        (
            name
            for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
            if env.get(name)
        ),
        "",
    )
    try:
        return expand_hosts(env[name])[0] if name else ""
    except ValueError as error:
        raise ConfigError(
            f"{name}={env[name]!r} names no host ({error}): export MASTER_ADDR"
        ) from None


def _port_of_job(env: Mapping[str, str]) -> int:
    """Return a port that all ranks of the job compute alike, and other jobs very rarely."""
    job = next((env[name] for name in _JOBS if env.get(name)), None)
    if job is None:
        return _DEFAULT_PORT
    return (
        _PORT_BASE
        + (int(job) if job.isascii() and job.isdigit() else zlib.crc32(job.encode())) % _PORTS
    )


def _stated(env: Mapping[str, str], outer: _Outer | None) -> str:
    names = [
        name
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if env.get(name)
    ]
    return ", ".join(
        [f"{name}={env[name]}" for name in names]
        + ([f"{outer.name}={outer.size}"] if outer else [])
    )


def _remedy(*missing: str) -> str:
    missing = missing or ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    meanings = {
        "RANK": "this process, from 0",
        "WORLD_SIZE": "all processes",
        "LOCAL_RANK": "this one on its host, from 0",
        "MASTER_ADDR": "an address of rank 0's host, the same on all ranks",
        "MASTER_PORT": "a free port there, e.g. 29500",
    }
    exports = "; ".join(f"{name} ({meanings[name]})" for name in missing)
    return (
        f"export {exports} (mpirun: -x NAME=VALUE), start through deepspeed, torchrun or srun, or "
        "unset them for one process"
    )
