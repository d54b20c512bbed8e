"""What is compared: recipes and named variants of them, validated and checked for equal conditions
before any training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from promoe_ds.config import (
    DS_CONFIGS_DIR,
    RunConfig,
    count_parameters,
    load_config,
    plan_batches,
    read_deepspeed_json,
    resolve_deepspeed,
)
from promoe_ds.config.loader import dotted_names
from promoe_ds.errors import ConfigError, differences

#: What `methods_of` a data set are: recipes by their ends, and variants of ProMoE.
_METHODS = ("promoe", "dit", "ditmoe", "ecdit", "diffmoe")
_VARIANTS = {
    "promoe_without_rcl": "routing.rcl_weight=0",
    "promoe_without_conditional_routing": "routing.num_unconditional_experts=0",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
#: A comma starts a new override only before `section.field=`: lists such as [0.9, 0.95] hold
# commas, too.
_BETWEEN_OVERRIDES = re.compile(r",(?=\s*[A-Za-z_]+(?:\.[A-Za-z_]+)+=)")
#: What the comparison sets for each run itself, by the option that sets it.
_OWNED = {
    "train.max_steps": "--steps",
    "train.seed": "--seeds",
    "train.stop_after_steps": "--steps",
}
#: What candidates may differ in. Everything else, fields to come included, must be equal.
_FREE_SECTIONS = {"name", "routing", "parallel", "logging"}
_FREE_FIELDS = {
    "model.preset",
    # what a dense model spends on its feed-forward; its activated parameters are equal
    "model.mlp_ratio",
    # what a block is made of, at equal activated parameters
    "model.block",
    "model.mlp_type",
    "model.qk_norm",
    "train.checkpoint_every",
    "train.keep_last",
    "train.max_nonfinite_steps",
    "sampling.cfg_scale",  # the recipe's own guidance
}
#: Log lines that a run's curve gets, and the most steps from one to the next, unless
#: --set train.log_every says otherwise.
_LOG_LINES, _MAX_LOG_EVERY = 200, 50


@dataclass(frozen=True, kw_only=True)
class ComparisonRequest:
    """What a user asked for; the options of promoe-compare."""

    recipes: Sequence[str]
    steps: int
    seeds: Sequence[int]
    out: Path
    variants: Sequence[str] = ()
    overrides: Sequence[str] = ()
    jobs: int = 2
    ranks: int = 1
    deepspeed_config: str | Path = DS_CONFIGS_DIR / "zero2_fp32.json"
    samples: int = 500
    sample_seed: int = 0
    tolerance: float = 0.05
    imports: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe with overrides under a name of its own; `config` is that of seed 0."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    config: RunConfig


def methods_of(dataset: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the recipes of all methods on a packaged data set, and variants of ProMoE's that lack
    one part each; of equal activated size.
    """
    promoe, *others = (f"{dataset}_{method}" for method in _METHODS)
    variants = (f"{name}={promoe},{override}" for name, override in _VARIANTS.items())
    return (promoe, *others), tuple(variants)


def load_candidates(request: ComparisonRequest) -> list[Candidate]:
    """Load and validate every candidate, recipes first, in the order of the command line.

    Raises: ConfigError, on one line, naming the candidate and what is wrong with it.
    """
    for override in request.overrides:
        _refuse_owned(override, f"--set {override}")
    named: list[tuple[str, str, tuple[str, ...]]] = [
        (Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe, recipe, ())
        for recipe in request.recipes
    ]
    named += map(parse_variant, request.variants)
    if not named:
        raise ConfigError(
            "--recipes: nothing to compare: name recipes, e.g. --recipes digits_promoe,digits_dit"
        )
    names = [name for name, _, _ in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"two candidates are called {twice[0]}: give one another name with --variant"
            " NAME=RECIPE"
        )
    return [_load(name, recipe, own, request) for name, recipe, own in named]


