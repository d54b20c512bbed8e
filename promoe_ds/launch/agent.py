"""Runs on every host over one ssh connection: a JSON request a line, a JSON answer a line.

It ends with its standard input, so that none is left behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from promoe_ds.config import load_config, read_deepspeed_json
from promoe_ds.config.extensions import import_extension
from promoe_ds.launch.network import local_interfaces, resolve
from promoe_ds.launch.processes import kill_leftover_processes

_PACKAGES = ("torch", "deepspeed", "promoe_ds")
_GPU_QUERY_SECONDS = 120.0
#: What `installed_software` calls this package's checksum.
CONTENT = "the content of promoe_ds"


def describe(names: Sequence[str]) -> dict[str, Any]:
    """Return this host's name, software, interfaces and what it resolves `names` to."""
    return {
        "hostname": socket.gethostname(),
        "software": installed_software(),
        "interfaces": local_interfaces(),
        "addresses": resolve(names),
    }


def installed_software() -> dict[str, str]:
    """Return the versions that must agree, and this package's checksum; imports no package."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".yaml") and path.is_file():
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found | {CONTENT: digest.hexdigest()[:16]}


def config_hash(
    recipe: str, overrides: Sequence[str], deepspeed_config: str, imports: Sequence[str]
) -> str:
    """Return a checksum of the resolved recipe and DeepSpeed JSON that this host reads.

    Raises: ConfigError; whatever a file of `imports` raises.
    """
    for name in imports:
        import_extension(name)
    config, deepspeed = load_config(recipe, overrides), read_deepspeed_json(deepspeed_config)
    text = json.dumps([config.model_dump(mode="json"), deepspeed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_run_directory(folder: str, name: str) -> int:
    """Write the launcher's token, as this host sees it, to where the launcher should find it.

    Returns: free bytes.
    Raises: OSError if it cannot be written.
    """
    there = Path(folder)
    there.mkdir(parents=True, exist_ok=True, mode=0o700)
    token = there / "token"
    (there / f"seen_by_{name}").write_text(token.read_text() if token.is_file() else "")
    return shutil.disk_usage(there).free


def check_port(address: str, port: int) -> None:
    """Listen on a port of an address for a moment.

    Raises: OSError if that cannot be done.
    """
    socket.create_server((address, port)).close()


def count_gpus() -> int:
    """Return how many GPUs torch sees, in another process: it takes memory of the first one.

    Raises: RuntimeError if torch fails.
    """
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_QUERY_SECONDS)
    if done.returncode != 0:
        raise RuntimeError(
            f"cannot count GPUs: {(done.stderr.strip().splitlines() or ['python failed'])[-1]}"
        )
    return int(done.stdout.split()[-1])


_ACTIONS: dict[str, Callable[..., Any]] = {
    "time": time.time,
    "describe": describe,
    "config_hash": config_hash,
    "run_directory": check_run_directory,
    "port": check_port,
    "gpus": count_gpus,
    "kill_leftovers": kill_leftover_processes,
}


def main() -> None:
    """Answer requests until standard input ends."""
    # What a library prints must not look like an answer.
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": _ACTIONS[request.pop("action")](**request)}
        except Exception as error:  # the launcher reports it with the host's name
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
