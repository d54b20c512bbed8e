"""Runs on every host during the pre-flight, over one ssh connection: a JSON request a line, a JSON answer a line with
the request's number.

It ends with its standard input, so none is left behind. For the network probe it listens on the one address it is told, for
one connection, which must begin with the token it was given.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from promoe_ds.launch.network import local_interfaces, resolve

_PACKAGES = ("torch", "deepspeed", "promoe_ds")
_GPU_QUERY_SECONDS = 120.0
_CONNECT_SECONDS = 10.0
_PINGS = 20
_BLOCK = bytes(1 << 16)


def time_now(request: dict) -> dict:
    """Answer this host's clock."""
    return {"time": time.time()}


def describe(request: dict) -> dict:
    """Answer versions, the package's content, interfaces, what names stand for here."""
    return {"hostname": socket.gethostname(), "versions": installed_versions(), "code": code_hash(),
            "interfaces": local_interfaces(), "addresses": resolve(request["names"])}


def installed_versions() -> dict[str, str]:
    """Return the versions that must agree; no package is imported for it."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def code_hash() -> str:
    """Return a checksum of this package's files."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".yaml") and path.is_file():
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def config_hash(request: dict) -> dict:
    """Answer a checksum of the resolved recipe and DeepSpeed JSON as this host reads them."""
    from promoe_ds.config import load_config, read_deepspeed_json

    config = load_config(request["recipe"], request["overrides"]).model_dump(mode="json")
    text = json.dumps([config, read_deepspeed_json(request["deepspeed_config"])], sort_keys=True)
    return {"hash": hashlib.sha256(text.encode()).hexdigest()[:16]}


def run_directory(request: dict) -> dict:
    """Answer whether the launcher's token is to be seen in the run directory; write this host's own; tell the free space."""
    folder, name = Path(request["folder"]), request["name"]
    try:
        seen = (folder / "token").read_text() == request["token"]
    except OSError:
        seen = False
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / f"seen_by_{name}").write_text(request["token"])
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return {"seen": seen, "problem": str(error), "free": 0}
    return {"seen": seen, "problem": "", "free": free}


def port_free(request: dict) -> dict:
    """Answer whether a port of an address can be listened on, and what stands against it."""
    try:
        with socket.create_server((request["address"], request["port"])):
            return {"problem": ""}
    except OSError as error:
        return {"problem": os.strerror(error.errno) if error.errno else str(error)}


def count_gpus(request: dict) -> dict:
    """Answer how many GPUs torch sees here, in a process of its own: it would take memory on the first."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_GPU_QUERY_SECONDS)
    if done.returncode != 0:
        return {"gpus": 0, "problem": (done.stderr.strip().splitlines() or ["python failed"])[-1]}
    return {"gpus": int(done.stdout.split()[-1]), "problem": ""}


class NetworkProbe:
    """One end of a measurement: listens for one connection, or opens it and measures."""

    def __init__(self) -> None:
        """Listen nowhere yet."""
        self._listener: socket.socket | None = None
        self._token = b""

    def listen(self, request: dict) -> dict:
        """Open a port on the given address alone; answer its number."""
        self._listener = socket.create_server((request["address"], 0), backlog=1)
        self._listener.settimeout(_CONNECT_SECONDS)
        self._token = request["token"].encode()
        return {"port": self._listener.getsockname()[1]}

    def serve(self, request: dict) -> dict:
        """Take one measurement's connection: echo pings, then swallow the stream and tell its size."""
        assert self._listener is not None
        with contextlib.closing(self._listener), self._listener.accept()[0] as peer:
            peer.settimeout(request["seconds"] + _CONNECT_SECONDS)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not hmac.compare_digest(_receive(peer, len(self._token)), self._token):
                return {"problem": "a stranger connected"}
            for _ in range(_PINGS):
                peer.sendall(_receive(peer, 1))
            received, started = 0, time.perf_counter()
            while block := peer.recv(1 << 18):
                received += len(block)
            return {"bytes": received, "seconds": time.perf_counter() - started}

    def measure(self, request: dict) -> dict:
        """Connect to a listening host: answer the median round trip; stream for the given time."""
        with socket.create_connection((request["address"], request["port"]), timeout=_CONNECT_SECONDS) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.sendall(request["token"].encode())
            trips = []
            for _ in range(_PINGS):
                started = time.perf_counter()
                peer.sendall(b".")
                _receive(peer, 1)
                trips.append(time.perf_counter() - started)
            end = time.perf_counter() + request["seconds"]
            while time.perf_counter() < end:
                peer.sendall(_BLOCK)
        return {"round_trip": sorted(trips)[len(trips) // 2]}


def _receive(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        block = peer.recv(count - len(data))
        if not block:
            raise OSError("the other end closed the connection")
        data += block
    return data


def main() -> None:
    """Answer requests until standard input ends."""
    probe = NetworkProbe()
    actions: dict[str, Callable[[dict], dict[str, Any]]] = {
        "time": time_now, "describe": describe, "config": config_hash, "run_directory": run_directory, "port": port_free,
        "gpus": count_gpus, "listen": probe.listen, "serve": probe.serve, "measure": probe.measure}
    # Whatever a library prints must not look like an answer.
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = actions[request["do"]](request)
        except Exception as error:  # the launcher reports it, with the host's name
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps({**answer, "id": request["id"]}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
