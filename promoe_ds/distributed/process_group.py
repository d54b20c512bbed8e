"""Process groups under any launcher: `deepspeed`, `torchrun`, `srun`, `mpirun` and plain `python
-m`.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from promoe_ds.distributed.launchers import LOCAL_RANKS, read_number, read_place
from promoe_ds.errors import ConfigError, cause_of


def complete_environment() -> int:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT to what the launcher says, in its
    own variables or these.

    Returns: WORLD_SIZE.
    Raises: ConfigError if that is incomplete, no number or contradictory.
    """
    place = read_place(os.environ)
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=place.address,
        MASTER_PORT=str(place.port or _free_port()),
    )
    return place.world_size


def join_process_group(backend: str, timeout_seconds: float) -> None:
    """Join torch's process group, under torchrun through torchrun's own store.

    Raises: ConfigError if rank 0 cannot listen on MASTER_ADDR and MASTER_PORT.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=timeout_seconds)
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = None if has_store else _open_store(rank, world_size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _open_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Open the store by which ranks find each other; on rank 0 it listens on MASTER_ADDR alone,
    where torch's own would listen on every address of the host.

    Raises: ConfigError if rank 0 cannot listen there.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family = _family(host)
    if rank > 0:
        return dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    try:
        listener = socket.create_server((host, port), backlog=4096, family=family)
    except OSError as error:
        raise ConfigError(
            f"rank 0 cannot listen on MASTER_ADDR={host}, MASTER_PORT={port}"
            f" ({os.strerror(error.errno or 0)}): take an address of its host and a free port"
            " (deepspeed: --master_addr, --master_port)"
        ) from None
    address = listener.getsockname()[0]
    hosts = max(
        read_number(os.environ, name) or 1 for name in ("SLURM_STEP_NUM_NODES", "CROSS_SIZE")
    )
    if hosts > 1 and ipaddress.ip_address(address).is_loopback:
        raise ConfigError(
            f"MASTER_ADDR={host} is {address} on its own host, where the other {hosts - 1} hosts"
            " cannot reach it: give its address in the network instead, or correct /etc/hosts"
        )
    return dist.TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _family(host: str) -> socket.AddressFamily:
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except OSError:
        raise ConfigError(
            f"MASTER_ADDR={host} is no name or address that this host knows"
        ) from None


def local_device() -> torch.device:
    """Return this process's device, set as torch's current one: its GPU, or the CPU where
    DS_ACCELERATOR=cpu asks for it.

    Call after `complete_environment`. LOCAL_RANK becomes the device's index: DeepSpeed takes it as
    such, and where each process sees one device alone, every one of them has index 0.
    """
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return torch.device("cpu")
    index = _device_index(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count())
    os.environ["LOCAL_RANK"] = str(index)
    # Experts get another number of rows in every pass: fixed segments fragment the memory.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _device_index(local_rank: int, visible: int) -> int:
    """Return the device of a local rank; a launcher that shows each process one device calls it
    0.
    """
    if local_rank < visible:
        return local_rank
    if visible == 1 and any(name in os.environ for name in LOCAL_RANKS):
        return 0
    raise ConfigError(
        f"local rank {local_rank} has no device: {visible} visible. Launch at most as many ranks a"
        " host, or set DS_ACCELERATOR=cpu"
    )


def stop_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_device(name: str | None) -> str:
    """Return the device of that name; a GPU where there is one, else the CPU, for None.

    Raises: ConfigError if there is no such device, or it cannot compute.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        return name  # which of them is not known yet: nothing is taken of the first one's memory
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {cause_of(error)}") from None
    if torch.device(name).type == "meta":
        raise ConfigError(
            f"--device {name}: computes nothing: name cpu, or cuda for this process's GPU"
        )
    return name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
