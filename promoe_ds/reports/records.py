"""routing.jsonl: its lines, their fields, types and ranges (docs/reference/routing_stats.md).

`python -m promoe_ds.reports.records` prints the JSON Schema, which is
docs/reference/routing.schema.json.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field

from promoe_ds.errors import DataError

#: Versions that this package reads.
KNOWN_SCHEMAS = (1, 2)
#: The file in a run directory.
FILE_NAME = "routing.jsonl"
TABLES = ("tokens_per_class", "tokens_per_position")

#: What still fits the arrays, sums included.
Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Cosine = Annotated[float, Meta(ge=-1.0001, le=1.0001)] | None
NotNegative = Annotated[float, Meta(ge=0)] | None
Rows = Annotated[list[list[Count]], Meta(min_length=1)]


class Exchange(Struct, frozen=True):
    """Bytes over all ranks, and seconds, mean of ranks; None where nobody measures them."""

    bytes: Count | None = None
    seconds: NotNegative = None


class Exchanges(Struct, frozen=True):
    """The five exchanges of a pass, as moe.collectives names them."""

    counts: Exchange = field(default_factory=Exchange)
    dispatch: Exchange = field(default_factory=Exchange)
    combine: Exchange = field(default_factory=Exchange)
    combine_backward: Exchange = field(default_factory=Exchange)
    dispatch_backward: Exchange = field(default_factory=Exchange)


EXCHANGES = Exchanges.__struct_fields__


class Table(Struct, frozen=True):
    """Counts by row and expert, and how many steps they cover; columns: patches beside each other,
    where the image is not square.
    """

    counts: Rows
    steps: Count = 0
    columns: Positive | None = None


class LayerDetail(Struct, frozen=True):
    """What the line of bin 0 says of its whole layer."""

    ranks: Positive
    ep_size: Positive
    rank_max_over_mean: float | None
    exchanges: Exchanges
    prototype_to_centroid: list[Cosine]
    prototype_to_other_centroids: list[Cosine]
    passes: Count = 0
    tokens_per_ep_rank: list[Count] | None = None
    experts: list[Count] | None = None
    prototype_similarity_matrix: list[list[Cosine]] | None = None
    tokens_per_class: Table | None = None
    tokens_per_position: Table | None = None

    def check(self, experts: int) -> None:
        """Compare lengths with the number of experts.

        Raises: ValueError naming the field.
        """
        if experts % self.ep_size:
            raise ValueError(
                f"layer_detail.ep_size={self.ep_size} does not divide {experts} experts"
            )
        if self.experts is not None and sorted(self.experts) != list(range(experts)):
            raise ValueError(
                f"layer_detail.experts does not name each of the experts 0 ... {experts - 1} once"
            )
        matrix = self.prototype_similarity_matrix or [[None] * experts] * experts
        lists: dict[str, list[list[Any]]] = {
            "prototype_to_centroid": [self.prototype_to_centroid],
            "prototype_to_other_centroids": [self.prototype_to_other_centroids],
            # Rows of a matrix that has too few or too many of them do not fit either.
            "prototype_similarity_matrix": matrix if len(matrix) == experts else [[]],
            "tokens_per_class": self.tokens_per_class.counts if self.tokens_per_class else [],
            "tokens_per_position": (
                self.tokens_per_position.counts if self.tokens_per_position else []
            ),
        }
        for name, rows in lists.items():
            if any(len(row) != experts for row in rows):
                raise ValueError(
                    f"layer_detail.{name} has not one value for each of {experts} experts"
                )
        patches = len(lists["tokens_per_position"])
        columns = getattr(self.tokens_per_position, "columns", None)
        if patches % columns if columns else math.isqrt(patches) ** 2 != patches:
            shape = f"is no image of {columns} columns" if columns else "is no square image"
            raise ValueError(
                f"layer_detail.tokens_per_position has {patches} patches, which {shape}"
            )


class Line(Struct, frozen=True):
    """One layer and noise level of a log interval (schema 1: the fields without a default)."""

    step: Positive
    layer: Count
    tokens_per_expert: Annotated[list[Count], Meta(min_length=1)]
    conditional_tokens: Count
    unconditional_tokens: Count
    prototype_similarity: float | None
    layer_bytes_exchanged: Count
    schema: Annotated[int, Meta(ge=1, le=KNOWN_SCHEMAS[-1])] = 1
    steps: Count = 0
    timestep_bin: Count = 0
    timestep_bins: Annotated[int, Meta(ge=1, le=10_000)] = 1
    gate_sum_per_expert: list[float | None] | None = None
    gate_mean: float | None = None
    load_max_over_mean: float | None = None
    load_cv: float | None = None
    load_entropy: float | None = None
    dead_experts: Count | None = None
    layer_detail: LayerDetail | None = None

    def __post_init__(self) -> None:
        """Compare the fields with each other.

        Raises: ValueError naming the field.
        """
        experts = len(self.tokens_per_expert)
        if self.timestep_bin >= self.timestep_bins:
            raise ValueError(
                f"timestep_bin={self.timestep_bin} is not below timestep_bins={self.timestep_bins}"
            )
        if self.gate_sum_per_expert is not None and len(self.gate_sum_per_expert) != experts:
            raise ValueError(f"gate_sum_per_expert has not one value for each of {experts} experts")
        if self.layer_detail is not None:
            self.layer_detail.check(experts)


class Metrics(Struct, frozen=True):
    """What reports use of a line of metrics.jsonl."""

    step: int
    loss_diffusion: float | None = None
    images_per_second: float | None = None


class _Head(Struct):
    schema: int = 1


_DECODERS: dict[type[Any], msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (Line, Metrics, _Head)
}


def decode(text: bytes, kind: type[Any] = Line) -> Any:
    """Read a line.

    Raises: ValueError saying what is wrong with it; DataError if a newer version of this package
    wrote it.
    """
    try:
        return _DECODERS[kind].decode(text)
    except ValueError:
        # A newer version's fields may have other types.
        with suppress(ValueError):
            if (schema := _DECODERS[_Head].decode(text).schema) > KNOWN_SCHEMAS[-1]:
                raise DataError(
                    f"schema {schema} is not one of {', '.join(map(str, KNOWN_SCHEMAS))}: a newer"
                    " version of promoe_ds wrote the file, read it with that one"
                ) from None
        raise


def log_file(run_dir: Path) -> Path:
    """Return the file with a run's statistics: `run_dir` may also be the file itself.

    Raises: DataError if there is none.
    """
    path = run_dir if run_dir.suffix == ".jsonl" else run_dir / FILE_NAME
    if not path.is_file():
        there = f"the folder has no {FILE_NAME}" if run_dir.exists() else "there is no such folder"
        raise DataError(
            f"{run_dir}: no routing statistics there ({there}): name the --run-dir of "
            "a run with experts"
        )
    return path


def read_lines(
    path: Path, start: int = 0, kind: type[Any] = Line
) -> Iterator[tuple[int, int, Any, str]]:
    """Yield, for every line from byte `start` on, its number, the byte after it, and the line or
    what is wrong with it.

    A last line without its end has the byte at which it begins. If it is cut off, which an
    interruption or a running training causes, it is None without a problem.
    Raises: DataError if the file cannot be read, or naming a line of a newer version.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            end = start
            for number, text in enumerate(file, start=1):
                is_whole = text.endswith(b"\n")
                end += len(text) if is_whole else 0
                if not text.strip():
                    continue
                try:
                    yield number, end, decode(text, kind), ""
                except DataError as error:
                    raise DataError(f"{path}, line {number:,}: {error}") from None
                except ValueError as error:
                    is_cut = not is_whole and str(error).endswith("truncated")
                    yield number, end, None, "" if is_cut else str(error)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a line."""
    return msgspec.json.schema(Line)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=1) + "\n")
