"""What is compared: recipes and named variants of them, validated and checked for equal conditions
before any training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
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
from promoe_ds.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
#: A comma starts a new override only before `section.field=`: lists such as [0.9, 0.95] hold
# commas, too.
_BETWEEN_OVERRIDES = re.compile(r",(?=\s*[A-Za-z_]+(?:\.[A-Za-z_]+)+=)")
#: What the comparison states for each run itself, by the option that states it.
_OWNED = {
    "train.max_steps": "--steps",
    "train.seed": "--seeds",
    "train.stop_after_steps": "--steps",
}
#: What candidates may differ in. Everything else, fields to come included, must be equal.
_FREE_SECTIONS = {"name", "routing", "parallel", "logging"}
_FREE_FIELDS = {
    "model.preset",
    # what a dense model spends on its feed-forward; the activated parameters are held equal
    "model.mlp_ratio",
    "train.checkpoint_every",
    "train.keep_last",
    "train.max_nonfinite_steps",
    "sampling.cfg_scale",  # the recipe's own guidance
}
#: Log lines that a run's curve gets, unless steps are fewer or --set train.log_every says
# otherwise.
_LOG_LINES = 200
_MAX_LOG_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class ComparisonRequest:
    """What a user asked for; the options of promoe-compare."""

    recipes: tuple[str, ...]
    steps: int
    seeds: tuple[int, ...]
    out: Path
    variants: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    jobs: int = 2
    ranks: int = 1
    deepspeed_config: Path = DS_CONFIGS_DIR / "zero2_fp32.json"
    samples: int = 500
    sample_seed: int = 0
    tolerance: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe with overrides under a name of its own; `config` is that of seed 0."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    config: RunConfig


def check_numbers(request: ComparisonRequest) -> None:
    """Refuse numbers that cannot be meant.

    Raises: ConfigError naming the option.
    """
    least = {"steps": 1, "jobs": 1, "ranks": 1, "samples": 2, "sample_seed": 0, "tolerance": 0}
    for name, minimum in least.items():
        if not getattr(request, name) >= minimum:  # nan is none of both
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(request, name)}: must be at least {minimum}"
            )
    if (
        not request.seeds
        or min(request.seeds) < 0
        or max(request.seeds) >= 2**63
        or len(set(request.seeds)) < len(request.seeds)
    ):
        raise ConfigError(
            f"--seeds {','.join(map(str, request.seeds))}: expected different integers from 0 on,"
            " e.g. 0,1,2"
        )


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
    named += [parse_variant(variant) for variant in request.variants]
    if not named:
        raise ConfigError(
            "--recipes: nothing to compare: name recipes, e.g. --recipes digits_promoe,digits_dit"
        )
    names = [name for name, _, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two candidates are called {name}: give one another name with --variant"
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
            f"--variant {text}: the name {name!r} must be letters, digits, '_', '-' or '.', for it"
            " names a folder"
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
        f"train.log_every={_log_every(request.steps)}",
        *request.overrides,
        *own,
        f"train.max_steps={request.steps}",
    )
    try:
        config = load_config(recipe, [*overrides, "train.seed=0"])
    except ConfigError as error:
        lines = [line.strip() for line in str(error).replace("--recipe", "recipe").splitlines()]
        lines[0] = lines[0].removeprefix(f"{name}: ")
        raise ConfigError(
            f"candidate {name}: {lines[0]}" + (f" {'; '.join(lines[1:])}" if lines[1:] else "")
        ) from None
    if config.train.stop_after_steps is not None:
        raise ConfigError(
            f"candidate {name}: train.stop_after_steps={config.train.stop_after_steps} would end"
            " its training early: leave it out of the recipe"
        )
    return Candidate(name=name, recipe=recipe, overrides=overrides, config=config)


def _log_every(steps: int) -> int:
    return max(1, min(_MAX_LOG_EVERY, steps // _LOG_LINES))


def check_fair(candidates: Sequence[Candidate], tolerance: float) -> None:
    """Compare every candidate's conditions with the first one's.

    Args:
        tolerance: how far the largest number of activated parameters may exceed the smallest,
        relative to that.
    Raises: ConfigError naming the fields of the candidate that differ, or all the counts.
    """
    first = candidates[0]
    for other in candidates[1:]:
        if unequal := _unequal_fields(other, first):
            raise ConfigError(
                f"candidate {other.name} trains under other conditions than {first.name}:"
                f" {'; '.join(unequal)}. Set it alike for all with --set"
            )
    counts = {
        candidate.name: count_parameters(candidate.config).activated for candidate in candidates
    }
    spread = max(counts.values()) / min(counts.values()) - 1
    if spread > tolerance:
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise ConfigError(
            f"activated parameters are {spread:.1%} apart ({listed}), --tolerance allows"
            f" {tolerance:.1%}: change the widths, or widen --tolerance"
        )


def _unequal_fields(other: Candidate, first: Candidate) -> list[str]:
    theirs, reference = flat_fields(other.config), flat_fields(first.config)
    return [
        f"{field}={theirs.get(field)!r} instead of {reference.get(field)!r}"
        for field in {**reference, **theirs}
        if theirs.get(field) != reference.get(field)
        and field not in _FREE_FIELDS
        and field.partition(".")[0] not in _FREE_SECTIONS
    ]


def flat_fields(config: RunConfig) -> dict[str, Any]:
    """Return every field of a config by its dotted name."""
    flat: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json").items():
        flat.update(
            {f"{section}.{name}": field for name, field in value.items()}
            if isinstance(value, dict)
            else {section: value}
        )
    return flat


def check_launch(request: ComparisonRequest, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Resolve ranks, batches and the DeepSpeed JSON for every candidate; return the JSON's values.

    Raises: ConfigError naming the candidate, or the file.
    """
    values = read_deepspeed_json(request.deepspeed_config)
    for candidate in candidates:
        try:
            resolve_deepspeed(
                values,
                candidate.config,
                plan_batches(candidate.config, request.ranks),
                source=str(request.deepspeed_config),
            )
        except ConfigError as error:
            raise ConfigError(
                f"candidate {candidate.name} on {request.ranks} ranks: {error}"
            ) from None
    return values
