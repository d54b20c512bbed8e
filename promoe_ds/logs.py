"""Rank-aware logging: rank 0 speaks, the other ranks only warn."""

from __future__ import annotations

import logging
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

_ROOT = "promoe_ds"
#: How often a long job says how far it is.
_EVERY_SECONDS = 10.0
#: What launchers call a process's rank; RANK is what `complete_environment` makes of the others.
_RANKS = (
    "RANK",
    "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_RANK",
    "MVP_COMM_WORLD_RANK",
    "PMI_RANK",
    "PMIX_RANK",
    "SLURM_PROCID",
)


class _LogFile(logging.FileHandler):
    """Where it cannot be written, as on a full disk, it ends with one line instead of a traceback a
    message.
    """

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger(_ROOT).removeHandler(self)
        logging.getLogger(_ROOT).warning(
            "%s cannot be written any more (%s)", self.baseFilename, sys.exc_info()[1]
        )


def rank_from_environment() -> int:
    """Return this process's global rank as its launcher states it, 0 where there is none."""
    for name in _RANKS:
        if (value := os.environ.get(name, "")).isdecimal() and len(value) < 12:
            return int(value)
    return 0


def get_logger(name: str) -> logging.Logger:
    """Return the child of that name of the package's logger."""
    return logging.getLogger(f"{_ROOT}.{name}")


def configure_logging(rank: int, *, log_file: Path | None = None) -> None:
    """Send this rank's messages to stderr and, on rank 0, also to a file.

    Args:
        rank: global rank; rank 0 shows INFO and above, the others WARNING and above.
        log_file: appended to by rank 0 only; its folder must exist.
    Raises: OSError if the file cannot be opened.
    """
    logger = logging.getLogger(_ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    prefix = "" if rank == 0 else f"[rank {rank}] "
    formatter = logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file is not None and rank == 0:
        handlers.append(_LogFile(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)


def duration(seconds: float) -> str:
    """Return a time as h:mm:ss, with the days before it where there are any."""
    return str(timedelta(seconds=round(seconds)))


class Progress:
    """Logs on rank 0 how far a long job is, now and then: amount, speed and the time that is
    left.
    """

    def __init__(self, logger: logging.Logger, total: float, unit: str) -> None:
        """Start the clock. Amounts are `unit`s; whole numbers are shown as such."""
        self._logger, self._total, self._unit = logger, total, unit
        self._done: float = 0
        self._start = self._last = time.monotonic()

    def add(self, amount: float, note: str = "") -> None:
        """Count what was done; `note` ends the line."""
        self._done = min(self._done + amount, self._total)
        now = time.monotonic()
        if now - self._last < _EVERY_SECONDS or not self._done:
            return
        self._last, speed = now, self._done / (now - self._start)
        digits = 0 if isinstance(self._total, int) else 1
        self._logger.info(
            "%.*f/%.*f %s  %.3g %s/s  %s left%s",
            digits,
            self._done,
            digits,
            self._total,
            self._unit,
            speed,
            self._unit,
            duration((self._total - self._done) / speed),
            f"  {note}" if note else "",
        )
