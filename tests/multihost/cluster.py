"""Several hosts on one Linux machine: each has its own network, processes, name and ssh server; a
bridge joins them.

They share the file system, as on a cluster. All their processes die with this one, and namespaces
with their last process: there is nothing to clean up after a crash, and any number of clusters can
run side by side.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_COMMANDS = ("unshare", "nsenter", "ip", "tc", "ssh", "ssh-keygen", "pdsh")
_SSHD = "/usr/sbin/sshd"
_DELAY = Path(__file__).with_name("delay.py")
_NAMESPACES = ("--net", "--pid", "--mount", "--uts", "--ipc")
_START_SECONDS = 120.0

#: Prepares a host inside its namespaces: $1 its folder, $2 its name, $3 its address.
_HOST_SETUP = """
set -e
hostname "$2"
mount --make-rprivate /
for file in passwd shadow; do mount --bind "$1/$file" "/etc/$file"; done
mount --bind "$1/../hosts" /etc/hosts
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
while ! ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip address add "$3/24" dev eth0
ip link set eth0 up
exec /usr/sbin/sshd -D -f "$1/sshd_config" -E "$1/sshd.log"
"""

_SSHD_CONFIG = """ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {root}/key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
UseDNS no
PidFile none
MaxStartups 100
"""

_SSH_CONFIG = """Host *
  User root
  IdentityFile {root}/key
  UserKnownHostsFile {root}/known_hosts
  StrictHostKeyChecking yes
"""


def why_not() -> str:
    """Return why this machine cannot have such hosts, "" if it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if any(character.isspace() for character in f"{Path(__file__)}{sys.executable}"):
        return (
            "DeepSpeed's runner for several hosts does not quote the folder that it starts in, and"
            " this one's path has a blank"
        )
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in (*_COMMANDS, _SSHD) if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install pdsh openssh-server iproute2)"
    script = "ip link add br0 type bridge && ip link add veth0 type veth peer name veth1"
    trial = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "sh", "-c", script], capture_output=True, text=True
    )
    return f"no namespaces, bridges or veth: {trial.stderr.strip()}" if trial.returncode else ""


