"""Superclass maps: the packaged one, files, and every mistake in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from promoe_ds.config import RunConfig, config_from_dict, load_config, read_superclasses

from ..builders import small_config
from .said import refuses

GOOD = "low: [0, 1, 2, 3, 4]\nhigh: [9, 8, 7, 6, 5]\n"


def config_of(name: object, experts: int = 2) -> RunConfig:
    return small_config(
        routing={"method": "classification", "superclass_map": str(name), "num_experts": experts}
    )


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "map.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_packaged_digits_have_four_superclasses_of_all_ten_classes() -> None:
    superclasses = read_superclasses(config_of("digits", experts=4))
    assert superclasses == (0, 1, 2, 2, 1, 2, 0, 1, 3, 3)


@pytest.mark.parametrize("names", [("low", "high"), ("7", "3")])
def test_map_of_a_file_follows_the_order_of_its_superclasses(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    text = GOOD.replace("low", names[0]).replace("high", names[1])
    assert read_superclasses(config_of(write(tmp_path, text))) == (0,) * 5 + (1,) * 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD.replace(", 5]", "]"), "class 5 is missing"),
        (GOOD.replace(", 3, 4]", "]").replace(", 5]", "]"), "class 3 is missing; class 4"),
        ("low: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\nhigh: []\n", "high has no class"),
        (GOOD.replace("5]", "5, 4]"), "class 4 is in two superclasses"),
        (GOOD.replace("5]", "5, 5]"), "class 5 is in two superclasses"),
        (GOOD.replace("5]", "5, 10]"), "class 10 is not of 0 ... 9"),
        (GOOD.replace("[0,", "[-1, 0,"), "class -1 is not of 0 ... 9"),
        (GOOD + "third: []\n", "3 superclasses, routing.num_experts=2"),
        ("all: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n", "1 superclasses, routing.num_experts=2"),
        ("", "lists of class numbers"),
        ("- [0, 1]\n- [2]\n", "lists of class numbers"),
        ("low: 3\nhigh: [4]\n", "lists of class numbers"),
        ("low: [0, true]\n", "lists of class numbers"),
        ("low: [0, 1.5]\n", "lists of class numbers"),
        ("low: [0, 1:30]\n", "lists of class numbers"),
        ("low: null\n", "lists of class numbers"),
        ("low: [0, 1", "no packaged map (digits)"),
        (b"caf\xe9: [0]", "no packaged map (digits)"),
        ("a: [1]\n\tb: [2]\n", "no packaged map (digits)"),
    ],
)
def test_map_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, text: str | bytes, said: str
) -> None:
    path = write(tmp_path, text)
    with refuses(f"routing.superclass_map={path}", said) as caught:
        read_superclasses(config_of(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_map", "nowhere/map.yaml", "."])
def test_map_that_is_no_file_is_refused(name: str) -> None:
    with refuses(f"routing.superclass_map={name} is no packaged map (digits)"):
        read_superclasses(config_of(name))


def test_map_is_read_when_a_recipe_is_loaded_and_kept_with_the_run(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    settings = ["routing.method=classification", f"routing.superclass_map={path}"]
    loaded = load_config("digits_promoe", [*settings, "routing.num_experts=2"])
    path.unlink()
    assert loaded.routing.superclasses == (0, 0, 0, 0, 0, 1, 1, 1, 1, 1)
    assert config_from_dict(loaded.model_dump(mode="json"), source="saved") == loaded
    write(tmp_path, GOOD)
    with refuses("2 superclasses, routing.num_experts="):
        load_config("digits_promoe", settings)
