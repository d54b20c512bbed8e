"""Plan a run before it starts: memory, traffic and time of a step.

    promoe-plan --recipe promoe_b --nodes 2 --gpus-per-node 8 --gpu h100
    promoe-plan --recipe promoe_b --nodes 2 --pipeline

Prints parameters, memory of a rank, bytes sent over each link and a predicted step time, of the
recipe as it is and of the fastest layout that fits; with --pipeline disk, time and memory of every
step from ImageNet's archives to the figures of docs/guides/imagenet.md. Nothing is trained and no
device is needed: shapes go through the real layers.
"""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from promoe_ds.backends.devices import DEVICES
from promoe_ds.cli.entry import command
from promoe_ds.cli.options import Parser, check_target, number, write_figures
from promoe_ds.config import (
    DS_CONFIGS_DIR,
    load_config,
    plan_batches,
    read_deepspeed_json,
    resolve_deepspeed,
)
from promoe_ds.errors import ConfigError
from promoe_ds.planning.cluster import NETWORKS, Cluster, layout_of


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__, "promoe-plan")
    parser.add_run(deepspeed_config=DS_CONFIGS_DIR / "zero2_bf16.json")
    parser.add_argument("--nodes", type=number(ge=1), default=1)
    parser.add_argument("--gpus-per-node", type=number(ge=1), default=8)
    parser.add_argument("--gpu", type=str.lower, default="h100", choices=DEVICES)
    parser.add_argument("--network", type=str.lower, default="ib-ndr400", choices=NETWORKS)
    parser.add_argument(
        "--no-search", action="store_true", help="plan the recipe as it is and no other layout"
    )
    parser.add_argument(
        "--pipeline",
        action="store_true",
        help="plan docs/guides/imagenet.md instead: latents, training, 50,000 samples, figures",
    )
    parser.add_argument("--out", type=Path, help="also write the plans as JSON")
    options = parser.parse_args(arguments)
    if options.pipeline:
        of_a_layout = ("deepspeed_config", "network", "no_search")
        parser.without_effect(options, *of_a_layout, reason="with --pipeline")
    return options


def main(arguments: list[str]) -> None:
    """Arguments to plans on standard output, and as JSON with --out.

    Raises: ConfigError for what cannot be planned.
    """
    options = parse_arguments(arguments)
    if options.out is not None:
        check_target(options.out, "--out")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if options.pipeline:
        result = plan_pipeline_of(options)
    else:
        result = plan_layouts(options)
    if options.out is not None:
        write_figures(options.out, result)


def plan_pipeline_of(options: argparse.Namespace) -> dict[str, Any]:
    """Print the steps of docs/guides/imagenet.md; return them and what was assumed."""
    from promoe_ds.planning.pipeline import Assumptions, pipeline_lines, plan_pipeline

    config = load_config(options.recipe, options.overrides)
    if config.data.dataset != "latents":
        raise ConfigError(
            f"--recipe {options.recipe}: data.dataset={config.data.dataset}, the pipeline trains on"
            " latents: name a recipe with data.dataset=latents"
        )
    gpus = options.nodes * options.gpus_per_node
    plan_batches(config, gpus)  # refuses what could not be trained on so many
    assumptions = Assumptions(device=DEVICES[options.gpu])
    steps = plan_pipeline(config, gpus, assumptions)
    _print(pipeline_lines(steps))
    return {"pipeline": [asdict(step) for step in steps], "assumptions": asdict(assumptions)}


def plan_layouts(options: argparse.Namespace) -> dict[str, Any]:
    """Print the recipe as it is and the fastest layout that fits; return their plans."""
    from promoe_ds.planning.planner import plan_lines, plan_step
    from promoe_ds.planning.search import best_layout, choice_lines
    from promoe_ds.planning.shapes import fake_world

    config = load_config(options.recipe, options.overrides)
    cluster = Cluster(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        device=DEVICES[options.gpu],
        network_bandwidth=NETWORKS[options.network],
    )
    batches = plan_batches(config, cluster.ranks)
    deepspeed = resolve_deepspeed(
        read_deepspeed_json(options.deepspeed_config),
        config,
        batches,
        source=options.deepspeed_config,
    )
    layout = layout_of(batches, deepspeed)
    with fake_world(cluster.ranks):
        given = plan_step(config, layout, cluster)
        _print(["The recipe as it is", "", *plan_lines(given)])
        result: dict[str, Any] = {"recipe": given.as_json()}
        if not options.no_search:
            best, choices = best_layout(config, layout, cluster)
            _print(
                ["", "", "The fastest that fits", "", *plan_lines(best), "", *choice_lines(choices)]
            )
            result |= {"best": best.as_json(), "tried": [vars(choice) for choice in choices]}
    return result


def _print(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


run = command(main)

if __name__ == "__main__":
    run()
