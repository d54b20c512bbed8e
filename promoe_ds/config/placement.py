"""Expert placements: in which order the experts of every layer lie over the ranks of an
expert-parallel group.

A placement is a JSON file `{"format": 1, "ep_size": 2, "layers": {"1": [2, 0, 3, 1], ...}}`,
written by `promoe-load --placement`. An expert's number is the one that it had at the start of the
run, whatever placements
followed: applying a file twice changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import ConfigError

FORMAT = 1


def read_placement(config: RunConfig) -> tuple[tuple[int, ...], ...]:
    """Return the order of every MoE layer's experts that `parallel.expert_placement` names.

    Raises: ConfigError naming what is wrong: no such file, another format, a layer that is missing
    or unknown, an order that is no permutation of the experts.
    """
    name, blocks, experts = (
        config.parallel.expert_placement,
        config.moe_block_indices,
        config.routing.num_experts,
    )
    assert name is not None
    where = f"parallel.expert_placement={name}"
    try:
        values = json.loads(Path(name).read_text(encoding="utf-8"))
        found, layers = values["format"], dict(values["layers"])
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{where} is no placement ({type(error).__name__}: {error}): let promoe-load RUN_DIR "
            "--placement FILE write one"
        ) from None
    if found != FORMAT:
        raise ConfigError(
            f"{where}: format {found} is not {FORMAT}: write the file anew with promoe-load"
        )
    if unknown := sorted(set(layers) ^ {str(block) for block in blocks}):
        problem = "is not in it" if unknown[0] not in layers else "has no experts in this run"
        raise ConfigError(
            f"{where}: layer {unknown[0]} {problem}: it was written for another architecture; this"
            f" run has experts in the layers {', '.join(map(str, blocks))}"
        )
    for layer, order in layers.items():
        fits = isinstance(order, list) and all(type(expert) is int for expert in order)
        if not fits or sorted(order) != list(range(experts)):
            raise ConfigError(
                f"{where}: layer {layer} has {order}, expected each of the experts 0 ..."
                f" {experts - 1} once"
            )
    return tuple(tuple(layers[str(block)]) for block in blocks)
