"""The lines of a run's routing.jsonl: read whole or as they grow, of every schema version; damage is told, never guessed at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from promoe_ds.analysis.expert_load.valid import problem_of, unknown_schema
from promoe_ds.errors import DataError

FILE_NAME = "routing.jsonl"


class UnknownSchemaError(DataError):
    """A line that a younger package wrote: nothing can be said of the file."""

    def __init__(self, path: Path, number: int, problem: str) -> None:
        """Name the file and the line."""
        super().__init__(f"{path}, line {number:,}: {problem}")
        self.number, self.problem = number, problem


def log_file(run_dir: Path) -> Path:
    """Return the file that holds a run's statistics: `run_dir` may also be the file itself.

    Raises: DataError if there is none.
    """
    path = run_dir if run_dir.suffix == ".jsonl" else run_dir / FILE_NAME
    if not path.is_file():
        there = "there is no such folder" if not run_dir.exists() else f"the folder holds no {FILE_NAME}"
        raise DataError(f"{run_dir}: no routing statistics there ({there}): name the --run-dir of a run with experts")
    return path


def read_routing_log(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's routing.jsonl; a last line cut off by an interruption is left out.

    Raises: DataError naming the file, and the line that is no routing record.
    """
    path = log_file(run_dir)

    def _refuse(number: int, problem: str) -> None:
        raise DataError(f"{path}, line {number}: {problem}")

    records = [record for _, record in iterate_records(path, refuse=_refuse)]
    if not records:
        raise DataError(f"{path} is empty: the run has no MoE layer or did not reach its first log step")
    return records


def iterate_records(path: Path, *, refuse: Callable[[int, str], None], start: int = 0, stop: int | None = None,
                    tell: Callable[[int, int], None] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, record) of what can be a record.

    Args:
        refuse: told the number and problem of a line that is no record, which is then left out; may raise. A last line without
            its end that cannot be read is an interruption's, or still being written, and no problem.
        start, stop: bytes; lines that begin in between are read.
        tell: given, at the end, the byte after the last whole line and the number of lines.
    Raises: DataError if the file cannot be read; UnknownSchemaError, whose line counts from `start`, if a younger package wrote it.
    """
    decode = json.JSONDecoder().decode
    try:
        with path.open("rb") as file:
            file.seek(start)
            position, number = start, 0
            for line in file:
                if stop is not None and position >= stop:
                    break
                number += 1
                whole = line.endswith(b"\n")
                position += len(line) if whole else 0
                try:
                    record = decode(line.decode())
                except ValueError:
                    if whole and line.strip():
                        refuse(number, "not JSON")
                    continue
                if problem := unknown_schema(record):
                    raise UnknownSchemaError(path, number, problem)
                if problem := problem_of(record):
                    refuse(number, problem)
                else:
                    yield number, record
            if tell is not None:
                tell(position, number)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
