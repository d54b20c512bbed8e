"""Names of fields and values that recipes, runs and exports of earlier versions have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: (section, old field) -> field.
FIELDS = {
    ("optimizer", "clip_norm"): "max_grad_norm",
    ("optimizer", "ema_power_lengths"): "ema_sigma_rels",
    ("parallel", "exchange_dtype"): "comm_dtype",
}
#: (section, field) -> {old value: value}.
VALUES = {
    ("parallel", "dispatch"): {"deepspeed": "alltoall", "deepspeed_capacity": "deepspeed_moe"}
}


def with_new_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return nested values under the names of today, and a line for each that had an old one.

    A field that is there under both names is left as it is, for the validation to refuse.
    """
    result, notes = dict(values), []
    for (section, old), new in FIELDS.items():
        fields = result.get(section)
        if isinstance(fields, Mapping) and old in fields and new not in fields:
            result[section] = {
                new if name == old else name: value for name, value in fields.items()
            }
            notes.append(f"{section}.{old} is now {section}.{new}")
    for (section, field), table in VALUES.items():
        fields = result.get(section)
        if (
            isinstance(fields, Mapping)
            and isinstance(value := fields.get(field), str)
            and value in table
        ):
            result[section] = {**fields, field: table[value]}
            notes.append(f"{section}.{field}={value} is now {table[value]}")
    return result, notes
