"""What is checked on the launching host and on every other, and the line for each failure."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from promoe_ds.config import RunConfig, count_parameters
from promoe_ds.errors import LaunchError
from promoe_ds.launch.environment import job_environment, require_launchable
from promoe_ds.launch.heartbeat import LAUNCH_FOLDER, make_launch_folder
from promoe_ds.launch.hostfile import Host
from promoe_ds.launch.job import Job
from promoe_ds.launch.layout import full_layout
from promoe_ds.launch.network import choose_interface, reached_by
from promoe_ds.launch.preflight.agent import code_hash, config_hash, installed_versions
from promoe_ds.launch.preflight.client import Agent
from promoe_ds.launch.preflight.links import Link, measure_links
from promoe_ds.launch.remote import RemoteError

_CLOCK_TOLERANCE_SECONDS = 2.0
_CLOCK_READINGS = 3
#: fp32 weights, moments and average, and the module's own copy.
_CHECKPOINT_BYTES_PER_PARAMETER = 20
#: What ssh says -> what helps.
_SSH_REMEDIES = {
    "Permission denied": "install your key there (ssh-copy-id)",
    "Host key verification failed": "accept its host key once (ssh to it by hand)",
    "Could not resolve": "correct its name in the hostfile, DNS or /etc/hosts",
    "the agent ended": "make the repository and the environment visible there under the same paths as here",
}


@dataclass(frozen=True)
class Finding:
    """One failure: where, what, how to mend it."""

    host: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.host}: {self.what}: {self.remedy}"


@dataclass
class Report:
    """What the pre-flight found."""

    findings: list[Finding] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    interface: str = ""
    ranks: int = 0


@dataclass(frozen=True, kw_only=True)
class _Ground:
    """What the checks of hosts share."""

    job: Job
    deepspeed_config: str
    config: RunConfig
    environment: Mapping[str, str]
    agents: Mapping[str, Agent]
    token: str

    @property
    def folder(self) -> Path:
        return self.job.run_dir.absolute() / LAUNCH_FOLDER / "preflight"


def run_preflight(job: Job, deepspeed_config: str) -> Report:
    """Check this host, then all hosts at once; what one lacks does not hide what another lacks.

    Raises: PromoeError for what makes looking at the hosts pointless: no pdsh, a recipe that cannot run on these ranks.
    """
    for command, package in (("pdsh", "pdsh"), ("ssh", "openssh-client")):
        if shutil.which(command) is None:
            raise LaunchError(f"this host has no {command}, by which ranks are started: install the package {package}")
    require_launchable(job.run_dir)
    environment = job_environment(os.environ)
    layout = full_layout(job.recipe, job.overrides, job.hosts)
    report = Report(ranks=layout.ranks)
    with ExitStack() as stack:
        agents = {host.name: stack.enter_context(Agent(host.name, dict(environment))) for host in job.hosts}
        offsets = _ask_all(agents, _clock_offset)
        for host, answer in offsets.items():
            report.findings += [_unreached(host, answer)] if isinstance(answer, RemoteError) else clock_findings(host, answer)
        ground = _Ground(job=job, deepspeed_config=deepspeed_config, config=layout.config, environment=environment,
                         agents={name: agent for name, agent in agents.items() if not isinstance(offsets[name], RemoteError)},
                         token=secrets.token_hex(16))
        _check_hosts(ground, report)
    return report


def _check_hosts(ground: _Ground, report: Report) -> None:
    described: dict[str, dict[str, Any]] = {}
    for host, answer in _answers(ground, report, "describe", names=list(ground.agents)):
        described[host] = answer
        report.findings += _same_software(host, answer)
    report.findings += _same_machine(described)
    request = {"recipe": ground.job.recipe, "overrides": list(ground.job.overrides), "deepspeed_config": ground.deepspeed_config}
    wanted = config_hash(request)["hash"]
    for host, answer in _answers(ground, report, "config", **request):
        if answer["hash"] != wanted:
            report.findings.append(Finding(host, "resolves the recipe or DeepSpeed JSON differently",
                                           "let all hosts read the same files"))
    report.findings += _run_directory(ground, report)
    if ground.environment.get("DS_ACCELERATOR") != "cpu":
        report.findings += _gpus(ground, report)
    if described:
        _network(ground, report, described)


def _answers(ground: _Ground, report: Report, action: str, **values: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ask all hosts the same at once; a host that fails becomes a finding."""
    for host, answer in _ask_all(ground.agents, lambda agent: agent.ask(action, timeout=180, **values)).items():
        if isinstance(answer, RemoteError):
            report.findings.append(_unreached(host, answer))
        else:
            yield host, answer


def _ask_all(agents: Mapping[str, Agent], action: Callable[[Agent], Any]) -> dict[str, Any]:
    def attempt(agent: Agent) -> Any:
        try:
            return action(agent)
        except RemoteError as error:
            return error

    with ThreadPoolExecutor(max_workers=max(1, len(agents))) as pool:
        return dict(zip(agents, pool.map(attempt, agents.values()), strict=True))


def _unreached(host: str, error: RemoteError) -> Finding:
    remedy = next((text for sign, text in _SSH_REMEDIES.items() if sign in str(error)), "mend it or take it out of the hostfile")
    return Finding(host, str(error), remedy)


