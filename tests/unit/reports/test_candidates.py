"""Who may compete: parsing of candidates, and every refusal before training, by its message."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from promoe_ds.cli.compare import parse_arguments
from promoe_ds.config import config_from_dict, count_parameters
from promoe_ds.errors import ConfigError
from promoe_ds.evaluation.judges.table import JUDGES
from promoe_ds.reports.comparison.candidates import (
    Candidate,
    ComparisonRequest,
    check_fair,
    check_launch,
    load_candidates,
    methods_of,
    parse_variant,
)

from ..builders import small_values

ZERO2 = Path(__file__).parents[3] / "ds_configs" / "zero2_fp32.json"
REQUEST = ComparisonRequest(
    recipes=("digits_promoe",), steps=20, seeds=(0, 1), out=Path("out"), deepspeed_config=ZERO2
)


def _load(*variants: str, **options) -> list[Candidate]:
    return load_candidates(replace(REQUEST, variants=variants, **options))


def _candidate(name: str, **sections) -> Candidate:
    return Candidate(
        name=name,
        recipe="small",
        overrides=(),
        config=config_from_dict(small_values(**sections), source=name),
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain=digits_promoe", ("plain", "digits_promoe", ())),
        ("a.b-c_1=x.yaml,routing.rcl_weight=0", ("a.b-c_1", "x.yaml", ("routing.rcl_weight=0",))),
        (
            "v=r,optimizer.betas=[0.9, 0.95],routing.top_k=2",
            ("v", "r", ("optimizer.betas=[0.9, 0.95]", "routing.top_k=2")),
        ),
    ],
)
def test_parse_variant_splits_name_recipe_and_overrides(text, parts) -> None:
    assert parse_variant(text) == parts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("digits_promoe", "expected NAME=RECIPE"),
        ("v=", "expected NAME=RECIPE"),
        ("v=,routing.top_k=2", "expected NAME=RECIPE"),
        ("v=r,topk=2", "expected NAME=RECIPE"),
        ("v=r,", "expected NAME=RECIPE"),
        ("../up=digits_promoe", "names a folder"),
        ("=digits_promoe", "names a folder"),
        ("v=digits_promoe,train.seed=3", "train.seed is equal for all: use --seeds"),
    ],
)
def test_parse_variant_wrong_shape_is_refused(text, message) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_variant(text)


def test_load_sets_what_a_comparison_needs_and_lets_the_user_win() -> None:
    plain, variant = _load(
        "v=digits_promoe,routing.rcl_weight=0,model.depth=3",
        overrides=("model.depth=2", "train.log_every=5"),
    )
    assert (
        plain.name,
        plain.recipe,
        plain.config.model.depth,
        plain.config.routing.rcl_weight,
    ) == ("digits_promoe", "digits_promoe", 2, 1)
    assert (variant.name, variant.config.model.depth, variant.config.routing.rcl_weight) == (
        "v",
        3,
        0,
    )
    train = plain.config.train
    assert (train.max_steps, train.log_every, train.seed, plain.config.parallel.ep_size) == (
        20,
        5,
        0,
        1,
    )


@pytest.mark.parametrize(("steps", "log_every"), [(20, 1), (900, 4), (100_000, 50)])
def test_load_logs_often_enough_and_not_too_often(steps, log_every) -> None:
    assert _load(steps=steps)[0].config.train.log_every == log_every


@pytest.mark.parametrize(
    ("variants", "options", "message"),
    [
        ((), {"recipes": ()}, "nothing to compare"),
        (
            (),
            {"recipes": ("digits_promo",)},
            "candidate digits_promo: recipe digits_promo: no packaged.*did you mean digits_prom",
        ),
        (
            (),
            {"recipes": ("digits_promoe", "digits_promoe")},
            "two candidates are called digits_promoe",
        ),
        (("digits_promoe=digits_promoe",), {}, "two candidates are called digits_promoe"),
        (
            ("v=digits_promoe,routing.topk=1",),
            {},
            "candidate v: --set routing.topk: no such field; did you mean routing.top_k",
        ),
        (("v=digits_promoe,routing.top_k=9",), {}, "candidate v: digits_promoe.*top_k=9 exceeds"),
        (
            ("v=digits_promoe,routing.top_k=9,model.depth=0",),
            {},
            "candidate v: .*depth=0.*; .*top_k=9 exceeds",
        ),
        (
            (),
            {"overrides": ("train.max_steps=3",)},
            "--set train.max_steps=3: train.max_steps is equal for all: use --steps",
        ),
    ],
)
def test_load_mistake_is_refused_in_one_line(variants, options, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        _load(*variants, **options)
    assert "\n" not in str(caught.value)


def test_load_recipe_that_stops_early_is_refused(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("base: digits_promoe\ntrain: {stop_after_steps: 5}\n")
    with pytest.raises(
        ConfigError, match=r"candidate mine: train\.stop_after_steps=5 would end its training early"
    ):
        _load(recipes=(str(tmp_path / "mine.yaml"),))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (
            {"data": {"dataset": "synthetic", "synthetic_samples": 8}},
            "data.synthetic_samples is 4096 there and 8 here",
        ),
        (
            {"train": {"max_steps": 10, "global_batch_size": 32}},
            "train.global_batch_size is 256 there and 32 here",
        ),
        ({"train": {"max_steps": 11}}, "train.max_steps is 10 there and 11 here"),
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr is 0.0001 there and 0.5 here"),
        (
            {"diffusion": {"label_dropout": 0.5}},
            "diffusion.label_dropout is 0.1 there and 0.5 here",
        ),
        ({"sampling": {"steps": 7}}, "sampling.steps is 250 there and 7 here"),
        ({"model": {"depth": 3}}, "model.depth is 2 there and 3 here"),
    ],
)
def test_check_fair_names_the_field_that_differs_and_its_candidate(change, field) -> None:
    with pytest.raises(ConfigError) as caught:
        check_fair([_candidate("a"), _candidate("b", **change)], tolerance=10)
    assert "a (there)" in str(caught.value) and "b (here)" in str(caught.value)
    assert field in str(caught.value)


@pytest.mark.parametrize("dataset", JUDGES)
def test_methods_of_a_data_set_are_of_equal_activated_size(dataset) -> None:
    recipes, variants = methods_of(dataset)
    methods = replace(REQUEST, recipes=recipes, variants=variants)
    candidates = load_candidates(methods)
    check_fair(candidates, methods.tolerance)
    routing = {each.name: each.config.routing for each in candidates}
    assert (len(routing), len({each.method for each in routing.values()})) == (7, 5)
    assert routing["promoe_without_rcl"].rcl_weight == 0
    assert routing["promoe_without_conditional_routing"].num_unconditional_experts == 0


def test_check_fair_methods_may_differ_in_what_makes_them() -> None:
    dense = _candidate("b", routing={"method": "dense"}, sampling={"cfg_scale": 3.0})
    larger = _candidate(
        "c", routing={"num_experts": 8, "rcl_weight": 0}, train={"max_steps": 10, "keep_last": 1}
    )
    check_fair([_candidate("a"), dense, larger], tolerance=0.05)


def test_check_fair_unequal_parameters_are_listed_and_tolerance_widens() -> None:
    pair = [_candidate("a"), _candidate("b", routing={"num_experts": 4, "expert_width": 64})]
    small, large = (count_parameters(candidate.config).activated for candidate in pair)
    with pytest.raises(ConfigError) as caught:
        check_fair(pair, tolerance=0.05)
    assert (
        f"{large / small - 1:.1%} apart (a {small:,}, b {large:,}), --tolerance allows 5.0%"
        in str(caught.value)
    )
    check_fair(pair, tolerance=large / small - 1 + 1e-9)


def test_check_launch_names_the_candidate_that_the_ranks_do_not_fit() -> None:
    candidates = _load()
    assert check_launch(REQUEST, candidates) == json.loads(ZERO2.read_text())
    with pytest.raises(
        ConfigError,
        match=r"candidate digits_promoe on 3 ranks: train\.global_batch_size=64 cannot be cut",
    ):
        check_launch(replace(REQUEST, ranks=3), candidates)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"),
        ("--jobs", "0"),
        ("--ranks", "0"),
        ("--samples", "1"),
        ("--sample-seed", "-1"),
        ("--sample-seed", "9223372036854775808"),
        ("--tolerance", "-0.1"),
        ("--tolerance", "nan"),
        ("--seeds", ""),
        ("--seeds", "0,0"),
        ("--seeds", "-1"),
    ],
)
def test_number_that_cannot_be_meant_names_its_option(option, value, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--steps", "20", "--out", "out", f"{option}={value}"])
    assert stop.value.code == 2 and f"{option}: {value}" in capsys.readouterr().err
