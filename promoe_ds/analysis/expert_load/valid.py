"""What a line of routing.jsonl must be, for every reader: types, lengths and ranges, before any of its values is taken."""

from __future__ import annotations

import math
from typing import Any

#: Versions that the readers understand; what a younger one may mean is not known.
KNOWN_SCHEMAS = (1, 2)
#: What every version has.
FIELDS_IN_ORDER = ("step", "layer", "tokens_per_expert", "conditional_tokens", "unconditional_tokens", "prototype_similarity",
                   "layer_bytes_exchanged")
FIELDS = frozenset(FIELDS_IN_ORDER)
#: Whole numbers of a line and the least that each may be, which also stands for one that a version lacks.
_COUNTS = (("step", 1), ("steps", 0), ("layer", 0), ("timestep_bins", 1), ("timestep_bin", 0), ("conditional_tokens", 0),
           ("unconditional_tokens", 0), ("layer_bytes_exchanged", 0))
#: What still fits the arrays, sums included.
_LARGEST = 2**53
_MOST_BINS = 10_000
_NUMBERS = frozenset({int, float, type(None)})
_INTEGERS = frozenset({int})
_DETAILS = ("ranks", "ep_size", "rank_max_over_mean", "exchanges", "prototype_to_centroid", "prototype_to_other_centroids")
_SHOWN = 60


def problem_of(record: Any) -> str:
    """Say what is wrong with a line: "" if nothing is. A schema of its own is asked for first, by `unknown_schema`."""
    if not isinstance(record, dict):
        return "is no JSON object"
    if not FIELDS <= record.keys():
        return f"{next(field for field in FIELDS_IN_ORDER if field not in record)} is missing"
    for name, least in _COUNTS:
        value = record.get(name, least)
        if type(value) is not int or not least <= value <= _LARGEST:
            return f"{name}={_short(value)} is no whole number from {least} on"
    bin_, bins = record.get("timestep_bin", 0), record.get("timestep_bins", 1)
    if not bin_ < bins <= _MOST_BINS:
        return f"timestep_bin={bin_} of timestep_bins={bins}: the bin must be less, and the bins at most {_MOST_BINS:,}"
    tokens = record["tokens_per_expert"]
    if not tokens or not _are_counts(tokens):
        return f"tokens_per_expert={_short(tokens)} is no list of counts"
    for name in ("prototype_similarity", "gate_mean"):
        if not _is_number(record.get(name)):
            return f"{name}={_short(record[name])} is no number"
    gates = record.get("gate_sum_per_expert")
    if gates is not None and not _are_numbers(gates, len(tokens)):
        return f"gate_sum_per_expert={_short(gates)} is no list of a number for each of its {len(tokens)} experts"
    detail = record.get("layer_detail")
    return "" if detail is None else _problem_of_detail(detail, len(tokens))


def unknown_schema(record: Any) -> str:
    """Say which schema a record has that this package does not know; "" otherwise."""
    schema = record.get("schema", 1) if isinstance(record, dict) else 1
    if type(schema) is int and schema in KNOWN_SCHEMAS:
        return ""
    return (f"schema {_short(schema)} is not one of {', '.join(map(str, KNOWN_SCHEMAS))}: a younger promoe_ds wrote it, read it "
            "with that version")


def _problem_of_detail(detail: Any, experts: int) -> str:
    if not isinstance(detail, dict):
        return f"layer_detail={_short(detail)} is no JSON object"
    if missing := [name for name in _DETAILS if name not in detail]:
        return f"layer_detail.{missing[0]} is missing"
    ep_size, ranks = detail["ep_size"], detail["ranks"]
    if type(ep_size) is not int or ep_size < 1 or experts % ep_size:
        return f"layer_detail.ep_size={_short(ep_size)} does not divide its {experts} experts"
    if type(ranks) is not int or not 1 <= ranks <= _LARGEST:
        return f"layer_detail.ranks={_short(ranks)} is no whole number from 1 on"
    if not _is_number(detail["rank_max_over_mean"]):
        return f"layer_detail.rank_max_over_mean={_short(detail['rank_max_over_mean'])} is no number"
    for name in ("prototype_to_centroid", "prototype_to_other_centroids"):
        if not _are_numbers(detail[name], experts):
            return f"layer_detail.{name}={_short(detail[name])} is no list of a number for each of its {experts} experts"
    order = detail.get("experts")
    if order is not None and not (_are_counts(order) and sorted(order) == list(range(experts))):
        return f"layer_detail.experts={_short(order)} does not name each of the experts 0 ... {experts - 1} once"
    matrix = detail.get("prototype_similarity_matrix")
    if matrix is not None and not (type(matrix) is list and len(matrix) == experts
                                   and all(_are_numbers(row, experts) for row in matrix)):
        return f"layer_detail.prototype_similarity_matrix={_short(matrix)} is no table of {experts} by {experts} numbers"
    return _problem_of_exchanges(detail["exchanges"]) or _problem_of_tables(detail, experts)


def _problem_of_exchanges(exchanges: Any) -> str:
    if not isinstance(exchanges, dict) or not all(isinstance(each, dict) for each in exchanges.values()):
        return f"layer_detail.exchanges={_short(exchanges)} is no JSON object of objects"
    for name, each in exchanges.items():
        seconds = each.get("seconds")
        if not _is_number(seconds) or (seconds is not None and not seconds >= 0):
            return f"layer_detail.exchanges.{name}.seconds={_short(seconds)} is no time"
    return ""


def _problem_of_tables(detail: dict[str, Any], experts: int) -> str:
    for name in ("tokens_per_class", "tokens_per_position"):
        table = detail.get(name)
        if table is None:
            continue
        rows = table.get("counts") if isinstance(table, dict) else None
        if type(rows) is not list or not rows or not all(_are_counts(row) and len(row) == experts for row in rows):
            return f"layer_detail.{name}={_short(table)} has no counts by row for each of its {experts} experts"
        if name == "tokens_per_position" and math.isqrt(len(rows)) ** 2 != len(rows):
            return f"layer_detail.{name} has {len(rows)} patches, which are no square image"
    return ""


def _are_counts(values: Any) -> bool:
    return type(values) is list and (not values or (_INTEGERS.issuperset(map(type, values)) and min(values) >= 0
                                                    and max(values) <= _LARGEST))


def _are_numbers(values: Any, count: int) -> bool:
    if type(values) is not list or len(values) != count:
        return False
    kinds = set(map(type, values))
    # Only integers can be too large for a float.
    return kinds <= _NUMBERS and (int not in kinds or all(map(_is_number, values)))


def _is_number(value: Any) -> bool:
    return type(value) in _NUMBERS and (type(value) is not int or abs(value) <= _LARGEST)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"