def clock_findings(host: str, ahead: float) -> list[Finding]:
    """Judge by how many seconds a host's clock is ahead of this one's."""
    if abs(ahead) <= _CLOCK_TOLERANCE_SECONDS:
        return []
    return [Finding(host, f"its clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this host's",
                    "run a time service (chrony, systemd-timesyncd) on both")]


def _clock_offset(agent: Agent) -> float:
    """Return by how many seconds a host's clock is ahead, from the reading that took the least time."""
    readings = []
    for _ in range(_CLOCK_READINGS):
        before = time.time()
        there = agent.ask("time")["time"]
        after = time.time()
        readings.append((after - before, there - (before + after) / 2))
    return min(readings)[1]


def _same_software(host: str, answer: dict[str, Any]) -> list[Finding]:
    findings = [Finding(host, f"{name} is {answer['versions'].get(name)} there and {here} here", "install the same environment")
                for name, here in installed_versions().items() if answer["versions"].get(name) != here]
    if answer["code"] != code_hash():
        findings.append(Finding(host, "the files of promoe_ds differ from those here", "bring both to the same commit"))
    return findings


def _same_machine(described: Mapping[str, dict[str, Any]]) -> list[Finding]:
    seen: dict[tuple, str] = {}
    findings = []
    for host, answer in described.items():
        key = (answer["hostname"], *sorted(answer["interfaces"].items()))
        if key in seen:
            findings.append(Finding(host, f"is the same machine as {seen[key]}", "keep one line with all its slots"))
        seen.setdefault(key, host)
    return findings


def _run_directory(ground: _Ground, report: Report) -> list[Finding]:
    try:
        make_launch_folder(ground.job.run_dir)
        ground.folder.mkdir(exist_ok=True, mode=0o700)
        (ground.folder / "token").write_text(ground.token)
    except OSError as error:
        return [Finding("this host", f"--run-dir {ground.job.run_dir} cannot be made or written: {error.strerror}",
                        "mend its rights, or take another directory")]
    need, findings = _bytes_needed(ground), []
    for host, answer in _ask_all(ground.agents, lambda agent: agent.ask("run_directory", folder=str(ground.folder), name=agent.host,
                                                                        token=ground.token)).items():
        if isinstance(answer, RemoteError):
            findings.append(_unreached(host, answer))
        elif answer["problem"]:
            findings.append(Finding(host, f"--run-dir cannot be written there: {answer['problem']}",
                                    "mend the mount or the rights"))
        elif not answer["seen"] or _read(ground.folder / f"seen_by_{host}") != ground.token:
            findings.append(Finding(host, f"--run-dir {ground.job.run_dir} is another folder there than here",
                                    "put it on a file system that all hosts mount"))
        elif answer["free"] < need:
            findings.append(Finding(host, f"--run-dir has {answer['free'] / 1e9:.1f} GB free, checkpoints need {need / 1e9:.1f} GB",
                                    "free some or lower train.keep_last"))
    shutil.rmtree(ground.folder, ignore_errors=True)
    return findings


def _bytes_needed(ground: _Ground) -> int:
    """Return what the checkpoints still to be written take: one more than are kept, less those that are there."""
    there = len(list((ground.job.run_dir / "checkpoints").glob("step_*/manifest.json")))
    left = max(1, ground.config.train.keep_last + 1 - there)
    return left * _CHECKPOINT_BYTES_PER_PARAMETER * count_parameters(ground.config).total


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _gpus(ground: _Ground, report: Report) -> list[Finding]:
    slots, findings = {host.name: host.slots for host in ground.job.hosts}, []
    for host, answer in _answers(ground, report, "gpus"):
        if answer["problem"]:
            findings.append(Finding(host, f"its GPUs cannot be counted: {answer['problem']}", "mend torch and the driver there"))
        elif answer["gpus"] != slots[host]:
            findings.append(Finding(host, f"{answer['gpus']} GPUs, but slots={slots[host]}",
                                    "correct the hostfile, or put DS_ACCELERATOR=cpu into .deepspeed_env to train on CPUs"))
    return findings


def _network(ground: _Ground, report: Report, described: Mapping[str, dict[str, Any]]) -> None:
    interfaces = {host: answer["interfaces"] for host, answer in described.items()}
    try:
        report.interface = choose_interface(ground.job.interface, ground.environment, interfaces, reached_by(described))
    except LaunchError as error:
        host, _, what = str(error).partition(": ")
        report.findings.append(Finding(host, what, "see docs/multinode.md, \"Interfaces\""))
        return
    addresses = {host: known[report.interface] for host, known in interfaces.items()}
    report.findings += _master_port(ground, addresses)
    if len(addresses) > 1:
        report.links = measure_links({host: ground.agents[host] for host in addresses}, addresses)
        report.findings += [Finding(link.source, f"cannot reach {link.target} over {report.interface}: {link.problem}",
                                    "open all ports between the hosts") for link in report.links if link.problem]


def _master_port(ground: _Ground, addresses: Mapping[str, str]) -> list[Finding]:
    first: Host = ground.job.hosts[0]
    if first.name not in addresses:
        return []
    port = ground.job.master_port
    try:
        problem = ground.agents[first.name].ask("port", address=addresses[first.name], port=port)["problem"]
    except RemoteError as error:
        return [_unreached(first.name, error)]
    return [Finding(first.name, f"port {port} of {addresses[first.name]} cannot be used ({problem})",
                    "end what holds it or give another with --master-port")] if problem else []


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Return each finding once, as a line."""
    return list(dict.fromkeys(str(finding).replace("\n", " ") for finding in findings))
