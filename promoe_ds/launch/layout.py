"""On which hosts, with how many ranks and which expert parallelism a run can go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from promoe_ds.config import RunConfig, load_config, plan_batches
from promoe_ds.errors import ConfigError, LaunchError
from promoe_ds.launch.hostfile import Host


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Hosts of one attempt and what their number asks to override."""

    hosts: tuple[Host, ...]
    ep_size: int
    config: RunConfig

    @property
    def ranks(self) -> int:
        """Ranks on all hosts."""
        return sum(host.slots for host in self.hosts)


def full_layout(recipe: str, overrides: Sequence[str], hosts: Sequence[Host]) -> Layout:
    """Return the layout that the user asked for: all hosts, ep_size as it stands.

    Raises: ConfigError if the recipe cannot run so.
    """
    config = load_config(recipe, overrides)
    plan_batches(config, sum(host.slots for host in hosts))
    return Layout(hosts=tuple(hosts), ep_size=config.parallel.ep_size, config=config)


def choose_layout(recipe: str, overrides: Sequence[str], hosts: Sequence[Host]) -> Layout:
    """Choose, for a restart, the most hosts from the first on, on which the run is legal.

    Its ep_size is kept where possible, else lowered. The global batch stays: ranks must divide it, ep_size the ranks and the
    experts.
    Raises: LaunchError if no number of these hosts will do, with the reason that the largest one gave; ConfigError of a
    recipe that can never run.
    """
    wanted = load_config(recipe, overrides).parallel.ep_size
    first_problem = ""
    for count in range(len(hosts), 0, -1):
        chosen = tuple(hosts[:count])
        ranks = sum(host.slots for host in chosen)
        for ep_size in [size for size in range(wanted, 0, -1) if ranks % size == 0]:
            try:
                config = load_config(recipe, [*overrides, f"parallel.ep_size={ep_size}"])
                plan_batches(config, ranks)
            except ConfigError as error:
                first_problem = first_problem or f"{ranks} ranks: {error}"
                continue
            return Layout(hosts=chosen, ep_size=ep_size, config=config)
    raise LaunchError(f"no legal layout on {', '.join(host.name for host in hosts)}: {first_problem}")
