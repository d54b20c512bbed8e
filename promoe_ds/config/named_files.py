"""Files that a recipe names, whose content a run keeps: superclass maps and expert placements.

A superclass map (classification-guided routing, Sec. 4.2) is a YAML file from a superclass's name
to the list of its classes, e.g. `animals: [0, 1, 5]`; superclasses get the experts 0, 1, ... in the
order of the file. Maps packaged in `promoe_ds/recipes/superclasses` go by name.

A placement is the order in which the experts of every layer are placed on the ranks of an
expert-parallel group: a JSON file `{"format": 1, "ep_size": 2, "layers": {"1": [2, 0, 3, 1], ...}}`
from `promoe-load --placement`. An expert's number is the one that it had at the start of the run,
whatever placements followed: applying a file twice changes nothing.
"""

from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, TypeAdapter, ValidationError

from promoe_ds.config.schema import RunConfig
from promoe_ds.config.section import explain, read_yaml, require
from promoe_ds.errors import ConfigError, first_few

FORMAT: Literal[1] = 1
_MAP = TypeAdapter(dict[str, list[int]])
_PACKAGED = Path(__file__).parents[1] / "recipes" / "superclasses"


class _Placement(BaseModel, strict=True):
    format: Literal[1]
    layers: dict[str, list[int]]


def read_superclasses(config: RunConfig) -> tuple[int, ...]:
    """Return the superclass (0 ... E-1) of every class, in the order of the classes; under text, of
    every group of captions.

    Raises: ConfigError naming what is wrong with `routing.superclass_map`: no such file, a class
    that is missing, doubled or unknown, a superclass without classes, a number of superclasses that
    is not num_experts.
    """
    name, experts = config.routing.superclass_map, config.routing.num_experts
    assert name is not None
    where = f"routing.superclass_map={name}"
    superclasses, classes = _read_map(name), range(config.num_groups)
    require(
        len(classes) > 0,
        f"{where} sorts groups of captions, but data.caption_groups=0: set their number, or use"
        " another routing.method",
        ConfigError,
    )
    require(
        len(superclasses) == experts,
        f"{where} has {len(superclasses)} superclasses, routing.num_experts={experts}: one expert"
        " serves one superclass, make them equal",
        ConfigError,
    )
    counts = Counter(label for members in superclasses.values() for label in members)
    problems = [
        *(f"{title} has no class" for title, members in superclasses.items() if not members),
        *(f"class {label} is in two superclasses" for label in counts if counts[label] > 1),
        *(
            f"class {label} is not of 0 ... {classes[-1]}"
            for label in counts
            if label not in classes
        ),
        *(f"class {label} is missing" for label in classes if label not in counts),
    ]
    require(
        not problems,
        f"{where}: {first_few(problems)}; give every class one superclass",
        ConfigError,
    )
    expert_of = {label: e for e, each in enumerate(superclasses.values()) for label in each}
    return tuple(expert_of[label] for label in classes)


def read_placement(config: RunConfig) -> tuple[tuple[int, ...], ...]:
    """Return the order of every MoE layer's experts that `parallel.expert_placement` names.

    Raises: ConfigError naming what is wrong: no such file, another format, a layer that is missing
    or unknown, an order that is no permutation of the experts.
    """
    name, blocks = config.parallel.expert_placement, config.moe_block_indices
    assert name is not None
    where = f"parallel.expert_placement={name}"
    try:
        layers = _Placement.model_validate_json(Path(name).read_bytes()).layers
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise ConfigError(
            f"{explain(error, f'{where} is no placement', str)}; let promoe-load RUN_DIR"
            " --placement FILE write one"
        ) from None
    if unknown := sorted(set(layers) ^ {str(block) for block in blocks}):
        problem = "is not in it" if unknown[0] not in layers else "has no experts in this run"
        raise ConfigError(
            f"{where}: layer {unknown[0]} {problem}: it was written for another architecture; this"
            f" run has experts in the layers {', '.join(map(str, blocks))}"
        )
    experts = list(range(config.routing.num_experts))
    for layer, order in layers.items():
        require(
            sorted(order) == experts,
            f"{where}: layer {layer} has {order}, expected each of the experts 0 ... {experts[-1]}"
            " once",
            ConfigError,
        )
    return tuple(tuple(layers[str(block)]) for block in blocks)


def _read_map(name: str) -> dict[str, list[int]]:
    packaged = _PACKAGED / f"{name}.yaml"
    path = packaged if packaged.is_file() else Path(name)
    try:
        return _MAP.validate_python(read_yaml(path.read_bytes(), str(path)))
    except ValidationError:
        raise ConfigError(
            f"routing.superclass_map={name}: expected superclass names with lists of class numbers,"
            " e.g. animals: [0, 1, 5]"
        ) from None
    except (OSError, ConfigError) as error:
        names = ", ".join(sorted(path.stem for path in _PACKAGED.glob("*.yaml")))
        raise ConfigError(
            f"routing.superclass_map={name} is no packaged map ({names}) and cannot be read:"
            f" {error}"
        ) from None
