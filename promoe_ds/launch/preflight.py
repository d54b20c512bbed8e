"""The checks of this host and of every other before a launch, and the line for each problem."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from promoe_ds.config import count_parameters
from promoe_ds.errors import LaunchError
from promoe_ds.launch.agent import CONTENT, config_hash, installed_software
from promoe_ds.launch.environment import require_launchable
from promoe_ds.launch.layout import Job
from promoe_ds.launch.network import choose_interface
from promoe_ds.launch.remote import Agent, connected, on_all
from promoe_ds.run_files import CHECKPOINTS, LAUNCH_FOLDER

_T = TypeVar("_T")
_CLOCK_TOLERANCE_SECONDS = 2.0
_CLOCK_READINGS = 3
#: To import torch from a file system that many hosts read at once.
_TORCH_SECONDS = 150.0
#: fp32 weights, moments and average, and the module's own copy.
_CHECKPOINT_BYTES_PER_PARAMETER = 20
#: Part of what ssh or the agent reports -> remedy.
_REMEDIES = {
    "Permission denied": "install your key there (ssh-copy-id)",
    "Host key verification failed": "accept its host key once (ssh to it by hand)",
    "Could not resolve": "correct its name in the hostfile, DNS or /etc/hosts",
    "the agent ended": "put the repository and the environment there under the same paths as here",
    "GPUs": "repair torch and the driver there",
    "attempting to bind": "end the process that uses it, or name another with --master-port",
    "OSError": "correct the mount",
    "PermissionError": "correct the rights",
}


@dataclass
class _Hosts:
    """The agents of all hosts, and the problems so far: `HOST: problem: remedy`, each once."""

    agents: dict[str, Agent]
    problems: dict[str, None] = field(default_factory=dict)

    def each(self, action: Callable[[Agent], _T]) -> Iterator[tuple[str, _T]]:
        """Do something with all hosts at once; yield their results. A failure is a problem."""
        results, problems = on_all(self.agents, action)
        for host, problem in problems.items():
            remedies = (remedy for sign, remedy in _REMEDIES.items() if sign in problem)
            self.add(host, problem, next(remedies, "repair it or remove it from the hostfile"))
        yield from results.items()

    def ask(self, action: str, **values: Any) -> Iterator[tuple[str, Any]]:
        """Send all hosts the same request; yield each one's answer."""
        return self.each(lambda agent: agent.ask(action, **values))

    def add(self, host: str, problem: str, remedy: str) -> None:
        """Add a problem of a host."""
        self.problems[f"{host}: {problem}: {remedy}".replace("\n", " ")] = None


def check_hosts(job: Job, environment: Mapping[str, str]) -> dict[str, Any]:
    """Check this host, then all hosts at once; return each one's description (agent.describe).

    The launcher's folder exists in the run directory.
    Raises: LaunchError with a line for each problem; one host's do not hide another's. OSError if
        the run directory cannot be written here.
    """
    for command, package in (("pdsh", "pdsh"), ("ssh", "openssh-client")):
        if shutil.which(command) is None:
            raise LaunchError(
                f"this host has no {command}, which starts the ranks: install the package {package}"
            )
    require_launchable(job.run_dir)
    with connected(job.host_names, environment) as agents:
        hosts = _Hosts(agents)
        described = dict(hosts.ask("describe", names=job.host_names))
        _check_software(hosts, described)
        for check in (_check_clock, _check_config, _check_run_directory):
            check(job, hosts)
        if environment.get("DS_ACCELERATOR") != "cpu":
            _check_gpus(job, hosts)
        if described:
            _check_network(job, hosts, described, environment)
    if hosts.problems:
        title = f"pre-flight: {len(hosts.problems)} problem{'s' * (len(hosts.problems) > 1)}"
        raise LaunchError("\n  ".join([title, *hosts.problems]))
    return described


def _check_clock(job: Job, hosts: _Hosts) -> None:
    for host, ahead in hosts.each(_clock_offset):
        if abs(ahead) > _CLOCK_TOLERANCE_SECONDS:
            way = "ahead of" if ahead > 0 else "behind"
            problem = f"its clock is {abs(ahead):.1f} s {way} this host's"
            hosts.add(host, problem, "run a time service (chrony, systemd-timesyncd) on both")


