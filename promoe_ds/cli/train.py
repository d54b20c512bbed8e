"""Train a diffusion transformer: one process, or one of many under deepspeed, torchrun or srun.

    promoe-train --recipe digits_promoe --set parallel.ep_size=1 \\
        --deepspeed_config ds_configs/zero0_fp32.json
    deepspeed --num_gpus 8 --module promoe_ds.cli.train --recipe promoe_b \\
        --deepspeed_config ds_configs/zero2_bf16.json --run-dir runs/b
"""

import argparse
import os
import sys
from pathlib import Path

import yaml

from promoe_ds.api import run_training
from promoe_ds.cli.entry import command
from promoe_ds.cli.options import AtOnce, Parser
from promoe_ds.config import (
    BatchPlan,
    DeepSpeedPlan,
    RunConfig,
    count_parameters,
    field_lines,
    load_config,
    plan_batches,
    read_deepspeed_json,
    resolve_deepspeed,
    training_flops_per_image,
)
from promoe_ds.distributed.launchers import read_place
from promoe_ds.files import json_text
from promoe_ds.launch.shutdown import EarlySignals


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__, "promoe-train")
    parser.add_run()
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<recipe's name>")
    parser.add_argument(
        "--resume",
        default="auto",
        help=(
            "auto: this run's newest checkpoint; none; or the path of a checkpoint, run, export or"
            " published .pth, whose model may differ in classes, size, experts"
        ),
    )
    parser.add_argument(
        "--label-map",
        type=Path,
        metavar="FILE",
        help="with --resume PATH: YAML, `new label: old label` (or `new`)",
    )
    parser.add_argument(
        "--fields",
        action=AtOnce,
        do=_show_fields,
        nargs="?",
        const="",
        metavar="SECTION",
        help="print what --set takes, with defaults and meaning, and exit",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print config, sizes and memory, and exit; for the fewest ranks without a launcher",
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it
    options = parser.parse_args(arguments)
    if options.resume in ("auto", "none"):
        parser.without_effect(options, "label_map", reason=f"with --resume {options.resume}")
    return options


def _show_fields(section: str) -> None:
    """Print the fields and exit, as --help does: whatever else is missing."""
    sys.stdout.write(field_lines(section))
    sys.exit()


def main(arguments: list[str]) -> None:
    """Arguments to config to engine."""
    options = parse_arguments(arguments)
    early = None if options.dry_run else EarlySignals()  # before the imports, which take seconds
    place = read_place(os.environ)
    config = load_config(options.recipe, options.overrides)
    values = read_deepspeed_json(options.deepspeed_config)

    from promoe_ds.versions import check_deepspeed

    check_deepspeed()
    # A dry run needs no launcher: it assumes the fewest ranks that the recipe runs on.
    world_size = (
        config.parallel.ep_size if options.dry_run and not place.launched else place.world_size
    )
    batches = plan_batches(config, world_size)
    plan = resolve_deepspeed(values, config, batches, source=options.deepspeed_config)
    if early is None:
        if place.rank == 0:
            _describe(config, plan, batches)
        return

    from promoe_ds.backends.process_group import start_distributed
    from promoe_ds.distributed.process_group import complete_environment, stop_distributed
    from promoe_ds.training.supervisor import supervised

    run_dir = options.run_dir or Path("runs") / config.name
    complete_environment()
    with supervised(
        config.supervision, run_dir, early, config.parallel.timeout_seconds
    ) as supervisor:
        run_training(
            config,
            plan,
            run_dir,
            start_distributed(config.parallel.timeout_seconds),
            supervisor,
            resume=options.resume,
            label_map=options.label_map,
        )
        stop_distributed()


def _describe(config: RunConfig, plan: DeepSpeedPlan, batches: BatchPlan) -> None:
    """Write the resolved config, parameter counts and memory plan to standard output."""
    from promoe_ds.planning.cluster import layout_of
    from promoe_ds.planning.zero import states_of_config

    count = count_parameters(config)
    memory = states_of_config(config, layout_of(batches, plan))
    sizes = {
        "parameters": {
            "total": count.total,
            "activated": count.activated,
            "trainable": count.trainable,
            "routed_experts": count.routed,
        },
        "training_gflops_per_image": round(training_flops_per_image(config) / 1e9, 3),
        "batch": {
            "global": batches.global_batch,
            "micro": batches.micro_batch,
            "accumulation": batches.accumulation,
            "ranks": batches.world_size,
        },
        "model_state_gb_per_rank": {
            kind: round(getattr(memory, kind) / 1e9, 3)
            for kind in ("weights", "gradients", "optimizer", "ema", "total", "device", "host")
        },
        "optimizer_and_ema_lie_in": "host memory" if plan.offloads else "device memory",
    }
    warnings = [
        average.warning(name, config.train.max_steps)
        for name, average in config.optimizer.averages.items()
    ]
    sys.stdout.write(
        f"# recipe\n{yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False)}"
        f"# deepspeed\n{json_text(plan.json, indent=2)}\n"
        "# sizes (GB are 10^9 bytes, without activations: promoe-plan counts those)\n"
        f"{yaml.safe_dump(sizes, sort_keys=False)}"
        f"# ZeRO {plan.zero_stage} on {batches.world_size} ranks. One CPU process in fp32: stage 0"
        " fits (zero0_fp32.json); two and more ranks, or bf16: stage 2\n"
        + "".join(f"# {warning}\n" for warning in warnings if warning)
    )


run = command(main)

if __name__ == "__main__":
    run()
