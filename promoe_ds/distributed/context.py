"""Process groups under any launcher: `deepspeed`, `torchrun`, `srun` and plain `python -m`."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from promoe_ds.errors import CheckpointError, ConfigError

_T = TypeVar("_T")
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM_PORT_BASE = 20000


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def complete_environment() -> int:
    """Fill in what the launcher left out of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    `deepspeed` and `torchrun` set all of them; `srun` sets its own names; plain python sets none and is one process.
    Returns: WORLD_SIZE.
    Raises: ConfigError if only some are set.
    """
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_NODELIST"]))
        env.setdefault("MASTER_PORT", str(_SLURM_PORT_BASE + int(env["SLURM_JOB_ID"]) % 10000))
    elif "RANK" not in env and "WORLD_SIZE" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    missing = [name for name in _VARIABLES if name not in env]
    if missing:
        raise ConfigError(f"the launcher set some of {', '.join(_VARIABLES)} but not {', '.join(missing)}: start through "
                          "deepspeed, torchrun or srun, or unset them all for one process")
    return int(env["WORLD_SIZE"])


def join_process_group(backend: str, timeout_seconds: float) -> None:
    """Join torch's process group; under torchrun it is left to whoever asks for it, with torchrun's own store.

    Raises: ConfigError if rank 0 cannot listen on MASTER_ADDR and MASTER_PORT.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group(backend, store=_open_store(rank, world_size, timeout), rank=rank, world_size=world_size,
                                timeout=timeout)


def _open_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Open the store by which ranks find each other; on rank 0 it listens on MASTER_ADDR alone, where torch's own would listen
    on every address of the host.

    Raises: ConfigError if rank 0 cannot listen there.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank > 0:
        return dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    try:
        listener = socket.create_server((host, port), backlog=4096, family=_family(host))
    except OSError as error:
        raise ConfigError(f"rank 0 cannot listen on MASTER_ADDR={host}, MASTER_PORT={port} ({os.strerror(error.errno or 0)}): take "
                          "an address of its host and a free port (deepspeed: --master_addr, --master_port)") from None
    address = listener.getsockname()[0]
    hosts = max(int(os.environ.get(name, "1")) for name in ("SLURM_STEP_NUM_NODES", "CROSS_SIZE"))
    if hosts > 1 and ipaddress.ip_address(address).is_loopback:
        raise ConfigError(f"MASTER_ADDR={host} is {address} on its own host, where the other {hosts - 1} hosts cannot reach it: "
                          "give its address in the network instead, or mend /etc/hosts")
    return dist.TCPStore(host, port, world_size, is_master=True, timeout=timeout, wait_for_workers=False,
                         master_listen_fd=listener.detach())


def _family(host: str) -> socket.AddressFamily:
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except OSError:
        raise ConfigError(f"MASTER_ADDR={host} is no name or address that this host knows") from None


def local_device() -> torch.device:
    """Return this process's device, set as torch's current one: its GPU, or the CPU where DS_ACCELERATOR=cpu asks for it.

    Call after `complete_environment`.
    """
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", _device_index(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def _device_index(local_rank: int, visible: int) -> int:
    """Return the device of a local rank; a launcher that shows each process one device calls it 0."""
    if local_rank < visible:
        return local_rank
    if visible == 1 and "SLURM_LOCALID" in os.environ:
        return 0
    raise ConfigError(f"local rank {local_rank} has no device: {visible} visible. Launch at most as many ranks a host, or set "
                      "DS_ACCELERATOR=cpu")


def stop_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_objects(value: object) -> list:
    """Return every rank's small picklable value, by rank. For rare events and messages, not for tensors."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: _T) -> _T:
    """Return rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(ranks: Ranks, action: Callable[[], _T], *, flag: str = "") -> _T:
    """Run something on rank 0 alone; return its small picklable value on every rank.  Collectives: one.

    Raises: CheckpointError on every rank if it fails there, its message after `flag`.
    """
    value: _T | CheckpointError | None = None
    if ranks.is_main:
        try:
            value = action()
        except (CheckpointError, OSError) as error:
            value = CheckpointError(f"{flag}{error}")
    value = from_main(value)
    if isinstance(value, CheckpointError):
        raise value
    return value


def on_all_ranks(action: Callable[[], None]) -> None:
    """Run something that may fail on one rank alone, so that it fails on all.  Collectives: one, after it.

    Raises: CheckpointError with every rank's message.
    """
    problem = None
    try:
        action()
    except CheckpointError as error:
        problem = str(error)
    if problems := [one for one in gather_objects(problem) if one]:
        raise CheckpointError("; ".join(dict.fromkeys(problems)))


def _first_host(node_list: str) -> str:
    """Return the first host of a Slurm node list such as `gpu[03-05,9],login1`."""
    match = re.match(r"([^,\[]+)(?:\[([0-9]+))?", node_list)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={node_list!r} names no host: set MASTER_ADDR")
    return match[1] + (match[2] or "")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