def _clock_offset(agent: Agent) -> float:
    """Return by how many seconds a host's clock is ahead, from the quickest reading."""
    readings = []
    for _ in range(_CLOCK_READINGS):
        before = time.time()
        there = agent.ask("time")
        after = time.time()
        readings.append((after - before, there - (before + after) / 2))
    return min(readings)[1]


def _check_config(job: Job, hosts: _Hosts) -> None:
    source: dict[str, Any] = {"recipe": job.recipe, "deepspeed_config": job.deepspeed_config}
    source |= {"overrides": job.overrides, "imports": job.imports}
    here = config_hash(**source)
    for host, there in hosts.ask("config_hash", timeout=_TORCH_SECONDS, **source):
        if there != here:
            problem = "reads another recipe or DeepSpeed JSON than this host"
            hosts.add(host, problem, "let all hosts read the same files")


def _check_software(hosts: _Hosts, described: Mapping[str, dict[str, Any]]) -> None:
    """Compare software with this host's; find two names of one machine. Whoever has another code
    of this package, whose answers may be others, is asked nothing more.
    """
    here = installed_software()
    machines: dict[tuple, str] = {}
    for host, answer in described.items():
        for name, there in answer["software"].items():
            if there != (own := here.get(name)):
                problem = f"{name} is {there} there and {own} here"
                hosts.add(host, problem, "use the same environment and commit on all hosts")
        first = machines.setdefault(
            (answer["hostname"], *sorted(answer["interfaces"].items())), host
        )
        if first != host:
            hosts.add(host, f"is the same machine as {first}", "keep one line with all its slots")
        if answer["software"].get(CONTENT) != here[CONTENT]:
            hosts.agents.pop(host)


def _check_run_directory(job: Job, hosts: _Hosts) -> None:
    folder, token = job.run_dir.absolute() / LAUNCH_FOLDER / "preflight", secrets.token_hex(16)
    folder.mkdir(exist_ok=True, mode=0o700)
    (folder / "token").write_text(token)
    need = _bytes_needed(job)
    answers = hosts.each(
        lambda agent: agent.ask("run_directory", folder=str(folder), name=agent.host)
    )
    for host, free in answers:
        seen = folder / f"seen_by_{host}"
        if not seen.exists() or seen.read_text() != token:
            problem = f"--run-dir {job.run_dir} is another folder there than here"
            hosts.add(host, problem, "put it on a file system that all hosts mount")
        elif free < need:
            sizes = f"{free / 1e9:.1f} GB free, checkpoints need {need / 1e9:.1f} GB"
            hosts.add(host, f"--run-dir has {sizes}", "free some or lower train.keep_last")
    shutil.rmtree(folder, ignore_errors=True)


def _bytes_needed(job: Job) -> int:
    """Return the size of the checkpoints to come: one more than are kept, less those that exist."""
    existing = len(list((job.run_dir / CHECKPOINTS).glob("step_*/manifest.json")))
    left = max(1, job.config.train.keep_last + 1 - existing)
    return left * _CHECKPOINT_BYTES_PER_PARAMETER * count_parameters(job.config).total


def _check_gpus(job: Job, hosts: _Hosts) -> None:
    slots = {host.name: host.slots for host in job.hosts}
    for host, gpus in hosts.ask("gpus", timeout=_TORCH_SECONDS):
        if gpus != slots[host]:
            remedy = "correct the hostfile, or train on CPUs: DS_ACCELERATOR=cpu in .deepspeed_env"
            hosts.add(host, f"{gpus} GPUs, but slots={slots[host]}", remedy)


def _check_network(
    job: Job, hosts: _Hosts, described: Mapping[str, dict[str, Any]], environment: Mapping[str, str]
) -> None:
    """Find the common interface; check that the first host can listen on the master port there."""
    try:
        interface = choose_interface(job.interface, environment, described)
    except LaunchError as error:
        host, _, problem = str(error).partition(": ")
        return hosts.add(host, problem, 'see docs/guides/multinode.md, "Interfaces"')
    first = job.host_names[0]
    if first in hosts.agents and first in described:
        address = described[first]["interfaces"][interface]
        master = _Hosts({first: hosts.agents[first]}, hosts.problems)
        list(master.ask("port", address=address, port=job.master_port))
