"""From a recipe's name or path, plus overrides, to a validated `RunConfig`."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from promoe_ds import __version__
from promoe_ds.config.named_files import read_placement, read_superclasses
from promoe_ds.config.schema import RunConfig
from promoe_ds.config.section import explain, read_yaml, suggest
from promoe_ds.errors import ConfigError
from promoe_ds.logs import get_logger

_LOG = get_logger("config")

#: Begins a saved config, before the version.
_WRITTEN_BY = "# promoe_ds "
RECIPES_DIR = Path(__file__).parent.parent / "recipes"

#: What fields are called in recipes, runs and exports of earlier versions: (section, old) -> field.
_OLD_FIELDS = {
    ("optimizer", "clip_norm"): "max_grad_norm",
    ("optimizer", "ema_power_lengths"): "ema_sigma_rels",
    ("parallel", "exchange_dtype"): "comm_dtype",
}
#: Likewise of their values: (section, field) -> {old value: value}.
_OLD_VALUES = {
    ("parallel", "dispatch"): {"deepspeed": "alltoall", "deepspeed_capacity": "deepspeed_moe"}
}


def list_recipes() -> list[str]:
    """Return the names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def load_config(recipe: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Load a recipe, apply `section.field=value` overrides, validate.

    Args:
        recipe: the name of a packaged recipe or the path of a YAML file. A recipe may name another
            one under `base`, whose values it inherits and overrides.
        overrides: as after `--set`; values are YAML (`true`, `3`, `[0.9, 0.95]`, `null`), read by
        the field's type.
    Raises: ConfigError naming the dotted field, its value and, for a typing error, the nearest
    valid name; or what is wrong with a file that the recipe names.
    """
    path = _recipe_path(recipe)
    values = {"name": path.stem, **_read_with_base(path, seen=())}
    for override in overrides:
        values = _merged(values, _read_override(override))
    config = config_from_dict(values, source=str(recipe))
    # The run keeps what the files said: they may change or go away, the run's targets and its
    # experts' order may not.
    if config.routing.method == "classification":
        config = change_config(config, routing={"superclasses": read_superclasses(config)})
    if config.parallel.expert_placement is not None:
        config = change_config(config, parallel={"expert_order": read_placement(config)})
    return config


def with_new_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return nested values under the names of today, and a line for each that had an old one.

    A field that is there under both names is left as it is, for the validation to refuse.
    """
    result: dict[str, Any] = dict(values)
    notes = []
    for (section, old), new in _OLD_FIELDS.items():
        fields = result.get(section)
        if isinstance(fields, Mapping) and old in fields and new not in fields:
            result[section] = {
                new if name == old else name: value for name, value in fields.items()
            }
            notes.append(f"{section}.{old} is now {section}.{new}")
    for (section, field), table in _OLD_VALUES.items():
        fields = result.get(section)
        value = fields.get(field) if isinstance(fields, Mapping) else None
        if isinstance(value, str) and value in table:
            result[section] = {**result[section], field: table[value]}
            notes.append(f"{section}.{field}={value} is now {table[value]}")
    return result, notes


def release_of(text: str) -> tuple[int, ...]:
    """Return the numbers of a version that order releases, e.g. (0, 19, 8)."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def config_from_dict(
    values: Mapping[str, Any], *, source: str, written_by: object = None
) -> RunConfig:
    """Validate nested values, e.g. those saved in a run or a checkpoint.

    Args:
        written_by: the version of this package that the source names as its writer, if it does.
    Raises: ConfigError, one line for one problem, else a line for each; it says so if a newer
    version wrote the values.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source} must be a mapping of sections, found {type(values).__name__}")
    try:
        return RunConfig.model_validate(with_new_names(values)[0])
    except ValidationError as error:
        problem = explain(error, source, lambda name: _unknown(name, name))
        if isinstance(written_by, str) and release_of(written_by) > release_of(__version__):
            raise ConfigError(
                f"{source} was written by promoe_ds {written_by}, this is {__version__}: update"
                f" promoe_ds. {problem}"
            ) from None
        raise problem from None


def saved_text(config: RunConfig) -> str:
    """Return a config as a run directory keeps it: YAML, with the version that wrote it."""
    values = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return f"{_WRITTEN_BY}{__version__}\n{values}"


def read_saved(path: Path) -> RunConfig:
    """Read what `saved_text` wrote.

    Raises: ConfigError if it is damaged or cannot be understood; OSError.
    """
    text = path.read_bytes()
    first = text.partition(b"\n")[0].decode(errors="replace")
    return config_from_dict(
        read_yaml(text, str(path)),
        source=str(path),
        written_by=first.removeprefix(_WRITTEN_BY) if first.startswith(_WRITTEN_BY) else None,
    )


def change_config(
    config: RunConfig, *, name: str | None = None, **sections: Mapping[str, Any]
) -> RunConfig:
    """Return a config with the fields of some sections changed, validated anew.

    Raises: ConfigError as `config_from_dict`.
    """
    values = _merged(config.model_dump(mode="json"), sections)
    return config_from_dict(values | {"name": name or config.name}, source=config.name)


def dotted_names(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Return every name that `--set` takes, e.g. `train.max_steps`."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            names += dotted_names(annotation, f"{prefix}{name}.")
        else:
            names.append(f"{prefix}{name}")
    return names


def nearest_name(name: str) -> str | None:
    """Return the valid dotted name that `name` most likely means, or None.

    A field put into the wrong section is recognised by its last part.
    """
    section, _, leaf = name.rpartition(".")
    names = dotted_names()
    if longer := [valid for valid in names if valid.startswith(f"{name}_")]:
        return longer[0]
    # Fields of the same section come last and win among equal last parts.
    by_leaf = {
        valid.rpartition(".")[2]: valid
        for valid in sorted(names, key=lambda n: n.startswith(f"{section}."))
    }
    close = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)
    return by_leaf[close[0]] if close else None


def _recipe_path(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        return path
    recipes = list_recipes()
    if str(recipe) in recipes:
        return RECIPES_DIR / f"{recipe}.yaml"
    hint = suggest(str(recipe), recipes, f"give a .yaml file, or one of {', '.join(recipes)}")
    raise ConfigError(f"--recipe {recipe}: no packaged recipe of that name; {hint}")


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: the recipe is its own base: change its `base`")
    try:
        values = read_yaml(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"--recipe {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of sections, found {type(values).__name__}")
    values = _renewed(values, str(path))
    base = values.pop("base", None)
    if base is None:
        return values
    relative = path.parent / str(base)
    base_path = relative if relative.is_file() else _recipe_path(str(base))
    return _merged(_read_with_base(base_path, (*seen, path.resolve())), values)


def _merged(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(dict(result[key]), value) if both else value
    return result


def _read_override(override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    if not (name and equals):
        raise ConfigError(f"--set {override}: expected section.field=value")
    value = read_yaml(text, f"--set {override}: the value")
    section, dot, leaf = name.rpartition(".")
    given = _renewed({section: {leaf: value}} if dot else {name: value}, f"--set {override}")
    if dot:
        name = f"{section}.{next(iter(given[section]))}"
    if name not in dotted_names():
        raise ConfigError(_unknown(f"--set {name}", name))
    return given


def _renewed(values: dict[str, Any], source: str) -> dict[str, Any]:
    values, notes = with_new_names(values)
    for note in notes:
        _LOG.warning("%s: %s", source, note)
    return values


def _unknown(where: str, name: str) -> str:
    nearest = nearest_name(name)
    hint = f"did you mean {nearest}?" if nearest else "`promoe-train --fields` lists all"
    return f"{where}: no such field; {hint}"
