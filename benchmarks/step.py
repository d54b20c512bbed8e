"""Time of a real optimizer step: a recipe beside the dense network of the same activated size."""

from __future__ import annotations

from benchmarks.candidates import (
    LIBRARIES,
    build_each,
    build_trainer,
    for_timing,
    mixture_recipe,
    with_dispatch,
    without_experts,
)
from benchmarks.processes import single_process
from benchmarks.timing import Result, compare
from promoe_ds.config import count_parameters


def benchmark_step(*, tokens: int, rounds: int, recipe: str = "promoe_s") -> Result:
    """Time whole steps (data, noise, passes, clipping, ZeRO 2, AdamW, moving average, statistics)
    on this process's device, with no setting that training does not make itself.

    Candidates: `dense`, the recipe without experts; `moe`; and the recipe over the libraries'
    layers, where there are any.
    Args:
        tokens: of a step, which is one pass; whole images.
    """
    recipe_config, images = mixture_recipe(recipe, tokens=tokens, rounds=rounds)
    config = for_timing(recipe_config, micro_batch=images)
    configs = {"dense": without_experts(config), "moe": config}
    counts = {name: count_parameters(one) for name, one in configs.items()}
    with single_process() as device:
        bf16 = device.type == "cuda"
        trainers = {name: build_trainer(one, bf16=bf16) for name, one in configs.items()}
        libraries, missing = build_each(
            LIBRARIES, lambda name: build_trainer(with_dispatch(config, name), bf16=bf16)
        )
        settings = {
            "recipe": config.name,
            "images": images,
            "zero_stage": 2,
            "precision": "bf16" if bf16 else "fp32",
            "activated_parameters": {name: count.activated for name, count in counts.items()},
            "total_parameters": {name: count.total for name, count in counts.items()},
        }
        steps = {name: trainer.train_step for name, trainer in (trainers | libraries).items()}
        return compare("step", steps, rounds=rounds, warmup=1, settings=settings, missing=missing)
