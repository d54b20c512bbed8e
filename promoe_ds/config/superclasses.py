"""Superclass maps: which classes share a superclass, for classification-guided routing (Sec. 4.2).

A map is a YAML file from a superclass's name to the list of its classes, e.g. `animals: [0, 1, 5]`;
superclasses get the experts 0, 1, ... in the order of the file. Maps packaged in
`promoe_ds/recipes/superclasses` go by name.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from promoe_ds.config.schema import RunConfig
from promoe_ds.config.yaml_text import read_yaml
from promoe_ds.errors import ConfigError

_MAP = TypeAdapter(dict[str, list[int]])
_PACKAGED = Path(__file__).parents[1] / "recipes" / "superclasses"


def read_superclasses(config: RunConfig) -> tuple[int, ...]:
    """Return the superclass (0 ... E-1) of every class, in the order of the classes.

    Raises: ConfigError naming what is wrong with `routing.superclass_map`: no such file, a class
    that is missing, doubled or unknown, a superclass without classes, a number of superclasses that
    is not num_experts.
    """
    name, classes = config.routing.superclass_map, config.model.num_classes
    assert name is not None
    superclasses = _read(name)
    if len(superclasses) != config.routing.num_experts:
        raise ConfigError(
            f"routing.superclass_map={name} has {len(superclasses)} superclasses,"
            f" routing.num_experts={config.routing.num_experts}: one expert serves one superclass,"
            " make them equal"
        )
    found: dict[int, int] = {}
    for expert, (title, members) in enumerate(superclasses.items()):
        if not members:
            raise ConfigError(
                f"routing.superclass_map={name}: {title} has no class, its expert would learn"
                " nothing: give it one"
            )
        for label in members:
            if not 0 <= label < classes:
                raise ConfigError(
                    f"routing.superclass_map={name}: {title} holds class {label}, the model knows 0"
                    f" ... {classes - 1}"
                )
            if label in found:
                raise ConfigError(
                    f"routing.superclass_map={name}: class {label} stands in two superclasses,"
                    " keep one"
                )
            found[label] = expert
    missing = [label for label in range(classes) if label not in found]
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ConfigError(
            f"routing.superclass_map={name} misses class {missing[0]}{others}: every class needs a"
            " superclass"
        )
    return tuple(found[label] for label in range(classes))


def _read(name: str) -> dict[str, list[int]]:
    packaged = _PACKAGED / f"{name}.yaml"
    path = packaged if packaged.is_file() else Path(name)
    try:
        return _MAP.validate_python(read_yaml(path.read_text(encoding="utf-8-sig"), "the file"))
    except ValidationError:
        raise ConfigError(
            f"routing.superclass_map={name}: expected superclass names with lists of class numbers,"
            " e.g. animals: [0, 1, 5]"
        ) from None
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        packaged_names = ", ".join(sorted(path.stem for path in _PACKAGED.glob("*.yaml")))
        raise ConfigError(
            f"routing.superclass_map={name} is no packaged map ({packaged_names}) and cannot be"
            f" read as a file: {error}"
        ) from None
