"""What to run, and on which hosts and with which expert parallelism a restart can run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    imports: tuple[str, ...] = ()
    interface: str = ""
    master_port: int = 29500
    max_restarts: int = 0
    host_wait: float = 30.0

    @property
    def host_names(self) -> list[str]:
        """The names of all hosts, in the order of their ranks."""
        return [host.name for host in self.hosts]

    @property
    def ranks(self) -> int:
        """Ranks on all hosts."""
        return sum(host.slots for host in self.hosts)


def choose_layout(job: Job, hosts: Sequence[Host]) -> Job:
    """Return the job on as many of these hosts, from the first on, as are legal for it.

    Its ep_size is kept where possible, else lowered. The global batch stays: ranks must divide it,
    ep_size must divide the ranks and the experts.
    Raises: LaunchError if no number of these hosts is legal, with the reason of the largest one.
    """
    wanted, first_problem = job.config.parallel.ep_size, ""
    for count in range(len(hosts), 0, -1):
        ranks = sum(host.slots for host in hosts[:count])
        for ep_size in [size for size in range(wanted, 0, -1) if ranks % size == 0]:
            override = f"parallel.ep_size={ep_size}"
            try:
                config = load_config(job.recipe, [*job.overrides, override])
                plan_batches(config, ranks)
            except ConfigError as error:
                first_problem = first_problem or f"{ranks} ranks: {error}"
                continue
            arguments = (*job.arguments, "--set", override) if ep_size != wanted else job.arguments
            return replace(job, hosts=tuple(hosts[:count]), config=config, arguments=arguments)
    raise LaunchError(
        f"no legal layout on {', '.join(host.name for host in hosts)}: {first_problem}"
    )
