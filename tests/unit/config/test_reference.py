"""What is printed about fields is what the schema says, and every field has a meaning."""

from __future__ import annotations

import pytest

from promoe_ds.config.loader import dotted_names
from promoe_ds.config.reference import field_lines, list_fields

from .said import refuses

FIELDS = {each.name: each for fields in list_fields().values() for each in fields}


def test_reference_lists_every_name_that_set_takes_with_a_meaning() -> None:
    assert sorted(FIELDS) == sorted(dotted_names())
    assert [name for name, each in FIELDS.items() if not each.meaning] == []


@pytest.mark.parametrize(
    ("name", "takes", "default"),
    [
        ("train.max_steps", "int > 0", "must be set"),
        ("routing.threshold_decay", "float >= 0 < 1", "0.95"),
        ("logging.tensorboard", "auto | true | false", "auto"),
        ("train.keep_every", "int > 0 | null", "null"),
        ("optimizer.betas", "[float >= 0 < 1, float >= 0 < 1]", "[0.9, 0.999]"),
        ("train.seed", "int >= 0 < 2^63", "0"),
        ("optimizer.ema_decays", "[float >= 0 < 1, ...]", "[0.9999]"),
        ("parallel.expert_order", "[[int, ...], ...] | null", "null"),
    ],
)
def test_reference_states_types_limits_and_defaults(name: str, takes: str, default: str) -> None:
    assert (FIELDS[name].takes, FIELDS[name].default) == (takes, default)


def test_reference_of_one_section_and_of_none() -> None:
    assert field_lines("sampling").startswith("sampling.steps  (int > 0; default 250)\n    of the")
    with refuses("--fields foo", "model, routing"):
        field_lines("foo")
