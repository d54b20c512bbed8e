"""Processes of the tests: forked from one that has imported torch and DeepSpeed already, and none
is left behind.

A fork is a process like any other (its own session, environment, folder, output and exit code);
what it saves is the seconds that each interpreter needs to import torch and DeepSpeed. Whatever is
about starting itself runs in an interpreter of its own.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
#: Every process of a session of tests has the first in its environment, every one that a test
# started the second.
SESSION, TEST = "TESTS_SESSION", "TESTS_TEST"


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process of the tests: one thread, no GPU, this Python's commands
    first.
    """
    own = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return {**os.environ, **own, **more}


def free_port() -> int:
    """Return a port that is free, below those that the kernel gives to whoever asks for any."""
    while True:
        port = random.SystemRandom().randrange(12000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; where that does not come in time, nothing of it is left."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**env, TEST: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        sweep(TEST, mark)
        output, errors = process.communicate()
        raise AssertionError(
            f"{command} did not end within {timeout} s:\n{output[-3000:]}\n{errors[-3000:]}"
        ) from None
    finally:
        sweep(TEST, mark)
        process.wait()
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> float:
    """Wait for a condition; return how many seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout, f"not within {timeout} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - started


def sweep(name: str, value: str) -> None:
    """Kill every process that has begun with `name=value` in its environment, this one apart."""
    wanted = f"{name}={value}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int(folder.name) != os.getpid() and wanted in (
                folder / "environ"
            ).read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


class Forks:
    """Forked processes that run together; all are killed when the block ends."""

    def __init__(
        self,
        task: Callable[..., Any],
        arguments: Sequence[Any],
        environments: Sequence[Mapping[str, str]],
        *,
        cwd: Path = REPOSITORY,
    ) -> None:
        """Start `task(*arguments)` once for each of `environments`, in the folder `cwd`."""
        _serve()
        context = multiprocessing.get_context("forkserver")
        self._folder = tempfile.TemporaryDirectory(prefix="forks")
        self._processes = [
            context.Process(
                target=_begin,
                args=(task, tuple(arguments), dict(env), str(cwd), self._path(number, "")),
            )
            for number, env in enumerate(environments)
        ]
        for process in self._processes:
            process.start()

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *unused: object) -> None:
        self.kill()
        self._folder.cleanup()

    def kill(self) -> None:
        """Kill what still runs, with all that it started in its session."""
        for process in self._processes:
            if process.is_alive():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()

    def is_alive(self) -> bool:
        """Whether one still runs."""
        return any(process.is_alive() for process in self._processes)

    def wait(self, timeout: float) -> list[int]:
        """Return all exit codes (-N: killed by signal N); once one has failed, the others have ten
        seconds more.

        Raises: AssertionError, with what they wrote, if one still runs after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while self.is_alive():
            if any(process.exitcode for process in self._processes):
                end = min(end, time.monotonic() + 10)
                while self.is_alive() and time.monotonic() < end:
                    time.sleep(0.05)
                break
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"not done within {timeout} s: {self.texts()}")
            time.sleep(0.01)
        self.kill()
        return [process.exitcode for process in self._processes]

    def text(self, number: int = 0, kind: str = "errors") -> str:
        """Return the `output` or `errors` of one."""
        path = Path(self._path(number, kind))
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def texts(self) -> str:
        """Return the last words of all."""
        return "\n".join(
            self.text(number, kind)[-3000:]
            for number in range(len(self._processes))
            for kind in ("output", "errors")
        )

    def _path(self, number: int, kind: str) -> str:
        return f"{self._folder.name}/{number}_{kind}"


def ranks(world_size: int, task: Callable[..., Any], *arguments: Any, **env: str) -> Forks:
    """Start `task(*arguments)` on ranks that find each other by what a launcher sets."""
    common = environment(
        WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), **env
    )
    return Forks(
        task,
        arguments,
        [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)],
    )


def run_ranks(
    world_size: int, task: Callable[..., Any], *arguments: Any, timeout: float = 240
) -> None:
    """Run `task(*arguments)` on ranks to its end, which must be a good one."""
    with ranks(world_size, task, *arguments) as forks:
        assert forks.wait(timeout) == [0] * world_size, forks.texts()


def run_python(
    arguments: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    timeout: float,
    limit: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ...` or `python SCRIPT ...` in a fork; `limit`: bytes of the largest
    file that it may write.
    """
    with Forks(_run_program, (tuple(arguments), limit), [env], cwd=cwd) as forks:
        (code,) = forks.wait(timeout)
        return subprocess.CompletedProcess(
            arguments, code, forks.text(0, "output"), forks.text(0, "errors")
        )


@functools.cache
def _serve() -> None:
    """Start the process that all are forked from."""
    before = dict(os.environ)
    try:
        os.environ.update(environment())
        os.environ.pop(TEST, None)  # it serves all tests
        forkserver.set_forkserver_preload(["tests.preloaded"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _begin(
    task: Callable[..., Any], arguments: tuple, env: dict[str, str], cwd: str, path: str
) -> None:
    """Make a fork what a process is that was just started; then run its task."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: it does not outlive the tests
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for kind, number in (("output", 1), ("errors", 2)):
        file = os.open(f"{path}{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    task(*arguments)


def _run_program(arguments: tuple[str, ...], limit: int | None) -> None:
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    module = arguments[0] == "-m"
    sys.argv = list(arguments[1:] if module else arguments)
    sys.path.insert(0, "" if module else str(Path(arguments[0]).parent))
    if module:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")
