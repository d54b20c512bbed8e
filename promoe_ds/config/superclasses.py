"""Superclass maps: which classes share a superclass, for classification-guided routing (Sec. 4.2).

A map is a YAML file from a superclass's name to the list of its classes, e.g. `animals: [0, 1, 5]`; superclasses get the
experts 0, 1, ... in the order of the file. Maps packaged in `promoe_ds/recipes/superclasses` go by name.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import ConfigError

_PACKAGED = Path(__file__).parents[1] / "recipes" / "superclasses"


def read_superclasses(config: RunConfig) -> tuple[int, ...]:
    """Return the superclass (0 ... E-1) of every class, in the order of the classes.

    Raises: ConfigError naming what is wrong with `routing.superclass_map`: no such file, a class that is missing, doubled
    or unknown, a superclass without classes, a number of superclasses that is not num_experts.
    """
    name, classes = config.routing.superclass_map, config.model.num_classes
    assert name is not None
    superclasses = _read(name)
    if len(superclasses) != config.routing.num_experts:
        raise ConfigError(f"routing.superclass_map={name} has {len(superclasses)} superclasses, routing.num_experts="
                          f"{config.routing.num_experts}: one expert serves one superclass, make them equal")
    found: dict[int, int] = {}
    for expert, (title, members) in enumerate(superclasses.items()):
        if not members:
            raise ConfigError(f"routing.superclass_map={name}: {title} has no class, its expert would learn nothing: give it one")
        for label in members:
            if not 0 <= label < classes:
                raise ConfigError(f"routing.superclass_map={name}: {title} holds class {label}, the model knows 0 ... "
                                  f"{classes - 1}")
            if label in found:
                raise ConfigError(f"routing.superclass_map={name}: class {label} stands in two superclasses, keep one")
            found[label] = expert
    missing = [label for label in range(classes) if label not in found]
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ConfigError(f"routing.superclass_map={name} misses class {missing[0]}{others}: every class needs a superclass")
    return tuple(found[label] for label in range(classes))


def _read(name: str) -> dict[str, list[int]]:
    packaged = _PACKAGED / f"{name}.yaml"
    path = packaged if packaged.is_file() else Path(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        packaged_names = ", ".join(sorted(path.stem for path in _PACKAGED.glob("*.yaml")))
        raise ConfigError(f"routing.superclass_map={name} is no packaged map ({packaged_names}) and cannot be read as a file: "
                          f"{reason}") from None
    fits = isinstance(values, dict) and all(isinstance(m, list) and all(type(x) is int for x in m) for m in values.values())
    if not fits:
        raise ConfigError(f"routing.superclass_map={name}: expected superclass names with lists of class numbers, e.g. "
                          "animals: [0, 1, 5]")
    return {str(title): members for title, members in values.items()}
