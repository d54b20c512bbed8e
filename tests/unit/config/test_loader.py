"""From a recipe's name, its base and `--set` overrides to a config, and what is said about
mistakes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promoe_ds.config import config_from_dict, list_recipes, load_config
from promoe_ds.config.loader import dotted_names, read_saved, saved_text
from promoe_ds.errors import ConfigError

from ..builders import packaged_config, small_values
from .said import refuses

RECIPE = "digits_promoe"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_packaged_loads_under_its_own_name(name: str, tmp_path: Path) -> None:
    assert packaged_config(name, tmp_path).name == name


def test_recipe_that_needs_a_map_says_so() -> None:
    with refuses("classification_b", "method=classification", "superclass_map"):
        load_config("classification_b")


def test_config_import_brings_no_torch() -> None:
    code = "import sys, promoe_ds.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Names.


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("routing.num_exprts", "did you mean routing.num_experts?"),
        ("model.hiden_size", "did you mean model.hidden_size?"),
        ("train.max_step", "did you mean train.max_steps?"),
        ("optimizer.warmup", "did you mean optimizer.warmup_steps?"),
        ("model.num_experts", "did you mean routing.num_experts?"),
        ("train.lr", "did you mean optimizer.lr?"),
        ("routing.ep_size", "did you mean parallel.ep_size?"),
        ("diffusion.steps", "did you mean sampling.steps?"),
        ("num_experts", "did you mean routing.num_experts?"),
        ("qqqq.zzzzzz", "promoe-train --fields"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    section, _, field = name.rpartition(".")
    values = small_values(**{section: {field: 1}}) if section else {**small_values(), field: 1}
    with refuses(f"recipe: {section or name}", nearest):
        config_from_dict(values, source="recipe")
    with refuses(f"--set {name}: no such field", nearest):
        load_config(RECIPE, [f"{name}=4"])


def test_several_problems_are_all_reported() -> None:
    values = small_values(
        model={"depth": 0}, routing={"rcl_scope": "world"}, train={"foo_bar_baz": 1}
    )
    with refuses("\n  model.depth=0", "\n  routing.rcl_scope=world", "; train.foo_bar_baz"):
        config_from_dict(values, source="recipe")


@pytest.mark.parametrize("name", ["model", "train", "train.max_steps"])
def test_name_that_is_missing_must_be_set(name: str) -> None:
    values = small_values()
    *section, field = name.split(".")
    del (values[section[0]] if section else values)[field]
    with refuses(f"recipe: {name}: must be set"):
        config_from_dict(values, source="recipe")


def test_section_without_values_is_refused() -> None:
    with refuses("routing=None: must be a mapping"):
        config_from_dict({**small_values(), "routing": None}, source="recipe")


# --set, and the same values in a recipe.


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=5E-4", 5e-4),
        ("optimizer.lr=1", 1.0),
        ("train.stop_after_steps=null", None),
        ("train.stop_after_steps=", None),
        ("train.stop_after_steps=7", 7),
        ("optimizer.betas=[0.8,9.5e-1]", (0.8, 0.95)),
        ("model.qk_norm=True", True),
        ("model.qk_norm=false", False),
        ("model.qk_norm=on", True),
        ("model.learn_sigma=yes", True),
        ("routing.rcl_scope=rank", "rank"),
        ("train.max_steps=0100", 100),
        ("train.max_steps=1_000", 1000),
        ("evaluation.reference=007", "007"),
        ("evaluation.reference=2024-01-01", "2024-01-01"),
        ("evaluation.reference=1:30", "1:30"),
        ("evaluation.reference=on", "on"),
        ("evaluation.reference=1e-4", "1e-4"),
        ("evaluation.reference=0x10", "0x10"),
        ("evaluation.reference=/data/a=b", "/data/a=b"),
        ("evaluation.reference=null", None),
        ("evaluation.reference='null'", "null"),
        ("name=2024", "2024"),
        ("logging.wandb_project=true", "true"),
        ("logging.tensorboard=auto", "auto"),
        # YAML 1.1 reads a bare `on` or `off` as a boolean.
        ("logging.tensorboard=on", True),
        ("logging.tensorboard=off", False),
        ("logging.tensorboard=true", True),
    ],
)
def test_value_means_what_its_fields_type_says_after_set_and_in_a_recipe(
    tmp_path: Path, override: str, value: object
) -> None:
    name, _, text = override.partition("=")
    section, _, field = name.rpartition(".")
    line = f"{section}:\n  {field}: {text}\n" if section else f"{field}: {text}\n"
    path = write(tmp_path, "r.yaml", f"base: digits_promoe\n{line}")
    for config in (load_config(RECIPE, [override]), load_config(path)):
        found = getattr(getattr(config, section) if section else config, field)
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "override",
    [
        "train.max_steps=1:30",
        "train.max_steps=true",
        "train.max_steps=many",
        "train.max_steps=1.5",
        "train.max_steps=0x10",
        "optimizer.lr=1:30",
        "optimizer.lr=0",
        "optimizer.lr=inf",
        "optimizer.lr=on",
        "model.qk_norm=2",
        "logging.tensorboard=maybe",
    ],
)
def test_value_of_another_type_is_refused_by_name_and_value(override: str) -> None:
    with refuses(f"{override}: "):
        load_config(RECIPE, [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.max_steps", "--set train.max_steps: expected section.field=value"),
        ("=3", "--set =3: expected section.field=value"),
        ("model={depth: 2}", "--set model: no such field"),
        ("train.max_steps=[", "--set train.max_steps=[: the value is not valid YAML"),
        ("train.seed=!!int x", "train.seed"),
        ("evaluation.reference=*a", "evaluation.reference"),
        ("evaluation.reference=!!timestamp 2024-99-01", "evaluation.reference"),
        ("optimizer.betas=[0.9, on]", "optimizer.betas.1=on"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: must be set"),
    ],
)
def test_set_mistake_is_explained(override: str, said: str) -> None:
    with refuses(said):
        load_config(RECIPE, [override])


ODD = ["on", "0o17", "010", "[1, a]", "{a: 1}", "~", "&a [*a]", "- 1", "<<", "=", "!!binary x"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(dotted_names()),
    text=st.one_of(
        st.text(max_size=6),
        st.integers().map(str),
        st.floats().map(str),
        st.dates().map(str),
        st.times().map(str),
        st.sampled_from(ODD),
    ),
)
def test_set_any_text_is_of_the_fields_type_or_refused(name: str, text: str) -> None:
    try:
        config = load_config(RECIPE, [f"{name}={text}"])
    except ConfigError:
        return
    assert config_from_dict(config.model_dump(mode="json"), source="saved") == config


def test_set_changes_its_field_alone_and_the_last_one_wins() -> None:
    changed = load_config(RECIPE, ["train.seed=1", "train.seed=5"]).model_dump()
    plain = load_config(RECIPE).model_dump()
    assert changed == {**plain, "train": {**plain["train"], "seed": 5}}


# Files and bases.


def test_saved_config_is_read_again_and_a_newer_one_says_so(tmp_path: Path) -> None:
    settings = ["name=2024", "evaluation.reference=007", "logging.tensorboard=off"]
    config = load_config(RECIPE, settings)
    path = write(tmp_path, "config.yaml", saved_text(config))
    assert read_saved(path) == config
    first, _, rest = path.read_text().partition("\n")
    write(tmp_path, "config.yaml", f"# promoe_ds 99.0\nfuture: 1\n{rest}")
    with refuses("config.yaml was written by promoe_ds 99.0"):
        read_saved(path)
    write(tmp_path, "config.yaml", f"{first}\nfuture: 1\n{rest}")
    with refuses("config.yaml: future: no such field"):
        read_saved(path)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("promoe_bb", "--recipe promoe_bb: no packaged recipe of that name; did you mean promoe_"),
        ("nowhere/x.yaml", "--recipe nowhere/x.yaml: "),
    ],
)
def test_recipe_that_is_not_there_is_named(recipe: str, said: str) -> None:
    with refuses(said):
        load_config(recipe)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: [1, 2", "is not valid YAML"),
        ("- a\n- b\n", "must be a mapping of sections, found list"),
        ("", "must be a mapping of sections, found NoneType"),
        ("train: {seed: 1, seed: 2}\n", "the key seed is given twice"),
        ("model: {}\nmodel: {}\n", "the key model is given twice"),
        ("[" * 600, "is not valid YAML"),
        ("a: !!int x\n", "is not valid YAML"),
        ("a: &x [*x]\n", "a: no such field"),
        ("a: !!map x\n", "is not valid YAML"),
        (b"name: caf\xe9", "is not valid YAML"),
        ("base: recipe.yaml\n", "the recipe is its own base"),
        ("base: no_such_recipe_at_all\n", "no_such_recipe_at_all: no packaged recipe"),
    ],
)
def test_recipe_file_unusable_is_named(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with refuses("recipe", said):
        load_config(path)


def test_recipe_takes_a_byte_order_mark_and_the_name_of_its_file(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "mine.yaml", "\ufeffbase: digits_promoe\n")).name == "mine"
    path = write(tmp_path, "mine.yaml", "base: digits_promoe\nname: stated\n")
    assert load_config(path).name == "stated"


def test_base_values_are_inherited_and_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.yaml", "base: digits_promoe\nrouting:\n  top_k: 2\nname: mine\n")
    mine, base = load_config(path).model_dump(), load_config(RECIPE).model_dump()
    assert mine == {**base, "name": "mine", "routing": {**base["routing"], "top_k": 2}}


def test_base_of_a_base_beside_the_file_is_found_and_a_circle_refused(tmp_path: Path) -> None:
    grand: dict[str, Any] = {"base": "digits_promoe", "train": {"seed": 1, "log_every": 7}}
    write(tmp_path, "grand.yaml", str(grand))
    write(tmp_path, "parent.yaml", "base: grand.yaml\ntrain:\n  seed: 2\n")
    path = write(tmp_path, "child.yaml", "base: parent.yaml\n")
    train = load_config(path).train
    assert (train.seed, train.log_every) == (2, 7)
    write(tmp_path, "grand.yaml", "base: child.yaml\n")
    with refuses("the recipe is its own base"):
        load_config(path)