class Cluster:
    """Hosts host1 ... hostN and the switch between them."""

    def __init__(self, size: int, root: Path, network: str = "10.87.3") -> None:
        """Describe `size` hosts whose files are under `root`; `start` makes them."""
        self.root = root
        self.addresses = {f"host{i}": f"{network}.{i}" for i in range(1, size + 1)}
        self._keepers: list[subprocess.Popen] = []
        self._pids: dict[str, int] = {}

    def __enter__(self) -> Cluster:
        """Start all hosts; return when each answers by ssh."""
        self.root.mkdir(parents=True)
        _make_key(self.root / "key")
        (self.root / "hosts").write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        )
        try:
            self._pids["switch"] = self._keep("sleep", "infinity")
            self._in_switch("ip link add br0 type bridge forward_delay 0 && ip link set br0 up")
            for name in self.addresses:
                self._start_host(name)
            for name in self.addresses:
                self._wait_for_ssh(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *unused: object) -> None:
        """End every process of every host."""
        for keeper in self._keepers:
            # --kill-child: the namespace's first process goes with it, and all others with that
            keeper.kill()
            keeper.wait()

    def home(self, name: str) -> Path:
        """Return a host's home folder."""
        return self.root / name / "home"

    def popen(
        self, name: str, *command: str, cwd: Path, env: dict[str, str] | None = None, **options
    ) -> subprocess.Popen:
        """Start a command on a host."""
        inside = ["sh", "-c", f'cd {shlex.quote(str(cwd))} && exec "$@"', "sh", *command]
        environment = {
            "HOME": str(self.home(name)),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **(env or {}),
        }
        return subprocess.Popen(
            [*self._enter(name), *inside], env=environment, text=True, **options
        )

    def run(
        self, name: str, *command: str, cwd: Path = Path("/"), timeout: float = 240.0, **options
    ) -> subprocess.CompletedProcess:
        """Run a command on a host to its end."""
        pipe = subprocess.PIPE
        process = self.popen(name, *command, cwd=cwd, stdout=pipe, stderr=pipe, **options)
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def processes(self, name: str, part: str) -> dict[int, str]:
        """Return the processes of a host whose command line holds `part`, by their id on this
        machine.
        """
        space, found = Path(f"/proc/{self._pids[name]}/ns/pid").readlink(), {}
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or ())
            with suppress(OSError):
                if part in command and Path(f"/proc/{process.pid}/ns/pid").readlink() == space:
                    found[process.pid] = command
        return found

    @contextmanager
    def unplugged(self, name: str) -> Iterator[None]:
        """Pull a host's cable, and plug it in again."""
        self._in_switch(f"ip link set {_port(name)} down")
        try:
            yield
        finally:
            self._in_switch(f"ip link set {_port(name)} up")

    @contextmanager
    def limited(self, name: str, rate: str) -> Iterator[None]:
        """Limit what a host sends and receives, e.g. to `20mbit`."""
        shape = f"root tbf rate {rate} burst 32kb latency 400ms"
        self._in_switch(f"tc qdisc add dev {_port(name)} {shape}")
        self._checked(self._enter(name), f"tc qdisc add dev eth0 {shape}")
        try:
            yield
        finally:
            self._in_switch(f"tc qdisc del dev {_port(name)} root")
            self._checked(self._enter(name), "tc qdisc del dev eth0 root")

    @contextmanager
    def delayed(self, name: str, seconds: float) -> Iterator[None]:
        """Make a host's cable so long that each frame takes `seconds` more, in either direction."""
        port = _port(name)
        self._in_switch(
            f"ip link add far type veth peer name near && ip link set far up && ip link set {port}"
            " nomaster && ip link set near master br0 up"
        )
        enter = ["nsenter", "--target", str(self._pids["switch"]), "--net"]
        relay = subprocess.Popen(
            [*enter, sys.executable, str(_DELAY), port, "far", str(seconds)],
            preexec_fn=_die_with_parent,
        )
        try:
            yield
        finally:
            relay.kill()
            relay.wait()
            self._in_switch(f"ip link del far && ip link set {port} master br0")

    def _start_host(self, name: str) -> None:
        folder, address = self.root / name, self.addresses[name]
        (folder / "home/.ssh").mkdir(parents=True, mode=0o700)
        _make_key(folder / "host_key")
        public = (folder / "host_key.pub").read_text().split()
        with (self.root / "known_hosts").open("a") as file:
            file.write(f"{name},{address} {public[0]} {public[1]}\n")
        accounts = Path("/etc/passwd").read_text().splitlines(keepends=True)
        (folder / "passwd").write_text(
            "".join(
                f"root:x:0:0:root:{folder}/home:/bin/bash\n" if line.startswith("root:") else line
                for line in accounts
            )
        )
        (folder / "shadow").write_text("root:*:19000:0:99999:7:::\n")
        (folder / "shadow").chmod(0o600)
        (folder / "sshd_config").write_text(
            _SSHD_CONFIG.format(address=address, folder=folder, root=self.root)
        )
        (folder / "home/.ssh/config").write_text(_SSH_CONFIG.format(root=self.root))
        self._pids[name] = self._keep("bash", "-c", _HOST_SETUP, "host", str(folder), name, address)
        self._in_switch(
            f"ip link add {_port(name)} type veth peer name eth0 netns {self._pids[name]} && "
            f"ip link set {_port(name)} master br0 up"
        )

    def _keep(self, *command: str) -> int:
        """Start a process in namespaces of its own; return its id."""
        keeper = subprocess.Popen(
            ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", *command],
            preexec_fn=_die_with_parent,
            stdin=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"]},
        )
        self._keepers.append(keeper)
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and keeper.poll() is None:
            if found := psutil.Process(keeper.pid).children():
                return found[0].pid
            time.sleep(0.02)
        raise RuntimeError(f"no namespace for {command}")

    def _wait_for_ssh(self, name: str) -> None:
        first, deadline = next(iter(self.addresses)), time.monotonic() + _START_SECONDS
        while (
            done := self.run(
                first, "ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=2", name, "true"
            )
        ).returncode:
            if time.monotonic() > deadline:
                log = self.root / name / "sshd.log"
                raise RuntimeError(
                    f"{name} does not answer: {done.stderr}"
                    f" {log.read_text() if log.exists() else ''}"
                )
            time.sleep(0.1)

    def _enter(self, name: str) -> list[str]:
        return ["nsenter", "--target", str(self._pids[name]), *_NAMESPACES]

    def _in_switch(self, script: str) -> None:
        self._checked(["nsenter", "--target", str(self._pids["switch"]), "--net"], script)

    @staticmethod
    def _checked(enter: list[str], script: str) -> None:
        done = subprocess.run([*enter, "sh", "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, f"{script}: {done.stderr}"


@contextmanager
def replaced(path: Path, text: str) -> Iterator[None]:
    """Write a file, and write its former content back."""
    before = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(before)


def _port(name: str) -> str:
    return f"to-{name}"


def _make_key(path: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)],
        check=True,
    )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
