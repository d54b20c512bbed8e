"""From a recipe's name, its base and `--set` overrides to a config, and what is said about
mistakes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from promoe_ds.config import config_from_dict, list_recipes, load_config
from promoe_ds.config.loader import dotted_names, nearest_name, read_saved, saved_text
from promoe_ds.errors import ConfigError

from ..builders import packaged_config, small_config, small_values

RECIPE = "digits_promoe"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_packaged_loads_under_its_own_name(name: str, tmp_path: Path) -> None:
    assert packaged_config(name, tmp_path).name == name


def test_recipe_that_needs_a_map_says_so() -> None:
    with pytest.raises(
        ConfigError, match=r"classification_b.*method=classification needs superclass_map"
    ):
        load_config("classification_b")


def test_recipes_packaged_include_every_size_of_the_paper() -> None:
    assert {
        f"{method}_{size}" for method in ("dit", "promoe") for size in ("s", "b", "l", "xl")
    } <= set(list_recipes())


def test_config_saved_and_read_again_is_the_same() -> None:
    config = load_config("promoe_xl")
    assert config_from_dict(config.model_dump(mode="json"), source="saved") == config


def test_config_is_frozen_in_every_section() -> None:
    config = small_config()
    assert config.model_config["frozen"]
    assert all(
        section.model_config["frozen"] for _, section in config if isinstance(section, BaseModel)
    )


def test_config_import_brings_no_torch() -> None:
    code = "import sys, promoe_ds.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Unknown names.


@pytest.mark.parametrize(
    ("section", "field", "nearest"),
    [
        ("routing", "num_exprts", "routing.num_experts"),
        ("model", "hiden_size", "model.hidden_size"),
        ("train", "max_step", "train.max_steps"),
        ("optimizer", "warmup", "optimizer.warmup_steps"),
    ],
)
def test_loader_unknown_key_names_path_and_nearest(section: str, field: str, nearest: str) -> None:
    values = small_values(**{section: {field: 1}})
    with pytest.raises(
        ConfigError,
        match=rf"^recipe: {section}\.{field}: no such field; did you mean {re.escape(nearest)}\?$",
    ):
        config_from_dict(values, source="recipe")


def test_loader_unknown_section_nothing_like_any_is_named_with_where_all_are_listed() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^recipe: zzzz: no such field; `python -m promoe_ds.cli.train --fields` lists all$",
    ):
        config_from_dict({**small_values(), "zzzz": {"qqqq": 1}}, source="recipe")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("model.num_experts", "routing.num_experts"),
        ("train.lr", "optimizer.lr"),
        ("routing.ep_size", "parallel.ep_size"),
    ],
)
def test_loader_field_in_wrong_section_names_the_right_one(wrong: str, right: str) -> None:
    section, field = wrong.split(".")
    with pytest.raises(
        ConfigError, match=re.escape(f"{wrong}: no such field; did you mean {right}?")
    ):
        config_from_dict(small_values(**{section: {field: 4}}), source="recipe")


def test_loader_field_at_the_top_names_its_section() -> None:
    with pytest.raises(
        ConfigError, match=r"num_experts: no such field; did you mean routing\.num_experts\?"
    ):
        config_from_dict({**small_values(), "num_experts": 4}, source="recipe")


def test_nearest_name_nothing_alike_is_none() -> None:
    assert nearest_name("qqqq.zzzzzz") is None


def test_nearest_name_field_in_two_sections_prefers_one_that_exists() -> None:
    assert nearest_name("diffusion.steps") == "sampling.steps"


def test_loader_several_problems_are_all_told() -> None:
    values = small_values(
        model={"depth": 0}, routing={"rcl_scope": "world"}, train={"foo_bar_baz": 1}
    )
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values, source="my recipe")
    lines = str(caught.value).splitlines()
    assert lines[0] == "my recipe does not describe a run:"
    assert [line.strip().split("=")[0].split(":")[0] for line in lines[1:]] == [
        "model.depth",
        "routing.rcl_scope",
        "train.foo_bar_baz",
    ]


@pytest.mark.parametrize("section", ["model", "train"])
def test_loader_missing_section_says_must_be_set(section: str) -> None:
    values = small_values()
    del values[section]
    with pytest.raises(ConfigError, match=rf"^recipe: {section}: must be set$"):
        config_from_dict(values, source="recipe")


def test_loader_missing_field_says_must_be_set() -> None:
    values = small_values()
    del values["train"]["max_steps"]
    with pytest.raises(ConfigError, match=r"^recipe: train\.max_steps: must be set$"):
        config_from_dict(values, source="recipe")


def test_loader_section_without_values_is_refused() -> None:
    with pytest.raises(ConfigError, match="routing=None: input should be a valid dictionary"):
        config_from_dict({**small_values(), "routing": None}, source="recipe")


# --set.


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=1.5e-3", 1.5e-3),
        ("optimizer.lr=1", 1.0),
        ("train.stop_after_steps=null", None),
        ("train.stop_after_steps=", None),
        ("train.stop_after_steps=7", 7),
        ("optimizer.betas=[0.8, 0.95]", (0.8, 0.95)),
        ("optimizer.betas=[0.8,9.5e-1]", (0.8, 0.95)),
        ("model.qk_norm=true", True),
        ("model.qk_norm=false", False),
        ("model.qk_norm=True", True),
        ("model.learn_sigma=yes", True),
        ("routing.rcl_scope=rank", "rank"),
        ("routing.expert_width=24", 24),
        ("name=other", "other"),
        ("train.seed=0", 0),
    ],
)
def test_set_value_is_read_as_yaml(override: str, value: object) -> None:
    config = load_config(RECIPE, [override])
    target: object = config
    for part in override.partition("=")[0].split("."):
        target = getattr(target, part)
    assert target == value
    assert type(target) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", "auto"), ("on", True), ("off", False), ("true", True), ("false", False)],
)
def test_set_tensorboard_takes_auto_on_and_off(text: str, value: object) -> None:
    # YAML 1.1 reads a bare `on` or `off` as a boolean.
    assert load_config(RECIPE, [f"logging.tensorboard={text}"]).logging.tensorboard is value


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.max_steps=0100", 100),
        ("train.max_steps=007", 7),
        ("train.max_steps=1_000", 1000),
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=5E-4", 5e-4),
        ("evaluation.reference=007", "007"),
        ("evaluation.reference=2024-01-01", "2024-01-01"),
        ("evaluation.reference=1:30", "1:30"),
        ("evaluation.reference=on", "on"),
        ("evaluation.reference=1e-4", "1e-4"),
        ("evaluation.reference=0x10", "0x10"),
        ("evaluation.reference=null", None),
        ("evaluation.reference='null'", "null"),
        ("name=2024", "2024"),
        ("logging.wandb_project=true", "true"),
        ("model.qk_norm=on", True),
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
        "train.max_steps=2024-01-01",
        "train.max_steps=1.5",
        "train.max_steps=0x10",
        "optimizer.lr=1:30",
        "optimizer.lr=.inf",
        "optimizer.lr=inf",
        "optimizer.lr=on",
        "model.qk_norm=2",
        "logging.tensorboard=maybe",
        "optimizer.betas=[0.9, on]",
        "train.seed=!!int x",
        "evaluation.reference=*a",
        "evaluation.reference=!!timestamp 2024-99-01",
    ],
)
def test_value_of_another_type_is_refused_by_name(override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(override.partition("=")[0])):
        load_config(RECIPE, [override])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(dotted_names()),
    text=st.one_of(
        st.text(max_size=6),
        st.integers().map(str),
        st.floats().map(str),
        st.dates().map(str),
        st.times().map(str),
        st.sampled_from(
            [
                "on",
                "no",
                "0o17",
                "010",
                "[1, a]",
                "{a: 1}",
                "~",
                "1e-4",
                "&a [*a]",
                "- 1",
                "<<",
                "=",
                "!!binary x",
            ]
        ),
    ),
)
def test_set_any_text_is_of_the_fields_type_or_refused(name: str, text: str) -> None:
    try:
        config = load_config(RECIPE, [f"{name}={text}"])
    except ConfigError:
        return
    assert config_from_dict(config.model_dump(mode="json"), source="saved") == config


@pytest.mark.parametrize(
    "text",
    [
        "train: {seed: 1, seed: 2}\n",
        "model: {}\nmodel: {}\n",
        "[" * 600,
        "a: !!int x\n",
        "a: &x [*x]\n",
    ],
)
def test_recipe_key_twice_depth_or_tag_is_no_traceback(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "r.yaml"))):
        load_config(write(tmp_path, "r.yaml", text))


def test_config_true_is_no_number() -> None:
    for section, field in (("train", "seed"), ("optimizer", "lr"), ("optimizer", "betas")):
        with pytest.raises(ConfigError, match=rf"{section}\.{field}"):
            config_from_dict(
                small_values(**{section: {field: [True, 0.5] if field == "betas" else True}}),
                source="saved",
            )


def test_saved_config_is_read_again_and_a_newer_one_says_so(tmp_path: Path) -> None:
    config = load_config(
        RECIPE,
        ["name=2024", "evaluation.reference=007", "logging.tensorboard=off", "optimizer.eps=1e-12"],
    )
    path = write(tmp_path, "config.yaml", saved_text(config))
    assert read_saved(path) == config
    first, _, rest = path.read_text().partition("\n")
    write(tmp_path, "config.yaml", f"# promoe_ds 99.0\nfuture: 1\n{rest}")
    with pytest.raises(ConfigError, match=r"99\.0"):
        read_saved(path)
    write(tmp_path, "config.yaml", f"{first}\nfuture: 1\n{rest}")
    with pytest.raises(ConfigError, match=r"future: no such field"):
        read_saved(path)


def test_set_path_with_equals_sign_keeps_it() -> None:
    config = load_config("promoe_b", ["data.path=/data/a=b"])
    assert config.data.path == "/data/a=b"


def test_set_later_override_wins() -> None:
    assert load_config(RECIPE, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_set_leaves_other_fields_of_the_section() -> None:
    changed, plain = load_config(RECIPE, ["train.seed=5"]), load_config(RECIPE)
    assert changed.train.model_copy(update={"seed": plain.train.seed}) == plain.train


def test_set_creates_a_section_that_the_recipe_lacks(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", "base: digits_promoe\n")
    assert load_config(path, ["diffusion.shift=3"]).diffusion.shift == 3.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", "--set train.max_steps: expected section.field=value"),
        ("=3", "--set =3: expected section.field=value"),
        ("train.max_steps:3", "--set train.max_steps:3: expected section.field=value"),
        ("model.deppth=5", "--set model.deppth: no such field; did you mean model.depth?"),
        (
            "model.num_experts=4",
            "--set model.num_experts: no such field; did you mean routing.num_experts?",
        ),
        ("num_experts=4", "--set num_experts: no such field; did you mean routing.num_experts?"),
        ("zzzz.qqqqqq=4", "--set zzzz.qqqqqq: no such field"),
        ("model={depth: 2}", "--set model: no such field"),
        ("train.max_steps=[", "--set train.max_steps=[: the value is not valid YAML"),
        ("train.max_steps=many", "train.max_steps='many': input should be a valid integer"),
        ("train.max_steps=1.5", "train.max_steps=1.5: input should be a valid integer"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: must be set"),
        ("optimizer.lr=0", "optimizer.lr=0: input should be greater than 0"),
    ],
)
def test_set_mistake_is_explained(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(RECIPE, [override])


# Files and bases.


def test_recipe_name_misspelt_suggests_one() -> None:
    with pytest.raises(
        ConfigError,
        match=r"--recipe promoe_bb: no packaged recipe .* did you mean promoe_[a-z]+\?$",
    ):
        load_config("promoe_bb")


def test_recipe_path_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=re.escape("--recipe nowhere/x.yaml: no such file")):
        load_config("nowhere/x.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2", "is not valid YAML"),
        ("- a\n- b\n", "must be a mapping of sections, found list"),
        ("", "must be a mapping of sections, found NoneType"),
        ("just words", "must be a mapping of sections, found str"),
    ],
)
def test_recipe_file_unusable_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "broken.yaml", text)
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}.*{message}"):
        load_config(path)


def test_recipe_file_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))} is not valid YAML"):
        load_config(path)


def test_recipe_file_name_becomes_the_run_name(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "mine.yaml", "base: digits_promoe\n")).name == "mine"


def test_recipe_stated_name_beats_the_file_name(tmp_path: Path) -> None:
    assert (
        load_config(write(tmp_path, "mine.yaml", "base: digits_promoe\nname: stated\n")).name
        == "stated"
    )


def test_base_values_are_inherited_and_overridden(tmp_path: Path) -> None:
    path = write(
        tmp_path, "mine.yaml", "base: digits_promoe\nrouting:\n  top_k: 2\noptimizer:\n  lr: 1e-4\n"
    )
    config, base = load_config(path), load_config(RECIPE)
    assert (config.routing.top_k, config.optimizer.lr) == (2, 1e-4)
    assert config.routing.num_experts == base.routing.num_experts
    assert config.optimizer.warmup_steps == base.optimizer.warmup_steps
    assert config.model == base.model


def test_base_of_a_base_beside_the_file_is_found(tmp_path: Path) -> None:
    write(tmp_path, "grand.yaml", "base: digits_promoe\ntrain:\n  seed: 1\n  log_every: 7\n")
    write(tmp_path, "parent.yaml", "base: grand.yaml\ntrain:\n  seed: 2\n")
    path = write(tmp_path, "child.yaml", "base: parent.yaml\n")
    train = load_config(path).train
    assert (train.seed, train.log_every, train.max_steps) == (
        2,
        7,
        load_config(RECIPE).train.max_steps,
    )


def test_base_recipe_is_itself_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "loop.yaml", "base: loop.yaml\n")
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}: the recipe is its own base"):
        load_config(path)


def test_base_circle_of_two_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    path = write(tmp_path, "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match="the recipe is its own base"):
        load_config(path)


def test_base_unknown_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "orphan.yaml", "base: no_such_recipe_at_all\n")
    with pytest.raises(ConfigError, match="no_such_recipe_at_all: no packaged recipe of that name"):
        load_config(path)
