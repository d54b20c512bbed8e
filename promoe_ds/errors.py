"""The exceptions that a user may meet: each message says the value, the field and the remedy.

Their exit codes are listed in docs/reference/exit_codes.md; 1 is a defect (a traceback), 0 the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class PromoeError(Exception):
    """Base of every error that is reported to the user as one message, `KIND: MESSAGE`, without a
    traceback.
    """

    exit_code, kind = 1, "error"


class ConfigError(PromoeError):
    """A recipe, an override or a DeepSpeed JSON that cannot describe a run."""

    exit_code = 2


class DataError(PromoeError):
    """Data that is missing, malformed or does not fit the recipe."""

    exit_code = 3


class CheckpointError(PromoeError):
    """A checkpoint or export that is missing, damaged, foreign, or could not be written."""

    exit_code = 4


class TrainingError(PromoeError):
    """Training cannot continue, e.g. too many non-finite steps in a row."""

    exit_code = 5


class PeerError(PromoeError):
    """Other ranks are gone or do not answer."""

    exit_code = 7


class StalledError(PromoeError):
    """A phase took longer than its time-out: the watchdog ended this rank."""

    exit_code = 8


class OrphanedError(PromoeError):
    """The launcher is gone: nobody watches this rank any more."""

    exit_code = 9


class LaunchError(PromoeError):
    """A job that cannot be started on these hosts, or not again."""

    exit_code = 10


class Preempted(PromoeError):  # noqa: N818  # no error: the job ended as requested
    """The job was asked to stop, finished its step, saved and ended; it can be started again."""

    exit_code, kind = 75, "stopped"


class Interrupted(PromoeError):  # noqa: N818  # as above
    """The user interrupted a command (Ctrl-C), training a second time."""

    exit_code, kind = 130, "interrupted"


#: What the structure of a damaged or foreign file may raise.
_MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
#: Longer values are cut in messages.
_LONGEST_VALUE, _LONGEST_CAUSE = 60, 200
#: What torch puts before the cause, where it refuses to execute what a file asks for.
_TORCH_CAUSE = "WeightsUnpickler error: "


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Make a CheckpointError, `WHAT (KIND: CAUSE)`, of what a file that is not as expected raises.

    A ConfigError of its config says all by itself.
    """
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except (OSError, *_MISFITS) as error:
        raise CheckpointError(f"{what} ({cause_of(error)})") from None


def cause_of(error: BaseException) -> str:
    """Return what a library complains of, `KIND: its first line`, for the middle of a message.

    torch's first lines about a file advise to execute what the file says: they are left out.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    rest = [line.partition(_TORCH_CAUSE)[2] for line in lines if _TORCH_CAUSE in line]
    text = _cut((rest or lines or [""])[0], _LONGEST_CAUSE)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def first_few(problems: Sequence[str], shown: int = 5) -> str:
    """Return the first problems of a list in one line, and how many more there are."""
    more = f" and {len(problems) - shown} more" if len(problems) > shown else ""
    return "; ".join(problems[:shown]) + more


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return `NAME is SAVED there and CURRENT here` for each current setting that differs."""
    return [
        f"{name} is {_short(saved.get(name))} there and {_short(value)} here"
        for name, value in current.items()
        if saved.get(name) != value
    ]


def _short(value: Any) -> str:
    return _cut(repr(value), _LONGEST_VALUE)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
