"""What every test may rely on: the same surroundings wherever they run, and no process of another
test.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .processes import REPOSITORY, SESSION, TEST, sweep

#: Launchers and terminals leave these to whatever is started below them.
_FOREIGN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "FORCE_COLOR",
    "LANGUAGE",
    "CDPATH",
    "BASH_ENV",
    "POSIXLY_CORRECT",
)
_FOREIGN_PREFIXES = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "TORCHELASTIC_", "WANDB_", "PROMOE_")
#: The folder of the tests -> when it begins: what mostly waits first, beside what computes.
_ORDER = {"multihost": 0, "distributed": 1, "cli": 2}
_started = False


def _prepare() -> None:
    """Take away what differs from one terminal, launcher or job to the next; processes of the tests
    inherit it.
    """
    for name in list(os.environ):
        if name in _FOREIGN or (name.startswith(_FOREIGN_PREFIXES) and name != "PROMOE_GOLDEN_DIR"):
            del os.environ[name]
    os.environ.update(LC_ALL="C.UTF-8", PYTHONUTF8="1", OMP_NUM_THREADS="1")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.environ.setdefault(SESSION, uuid.uuid4().hex)
    if not Path("/dev/nvidiactl").exists():  # without a GPU, Triton's programs run in Python
        os.environ["TRITON_INTERPRET"] = "1"
    # A signal that is ignored here (SIGINT in the background of a script, SIGHUP under nohup) would
    # be ignored by all processes of the tests; one that is handled is not.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *unused: None)
    os.umask(0o022)
    sys.addaudithook(_watch)
    gc.disable()  # until everything is imported, which makes no garbage


def _watch(event: str, arguments: tuple) -> None:
    global _started
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
        _started = True


_prepare()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="every combination, not only those that cover each part"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Keep a file's tests together on one worker, and all tests on several hosts, which mostly
    wait.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return (
                "multihost" if nodeid.startswith("tests/multihost/") else nodeid.partition("::")[0]
            )

    return ByFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the further combinations out unless --all; begin with what waits."""
    if not config.getoption("--all"):
        further = [item for item in items if item.get_closest_marker("combinations")]
        config.hook.pytest_deselected(items=further)
        items[:] = [item for item in items if item not in set(further)]
    items.sort(
        key=lambda item: _ORDER.get(
            item.path.relative_to(REPOSITORY / "tests").parts[0], len(_ORDER)
        )
    )


def pytest_collection_finish() -> None:
    """Collect garbage from here on, but not among the modules."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Kill what the whole session has left, also where it was interrupted; end without a search for
    garbage.
    """
    gc.freeze()
    if not hasattr(config, "workerinput"):
        sweep(SESSION, os.environ[SESSION])


@pytest.fixture(scope="module")
def asked(request: pytest.FixtureRequest) -> Callable[..., set]:
    """Return a function: the values of parameters that the selected tests of this module have, as
    tuples where several.
    """
    calls = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]

    def values(*names: str) -> set:
        found = {
            tuple(params[name] for name in names)
            for params in calls
            if all(name in params for name in names)
        }
        return {value[0] for value in found} if len(names) == 1 else found

    return values


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Kill at the end of each test what it has started itself; what a fixture of more tests started
    stays.
    """
    global _started
    _started, os.environ[TEST] = False, uuid.uuid4().hex
    yield
    if _started:
        sweep(TEST, os.environ[TEST])
    os.environ.pop(TEST, None)
