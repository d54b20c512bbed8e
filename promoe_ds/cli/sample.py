"""Sample images from an export, by one process, or by many under torchrun or deepspeed.

    promoe-sample --model exports/digits --out samples --num 500 --grid
    promoe-sample --model exports/emoji --out samples --prompt "red apple" --cfg-scale 3

Needs no deepspeed, but for --checkpoint-steps. The same command resumes after an interruption.
"""

import argparse
from pathlib import Path

from promoe_ds.cli.entry import command, joined_processes
from promoe_ds.cli.options import Parser, listed, number, size
from promoe_ds.config.diffusion import SOLVERS
from promoe_ds.logs import get_logger


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__, "promoe-sample")
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        required=True,
        help="export folder (promoe-convert --to single), or a run with --checkpoint-steps",
    )
    add(
        "--checkpoint-steps",
        type=listed(number()),
        default=(),
        metavar="N,N",
        help="sample these checkpoints of a run, into OUT/step_N; exports stay in OUT/exports",
    )
    add("--out", type=Path, required=True, help="folder to write")
    _add_subjects(parser)
    _add_solver(parser)
    add(
        "--size",
        type=size,
        metavar="HxW",
        help="of the latents, as model.input_size and model.buckets; the largest if left out",
    )
    add("--seed", type=number(ge=0, lt=2**63), default=0)
    _add_passes(parser)
    add("--vae", metavar="DIR_OR_ID", help="autoencoder that decodes latents into images")
    parser.add_import()
    parser.add_process()
    add(
        "--features",
        metavar="EXTRACTOR",
        help="also write features.npz: mu and sigma by an extractor, as evaluate takes it",
    )
    add("--grid", action="store_true", help="also write grid.png: one row a class, or prompts")
    return parser.parse_args(arguments)


def _add_passes(parser: Parser) -> None:
    """Add what says how the network is run."""
    add = parser.add_argument
    add(
        "--batch-size",
        type=number(ge=1),
        default=64,
        help="images a process samples at once, without --exact",
    )
    add(
        "--exact",
        action=argparse.BooleanOptionalAction,
        default=False,
        help=(
            "one image a pass, on one thread: every bit depends on seed, index and label or prompt"
            " alone; in batches images agree to rounding"
        ),
    )
    add(
        "--dtype",
        choices=["fp32", "bf16"],
        help="of the network's weights; if left out bf16 on CUDA, fp32 on CPUs",
    )
    add(
        "--ep-size",
        type=number(ge=1),
        default=1,
        help="processes that share a set of experts: for models that fit no device",
    )


def _add_subjects(parser: Parser) -> None:
    """Add what says what to draw, and how many."""
    add = parser.add_argument
    subjects = parser.add_mutually_exclusive_group()
    subjects.add_argument(
        "--classes", type=listed(number()), help="comma-separated labels; all classes if left out"
    )
    subjects.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to draw, by a model of text; may be given several times; blank is no text",
    )
    subjects.add_argument(
        "--prompts", dest="prompts_file", type=Path, metavar="FILE", help="one prompt a line, UTF-8"
    )
    add(
        "--negative-prompt",
        metavar="TEXT",
        help="what guidance leads away from, instead of from no text",
    )
    add(
        "--text-encoder",
        metavar="DIR_OR_ID",
        help="that the model was trained with; the recipe's if left out",
    )
    add(
        "--labels",
        choices=["balanced", "random"],
        default="balanced",
        help="the classes or prompts in turn, or at random",
    )
    # Launchers take --num for an abbreviation of their own options; the long name passes.
    add(
        "--num",
        "--num-samples",
        type=number(ge=1),
        help=(
            "samples in all; 10 a class or one a prompt if left out; under torchrun and deepspeed"
            " write --num-samples"
        ),
    )


def _add_solver(parser: Parser) -> None:
    """Add what says how to draw it."""
    add = parser.add_argument
    add("--steps", type=number(ge=1), help="solver steps; the recipe's default if left out")
    add(
        "--cfg-scale",
        dest="cfg_scales",
        nargs="+",
        type=listed(number(float)),
        default=(),
        metavar="S",
        help="guidance scales, several into OUT/cfg_S; the recipe's default if left out",
    )
    add(
        "--cfg-interval",
        type=listed(number(float)),
        metavar="LOW,HIGH",
        help="noise levels between which there is guidance, of 0 to 1; everywhere if left out",
    )
    add(
        "--solver",
        choices=["auto", *(name for names in SOLVERS.values() for name in names)],
        help="must fit the model's objective; the recipe's default if left out",
    )


def main(arguments: list[str]) -> None:
    """Arguments to request to files."""
    options = parse_arguments(arguments)
    from promoe_ds.evaluation.sample_job import draw_samples
    from promoe_ds.evaluation.sample_request import SampleRequest, read_prompts

    prompts_file = options.prompts_file
    options.prompts = tuple(options.prompts) if prompts_file is None else read_prompts(prompts_file)
    series = {
        "checkpoint_steps": options.checkpoint_steps,
        "cfg_scales": [scale for scales in options.cfg_scales for scale in scales],
    }
    del options.local_rank, options.prompts_file, options.checkpoint_steps, options.cfg_scales
    del options.imports
    with joined_processes(options.device) as team:
        for path in draw_samples(SampleRequest(**vars(options)), team, **series):
            get_logger("sample").info("done: %s", path)


run = command(main)

if __name__ == "__main__":
    run()
