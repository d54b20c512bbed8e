"""What ranks find in their environment, and how values and arguments survive the shells on the way.

DeepSpeed puts both into a line that pdsh gives to a shell on each host: values with special
characters and arguments with spaces between double quotes, nothing escaped.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from promoe_ds.errors import LaunchError
from promoe_ds.logs import get_logger

_LOG = get_logger("launch")

#: Variables of the launching shell that every rank gets; others go into .deepspeed_env.
_PASSED_ON = (
    "NCCL_",
    "GLOO_",
    "UCX_",
    "TORCH_NCCL_",
    "OMP_NUM_THREADS",
    "DS_ACCELERATOR",
    "PYTHONPATH",
    "MV2",
    "CUDA_",
    "LD_LIBRARY_PATH",
    "NVTE_",
    "PYTORCH_",
    "TORCHINDUCTOR_",
    "TRITON_",
)
#: What differs from host to host; DeepSpeed's launcher sets it on each.
_OF_THIS_HOST = {"CUDA_VISIBLE_DEVICES"}
#: DeepSpeed exports variables with these prefixes unescaped: they are hidden from it.
_EXPORTED_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL", "TORCH_NCCL")
#: What a shell expands between double quotes; where DeepSpeed does not escape the double quote
#: itself, `_escape` does.
_LIVE = re.compile(r"([\\$`])")
_FILE = ".deepspeed_env"


def job_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Collect what ranks get: passed-on variables, then ~/.deepspeed_env, then ./.deepspeed_env.

    Raises: LaunchError naming the variable or line that cannot be passed on.
    """
    values = {
        name: value
        for name, value in environ.items()
        if value and name.startswith(_PASSED_ON) and name not in _OF_THIS_HOST
    }
    for folder in (Path.home(), Path.cwd()):
        values |= _read(folder / _FILE)
    for name, value in values.items():
        _require_plain(f"environment variable {name}", value)
    return values


def runner_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of DeepSpeed's runner: without what it would pass on unescaped."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(_EXPORTED_BY_DEEPSPEED)
    }


def write_environment(path: Path, values: Mapping[str, str]) -> None:
    """Write the file that DeepSpeed's DS_ENV_FILE names, so that each value arrives as it is."""
    path.write_text(
        "".join(
            f"{name}={_escape(value).replace('%', '%%')}\n"
            for name, value in sorted(values.items())
        ),
        encoding="utf-8",
    )


def shell_arguments(arguments: Iterable[str]) -> list[str]:
    """Return arguments such that each survives DeepSpeed, pdsh and the host's shell.

    Raises: LaunchError for an argument that cannot be passed on.
    """
    result = []
    for argument in arguments:
        _require_plain("argument", argument)
        # With a space in it, DeepSpeed adds double quotes and escapes those inside.
        quoted = _LIVE.sub(r"\\\1", argument) if " " in argument else shlex.quote(argument)
        result.append(quoted.replace("%", "%%"))  # pdsh makes one of two, and replaces %h, %u, %n
    return result


def require_launchable(run_dir: Path) -> None:
    """Refuse a place from which DeepSpeed cannot start ranks on other hosts.

    Raises: LaunchError naming the path.
    """
    paths = {
        "the folder": str(Path.cwd()),
        "--run-dir": str(run_dir.absolute()),
        "the Python interpreter": sys.executable,
    }
    for what, path in paths.items():  # DeepSpeed puts them into a shell line unquoted
        if shlex.quote(path) != path:
            raise LaunchError(
                f"{what} {path!r} has characters that a shell expands: move it to a plain path"
            )
    if not deepspeed_command().exists():
        raise LaunchError(
            f"{deepspeed_command()} does not exist: install deepspeed into the environment of "
            f"{sys.executable}, or use the one where it is"
        )


def deepspeed_command() -> Path:
    """Return the launcher of DeepSpeed that belongs to this interpreter."""
    return Path(sys.executable).parent / "deepspeed"


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"{path}: cannot be read ({error})") from None
    values = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, separator, value = line.partition("=")
        if not separator or not (name.isascii() and name.strip().isidentifier()):
            raise LaunchError(f"{path}, line {number}: {line!r} is not of the form NAME=VALUE")
        values[name.strip()] = _unquoted(value.strip(), f"{path}, line {number}: {name.strip()}")
    return values


def _unquoted(value: str, where: str) -> str:
    """Return a value without the quotes around it, which DeepSpeed leaves to a shell."""
    if value[:1] not in ("'", '"'):
        return value
    if len(value) < 2 or value[-1] != value[0] or value[0] in value[1:-1]:
        raise LaunchError(
            f"{where}={value} begins with a quote but does not end with it: remove the quotes"
        )
    _LOG.info("%s: the quotes around the value are taken off", where)
    return value[1:-1]


def _escape(value: str) -> str:
    # DeepSpeed puts double quotes around a value with any special character, escapes included.
    return _LIVE.sub(r"\\\1", value).replace('"', '\\"')


def _require_plain(what: str, value: str) -> None:
    if any(ord(character) < 32 for character in value):
        raise LaunchError(f"{what} {value!r} holds a control character: it cannot reach the hosts")
