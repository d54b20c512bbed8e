"""Superclass maps: the packaged one, files, and every mistake in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from promoe_ds.config import RunConfig, config_from_dict, load_config, read_superclasses
from promoe_ds.errors import ConfigError

from ..builders import small_config

GOOD = "low: [0, 1, 2, 3, 4]\nhigh: [9, 8, 7, 6, 5]\n"


def config_of(name: Any, experts: int = 2) -> RunConfig:
    return small_config(
        routing={"method": "classification", "superclass_map": str(name), "num_experts": experts}
    )


def write(folder: Path, text: str) -> Path:
    path = folder / "map.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_packaged_digits_have_four_superclasses_of_all_ten_classes() -> None:
    superclasses = read_superclasses(config_of("digits", experts=4))
    assert superclasses == (0, 1, 2, 2, 1, 2, 0, 1, 3, 3)


def test_map_of_a_file_follows_the_order_of_its_superclasses(tmp_path: Path) -> None:
    assert read_superclasses(config_of(write(tmp_path, GOOD))) == (0, 0, 0, 0, 0, 1, 1, 1, 1, 1)


def test_map_superclass_names_may_be_numbers(tmp_path: Path) -> None:
    assert (
        read_superclasses(config_of(write(tmp_path, GOOD.replace("low", "7").replace("high", "3"))))
        == (0,) * 5 + (1,) * 5
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "low: [0, 1, 2, 3, 4]\nhigh: [9, 8, 7, 6]\n",
            "misses class 5: every class needs a superclass",
        ),
        (
            "low: [0, 1, 2]\nhigh: [9, 8, 7, 6]\n",
            "misses class 3 and 2 others: every class needs a superclass",
        ),
        (
            "low: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\nhigh: []\n",
            ": high has no class, its expert would learn nothing: give it one",
        ),
        (GOOD.replace("5]", "5, 4]"), ": class 4 stands in two superclasses, keep one"),
        (GOOD.replace("5]", "5, 5]"), ": class 5 stands in two superclasses, keep one"),
        (GOOD.replace("5]", "5, 10]"), ": high holds class 10, the model knows 0 ... 9"),
        (GOOD.replace("[0,", "[-1, 0,"), ": low holds class -1, the model knows 0 ... 9"),
        (
            GOOD + "third: []\n",
            (
                " has 3 superclasses, routing.num_experts=2: one expert serves one superclass, make"
                " them equal"
            ),
        ),
        (
            "all: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n",
            " has 1 superclasses, routing.num_experts=2: one expert serves one superclass",
        ),
    ],
)
def test_map_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(
        ConfigError, match=re.escape(f"routing.superclass_map={path}") + ".*" + re.escape(message)
    ):
        read_superclasses(config_of(path))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- [0, 1]\n- [2]\n",
        "just words",
        "low: 3\nhigh: [4]\n",
        "low: [0, true]\n",
        "low: [0, 1.5]\n",
        "low: [0, 1:30]\n",
        "low: {a: 1}\n",
        "low: null\n",
    ],
)
def test_map_that_is_no_mapping_to_lists_of_numbers_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(
        ConfigError,
        match=re.escape(
            f"routing.superclass_map={path}: expected superclass names with lists of class numbers,"
            " e.g. animals: [0, 1, 5]"
        ),
    ):
        read_superclasses(config_of(path))


@pytest.mark.parametrize(
    "damage",
    [b"low: [0, 1", b"caf\xe9: [0]", b"a: [1]\n\tb: [2]\n"],
    ids=["brackets", "encoding", "tab"],
)
def test_map_that_is_no_yaml_is_refused_in_one_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "map.yaml"
    path.write_bytes(damage)
    with pytest.raises(
        ConfigError, match=re.escape(f"{path} is no packaged map (digits) and cannot be read")
    ) as caught:
        read_superclasses(config_of(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_map", "nowhere/map.yaml", "."])
def test_map_that_is_no_file_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"routing.superclass_map={name} is no packaged map (digits)")
    ):
        read_superclasses(config_of(name))


def test_map_is_checked_when_a_recipe_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    settings = ["routing.method=classification", f"routing.superclass_map={path}"]
    loaded = load_config("digits_promoe", [*settings, "routing.num_experts=2"])
    # What the file said is part of the run: editing it later changes nothing.
    assert loaded.routing.superclasses == (0, 0, 0, 0, 0, 1, 1, 1, 1, 1)
    assert config_from_dict(loaded.model_dump(mode="json"), source="saved") == loaded
    with pytest.raises(ConfigError, match=r"has 2 superclasses, routing\.num_experts="):
        load_config("digits_promoe", settings)


def test_map_gone_does_not_keep_a_saved_config_from_being_read() -> None:
    """Sampling and conversion need no map: only a recipe for training is checked."""
    assert config_of("/gone/map.yaml").routing.superclass_map == "/gone/map.yaml"
