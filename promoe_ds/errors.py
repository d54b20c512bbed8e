"""The exceptions that a user may meet: each message says the value, the field and the remedy.

Their exit codes are listed in docs/reference/exit_codes.md; 1 is a defect (a traceback), 0 the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class PromoeError(Exception):
    """Base of every error that is reported to the user as one message, without a traceback."""

    exit_code = 1


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


class RoutingError(PromoeError):
    """A routing request that has no meaning, e.g. more choices than experts."""

    exit_code = 6


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

    exit_code = 75


#: What the structure of a damaged or foreign file may raise.
_MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
#: Longer values are cut in messages.
_LONGEST_VALUE = 60


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
        cause = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{what} ({type(error).__name__}: {cause})") from None


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
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
