"""What to run, and on which hosts, with how many ranks and which expert parallelism it can resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from promoe_ds.config import RunConfig, load_config, plan_batches
from promoe_ds.errors import ConfigError, LaunchError
from promoe_ds.launch.hostfile import Host


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a user asked for; `arguments` are those of promoe_ds.cli.train, as given."""

    hosts: tuple[Host, ...]
    arguments: tuple[str, ...]
    recipe: str
    overrides: tuple[str, ...]
    deepspeed_config: str
    config: RunConfig
    run_dir: Path
    interface: str = ""
    master_port: int = 29500
    max_restarts: int = 0
    host_wait: float = 30.0

    @property
    def host_names(self) -> list[str]:
        """The names of all hosts, in the order of their ranks."""
        return [host.name for host in self.hosts]


@dataclass(frozen=True, kw_only=True)
class LaunchLayout:
    """The hosts of one attempt and the config that runs on them."""

    hosts: tuple[Host, ...]
    config: RunConfig

    @property
    def ranks(self) -> int:
        """Ranks on all hosts."""
        return sum(host.slots for host in self.hosts)


def choose_layout(recipe: str, overrides: Sequence[str], hosts: Sequence[Host]) -> LaunchLayout:
    """Choose, for a restart, the most hosts from the first on, on which the run is legal.

    Its ep_size is kept where possible, else lowered. The global batch stays: ranks must divide it, ep_size
    must divide the ranks and the experts.
    Raises: LaunchError if no number of these hosts is legal, with the reason of the largest one;
        ConfigError for a recipe that can never run.
    """
    wanted = load_config(recipe, overrides).parallel.ep_size
    first_problem = ""
    for count in range(len(hosts), 0, -1):
        ranks = sum(host.slots for host in hosts[:count])
        for ep_size in [size for size in range(wanted, 0, -1) if ranks % size == 0]:
            try:
                config = load_config(recipe, [*overrides, f"parallel.ep_size={ep_size}"])
                plan_batches(config, ranks)
            except ConfigError as error:
                first_problem = first_problem or f"{ranks} ranks: {error}"
                continue
            return LaunchLayout(hosts=tuple(hosts[:count]), config=config)
    raise LaunchError(f"no legal layout on {', '.join(host.name for host in hosts)}: {first_problem}")