def parse_variant(text: str) -> tuple[str, str, tuple[str, ...]]:
    """Split NAME=RECIPE,section.field=value,... into name, recipe and overrides.

    Raises: ConfigError for another shape, or a name that makes no folder.
    """
    name, equals, rest = text.partition("=")
    recipe, *overrides = (part.strip() for part in _BETWEEN_OVERRIDES.split(rest))
    if not equals or not recipe or "=" in recipe or "," in recipe:
        raise ConfigError(
            f"--variant {text}: expected NAME=RECIPE,section.field=value, e.g."
            " no_rcl=digits_promoe,routing.rcl_weight=0"
        )
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--variant {text}: the name {name!r} must be letters, digits, '_', '-' or '.', because"
            " it names a folder"
        )
    for override in overrides:
        _refuse_owned(override, f"--variant {text}")
    return name, recipe, tuple(overrides)


def _refuse_owned(override: str, where: str) -> None:
    name = override.partition("=")[0]
    if name in _OWNED:
        raise ConfigError(f"{where}: {name} is equal for all: use {_OWNED[name]}")


def _load(name: str, recipe: str, own: tuple[str, ...], request: ComparisonRequest) -> Candidate:
    # First what suits a comparison, then what the user wants for all, then the variant's own; later
    # ones win.
    overrides = (
        "parallel.ep_size=1",
        "logging.tensorboard=false",
        f"train.log_every={max(1, min(_MAX_LOG_EVERY, request.steps // _LOG_LINES))}",
        *request.overrides,
        *own,
        f"train.max_steps={request.steps}",
    )
    try:
        config = load_config(recipe, [*overrides, "train.seed=0"])
    except ConfigError as error:
        first, *others = str(error).replace("--recipe", "recipe").splitlines()
        text = "; ".join(map(str.strip, others))
        first = first.removeprefix(f"{name}: ").strip()
        raise ConfigError(f"candidate {name}: {first} {text}".rstrip()) from None
    if config.train.stop_after_steps is not None:
        raise ConfigError(
            f"candidate {name}: train.stop_after_steps={config.train.stop_after_steps} would end"
            " its training early: leave it out of the recipe"
        )
    return Candidate(name=name, recipe=recipe, overrides=overrides, config=config)


def check_fair(candidates: Sequence[Candidate], tolerance: float) -> None:
    """Compare every candidate's conditions with the first one's.

    Args:
        tolerance: how far the largest number of activated parameters may exceed the smallest,
        relative to that.
    Raises: ConfigError naming the fields of the candidate that differ, or all the counts.
    """
    first, *others = candidates
    for other in others:
        if unequal := differences(_conditions(first.config), _conditions(other.config)):
            raise ConfigError(
                f"candidates {first.name} (there) and {other.name} (here) train under different"
                f" conditions: {'; '.join(unequal)}. Set it alike for all with --set"
            )
    counts = {each.name: count_parameters(each.config).activated for each in candidates}
    spread = max(counts.values()) / min(counts.values()) - 1
    if spread > tolerance:
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise ConfigError(
            f"activated parameters are {spread:.1%} apart ({listed}), --tolerance allows"
            f" {tolerance:.1%}: change the widths, or widen --tolerance"
        )


def _conditions(config: RunConfig) -> dict[str, Any]:
    return {
        name: value
        for name, value in flat_fields(config).items()
        if name not in _FREE_FIELDS and name.partition(".")[0] not in _FREE_SECTIONS
    }


def flat_fields(config: RunConfig) -> dict[str, Any]:
    """Return every field of a config by its dotted name."""
    return {name: attrgetter(name)(config) for name in dotted_names()}


def check_launch(request: ComparisonRequest, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Resolve ranks, batches and the DeepSpeed JSON for every candidate; return the JSON's values.

    Raises: ConfigError naming the candidate, or the file.
    """
    values, source = read_deepspeed_json(request.deepspeed_config), str(request.deepspeed_config)
    for each in candidates:
        try:
            batches = plan_batches(each.config, request.ranks)
            resolve_deepspeed(values, each.config, batches, source=source)
        except ConfigError as error:
            raise ConfigError(f"candidate {each.name} on {request.ranks} ranks: {error}") from None
    return values
